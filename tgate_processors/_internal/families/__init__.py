"""
What differs between pipelines, as data; and whether a pipeline can be gated, with the reason if not.

Imports `plan`, `denoiser` and `attention`.
"""

from ..attention.layers import attention_modules
from .catalog import FAMILIES, family_of, known
from .resolve import ResolvedPipeline, check_guidance, check_half, check_own, distilled_by, resolve_pipeline
from .unsupported import check_attention, check_denoiser, check_dropped, check_mode

__all__ = [
    "FAMILIES",
    "ResolvedPipeline",
    "attention_modules",
    "check_attention",
    "check_denoiser",
    "check_dropped",
    "check_guidance",
    "check_half",
    "check_mode",
    "check_own",
    "distilled_by",
    "family_of",
    "known",
    "resolve_pipeline",
]
