"""
The same with the names that users import, all of diffusers being looked at, which takes mypy a minute.

`from diffusers import ...` shows mypy the stand-ins for machines without torch, and what `from_pretrained` gives is of
any type.
"""

from typing import assert_type

import diffusers
import numpy as np
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from tgate_processors import apply_tgate, remove_tgate


def imported(pipe: diffusers.StableDiffusionXLPipeline) -> None:
    assert_type(apply_tgate(pipe, np.int64(10)), diffusers.StableDiffusionXLPipeline)
    assert_type(remove_tgate(pipe), diffusers.StableDiffusionXLPipeline)
    apply_tgate(pipe.unet)  # type: ignore[attr-defined]


def itself(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> None:
    assert_type(apply_tgate(pipe), StableDiffusionPipeline)
    apply_tgate(unet)  # type: ignore[type-var]


apply_tgate(diffusers.DiffusionPipeline.from_pretrained("stabilityai/sdxl-turbo"), 10)  # type: ignore[no-untyped-call]
