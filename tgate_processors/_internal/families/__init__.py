"""
What differs between pipelines, as data; and whether a pipeline can be gated, with the reason if not.

Imports `plan`, `denoiser` and `attention`.
"""

from ..attention.layers import attention_modules
from .catalog import FAMILIES, family_of, known
from .resolve import Found, check_guidance, check_half, check_own, distilled_by, find_family
from .unsupported import check_attention, check_denoiser, check_dropped, check_mode

__all__ = [
    "FAMILIES",
    "Found",
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
    "find_family",
    "known",
]
