"""
README, CHANGELOG and CONTRIBUTING as pages of the site, and links that work there.

The files are written for a code host: README links to `docs/cost.md`, pages link to `../CHANGELOG.md`. Here links
between two pages are made to fit the site. The site has no page for a module or a test. With `repo_url` such links lead
to the code host; without it only their text is left.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the repository's root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make links of a file links of a page."""
    page_path = page.file.src_uri
    source = SOURCES.get(page_path, f"docs/{page_path}")

    def target(link: str) -> str | None:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        there = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(there) is not None:
            return posixpath.relpath(there, posixpath.dirname(page_path) or ".")
        return f"{config.repo_url.rstrip('/')}/blob/main/{path}" if config.repo_url else None

    def in_markdown(match: re.Match[str]) -> str:
        text, link, anchor = match.groups("")
        if not is_file(source, link):
            return match[0]
        page = target(link)
        return text.removeprefix("!")[1:-1] if page is None else f"{text}({page}{anchor})"

    def in_html(match: re.Match[str]) -> str:
        return f'{match[1]}="{target(match[2])}"' if is_file(source, match[2]) else match[0]

    markdown = re.sub(r"(!?\[[^][]*\])\(([^()#\s]+)(#[^()\s]*)?\)", in_markdown, markdown)
    return re.sub(r'\b(src|srcset|href)="([^"#]+)"', in_html, markdown)


def is_file(source: str, link: str) -> bool:
    """Whether a link of a file leads to another one; what looks like a link in code does not."""
    return "://" not in link and (ROOT / posixpath.dirname(source) / link).exists()
