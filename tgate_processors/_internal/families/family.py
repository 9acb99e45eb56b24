"""What a family of denoisers is described by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..denoiser.spec import Layout
from ..plan.schedule import CFGHalf

Shapes = dict[str, Any]


@dataclass(frozen=True)
class InputSize:
    """
    What a denoiser's inputs are as large as, for one picture.

    Args:
        height (`int`): Pixels of the latent.
        width (`int`): Likewise.
        tokens (`int`): Tokens of the text.
        frames (`int`): Frames of the latent.
        picture (`int`): Tokens of a picture that is given, where an encoder makes some of it.
        given (`bool`): Whether parts of it are given, as by a time for every token or frame.
        crossed (`bool`): Whether attention between video and sound takes the time of the whole (LTX-2).
    """

    height: int
    width: int
    tokens: int
    frames: int
    picture: int = 257
    given: bool = False
    crossed: bool = False


@dataclass(frozen=True)
class InputShapes:
    """
    The inputs of the denoisers of a family, for `estimate_cost`.

    Args:
        shapes (`Callable`): Shapes of the arguments, by the configuration, the batch and the size. What is no tuple is
            an argument as it is.
        tokens (`int`): Text tokens if nothing says how many.
        frames (`int`, *optional*): Frames likewise; nothing for pictures.
        text (`bool`): Whether the number of tokens may be told.
        padded (`bool`): Whether pipelines fill the text up to what their tokenizer takes.
        sized (`bool`): Whether it has a height and a width.
        scale (`int`): Pixels of the picture for one of the latent, if no pipeline says it.
        frame_scale (`int`): Frames of the video, but for the first one, for one of the latent.
        further (`bool`): Whether its pipelines call the denoiser further times in a step by default.
        given (`tuple` of `str`): Pipelines that tell the denoiser which parts are given, by a time for every token or
            frame, or by an input more.
        instead (`Mapping`): Parts without weights that do not run on the meta device, and what gives out as much.
    """

    shapes: Callable[[Any, int, InputSize], Shapes]
    tokens: int
    frames: int | None = None
    text: bool = True
    padded: bool = True
    sized: bool = True
    scale: int = 8
    frame_scale: int = 1
    further: bool = False
    given: tuple[str, ...] = ()
    instead: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """
    A kind of denoiser, and of the pipelines that call it.

    Args:
        denoiser_class (`str`): Name of its class; subclasses count too.
        attribute (`str`): Where pipelines have it.
        kept_half (`str`): The half that stays where guidance is dropped.
        inputs (`InputShapes`, *optional*):
            What it takes, for `estimate_cost`. Nothing if it does not run without weights.
        layout (`Layout`): What its batch is.
        pipelines_without_callback (`Mapping`): Pipelines that lack `callback_on_step_end`, `num_timesteps` or
            `do_classifier_free_guidance`, but are known to call the denoiser once for each of `scheduler.timesteps` and
            to guide where `guidance_scale > 1`. The value is the half that stays, where it is another one.
        second (`str`, *optional*): Where pipelines have another denoiser of the class, which takes over in the loop.
    """

    denoiser_class: str
    attribute: str
    kept_half: CFGHalf
    inputs: InputShapes | None
    layout: Layout = field(default_factory=Layout)
    pipelines_without_callback: Mapping[str, CFGHalf | None] = field(default_factory=dict)
    second: str | None = None


def first(width: Any) -> int:
    """A width that a configuration may give for every block."""
    return int(width[0] if isinstance(width, (list, tuple)) else width)
