"""What differs between pipelines, as data; and whether a pipeline can be gated, with the reason if not."""

from ..layers import attention_modules
from .finding import Found, check_guidance, check_half, check_own, distilled_by, find_family
from .refusing import check_attention, check_denoiser, check_dropped, check_mode
from .rows import FAMILIES, family_of, known

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
