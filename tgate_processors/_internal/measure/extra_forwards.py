"""What the calls of a denoiser cost that are not those of guidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..families import family_of
from ..plan.validation import shown
from .inputs import InputSize
from .macs import MACs, count_forward
from .meta_model import family_inputs, make_inputs, make_meta_model
from .target import config_json


def extra_forward_macs(denoiser: Any, size: InputSize, extra_forwards: Sequence[Any] | None) -> MACs:
    """MACs of a step's calls other than those of guidance, for one sample."""
    family, name = family_of(denoiser), type(denoiser).__name__
    assert family is not None
    known = [*family.layout.auxiliary_calls]
    if extra_forwards is not None and not isinstance(extra_forwards, Sequence):
        raise TypeError(
            f"extra_forwards={shown(extra_forwards)} is of type {type(extra_forwards).__name__}: pass a list, with a "
            "dict for each call."
        )
    if extra_forwards is None:
        if family_inputs(denoiser).has_extra_forwards:
            raise ValueError(
                f"pipelines call {name} further times in every step, with {' or '.join(known)}, and these calls "
                "run whole: pass extra_forwards, a list with the arguments of each such as "
                f'{{"{known[-1]}": True}}, or [] for none.'
            )
        return MACs()
    for given in extra_forwards:
        unknown = set(given) - set(known) if isinstance(given, Mapping) else [given]
        if unknown or not given:
            raise ValueError(
                f"extra_forwards={shown(extra_forwards)} means nothing for a {name}: "
                + (f"pass a dict for each call, with {' or '.join(known)}." if known else "leave it out.")
            )
    if not extra_forwards:
        return MACs()
    meta_model = make_meta_model(type(denoiser), json.loads(config_json(denoiser)))
    return sum(
        (count_forward(meta_model, make_inputs(meta_model, 1, size) | dict(given)).macs for given in extra_forwards),
        MACs(),
    )
