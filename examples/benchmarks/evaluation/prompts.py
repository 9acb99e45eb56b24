"""Which captions are drawn: those of the testbeds that training has not seen, COCO's, or a text file's."""

import json
from pathlib import Path
from typing import Any

import typer

from examples.testbeds.shapes.clips import Clip, all_clips
from examples.testbeds.shapes.evaluation import evenly, held_out
from examples.testbeds.shapes.scenes import Scene, all_scenes

# A model of each domain, and how many of its held-out captions are easier ones.
DOMAINS = {"shapes": ("sd", 64), "clips": ("wan", 64)}


def coco_captions(content: dict[str, Any]) -> list[str]:
    """The first caption of each picture, in order of the pictures' numbers."""
    first: dict[int, str] = {}
    for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
        first.setdefault(annotation["image_id"], annotation["caption"].strip())
    return [first[picture] for picture in sorted(first)]


def held_out_captions(count: int, domain: str = "shapes") -> list[str]:
    """A fifth with one object or an object at rest, the others with two or one that moves; fewer where there are."""
    model, easy = DOMAINS[domain]
    easy = min(count // 5, easy)
    return [scene.caption for scene in held_out(model, easy, count - easy)]


def read_captions(source: str, count: int) -> list[str]:
    """`count` captions, taken in equal steps through all that there are."""
    if source in DOMAINS:
        found = held_out_captions(count, source)
    else:
        path = Path(source)
        if not path.is_file():
            raise typer.BadParameter(
                f"captions={source!r} is not a file: pass 'shapes', 'clips', COCO's captions_val2014.json, or a text "
                "file with a caption a line"
            )
        try:
            text = path.read_text()
            lines = coco_captions(json.loads(text)) if path.suffix == ".json" else text.splitlines()
        except (ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(
                f"captions={source!r} is not in COCO's format ({error!r}): pass a JSON file with a list 'annotations' "
                "of 'id', 'image_id' and 'caption'"
            ) from error
        found = evenly([line for line in lines if line.strip()], count) if len(lines) > count else lines
    if len(found) < count:
        raise typer.BadParameter(f"count={count}, but captions={source!r} has {len(found)}: pass at most as many")
    return found


def scenes_of(captions: list[str]) -> list[Scene] | list[Clip] | None:
    """The scenes or clips of captions from one domain, or nothing if one is from elsewhere."""
    for domain in (all_scenes(), all_clips()):
        known = {scene.caption: scene for scene in domain}
        if all(caption in known for caption in captions):
            return [known[caption] for caption in captions]
    return None
