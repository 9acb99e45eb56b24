"""What a pipeline that was found to be gated tells of the call that it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import ResolvedPipeline
from ..run.call import PipelineCall


def call_of(found: ResolvedPipeline, pipe: Any, arguments: Mapping[str, Any] | None = None) -> PipelineCall:
    """What a pipeline tells of the call that it is in."""
    layout = found.family.layout
    scales: dict[str, Any] = {"scale_beyond": layout.scale_beyond, "scales": layout.scales}
    scales |= {"asks_scale": layout.asks_scale, "first_expert": int(found.attribute == found.family.second)}
    return PipelineCall(pipe, arguments, is_diffusers_loop=found.is_diffusers_loop, guides=found.guides, **scales)
