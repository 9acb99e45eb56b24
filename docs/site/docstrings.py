"""
Docstrings in diffusers' form, made ready for mkdocstrings.

``name (`int` or `str`, *optional*, defaults to `10`):`` becomes ``name (int | str):``, because the signature has the
default; [`apply_tgate`] becomes a link.
"""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(\s+\w+) \((`.+?)\):", re.MULTILINE)
RETURNED = re.compile(r"^(\s*Returns:\n\s+)(`[^:\n]+`):", re.MULTILINE)


def plain(types: str) -> str:
    """The types, as an annotation would have them."""
    types = re.sub(r", \*optional\*|, defaults to .*", "", types).replace("`", "")
    types = re.sub(r",? or |, ", " | ", types)
    return re.sub(r"(\w+) of (.+)", r"\1[\2]", types)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """An object has been read."""
        if obj.docstring is None:
            return
        text = ARGUMENT.sub(lambda match: f"{match[1]} ({plain(match[2])}):", obj.docstring.value)
        text = RETURNED.sub(lambda match: f"{match[1]}{plain(match[2])}:", text)
        public = {str(name).strip("'\"") for name in obj.package.exports or ()}
        obj.docstring.value = re.sub(
            r"\[`(\w+)`\](?![\[(])",
            lambda match: f"[`{match[1]}`][{obj.package.path}.{match[1]}]" if match[1] in public else f"`{match[1]}`",
            text,
        )
