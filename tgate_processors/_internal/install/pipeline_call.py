"""How a call of a resolved pipeline is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import ResolvedPipeline
from ..run.call import PipelineCall


def call_of(found: ResolvedPipeline, pipe: Any, arguments: Mapping[str, Any] | None = None) -> PipelineCall:
    """Read a call of a resolved pipeline."""
    layout = found.family.layout
    scales: dict[str, Any] = {"scale_offset": layout.scale_offset, "scale_attributes": layout.scale_attributes}
    scales |= {
        "rereads_scale": layout.rereads_scale,
        "first_denoiser_index": int(found.attribute == found.family.second_denoiser),
    }
    return PipelineCall(
        pipe, arguments, is_diffusers_loop=found.is_diffusers_loop, supports_cfg=found.supports_cfg, **scales
    )
