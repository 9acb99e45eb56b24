"""
What differs between pipelines, as data; and whether a pipeline can be gated, with the reason if not.

Imports `plan`, `denoiser` and `attention`.
"""

from ..attention.layers import attention_modules
from .catalog import FAMILIES, family_of, supported_names
from .check_settings import resolve_and_check
from .resolve import ResolvedPipeline, guidance_distillation_flag, resolve_pipeline
from .unsupported import check_attention, check_denoiser, reject_dropping_momentum, reject_free_noise

__all__ = [
    "FAMILIES",
    "ResolvedPipeline",
    "attention_modules",
    "check_attention",
    "check_denoiser",
    "family_of",
    "guidance_distillation_flag",
    "reject_dropping_momentum",
    "reject_free_noise",
    "resolve_and_check",
    "resolve_pipeline",
    "supported_names",
]
