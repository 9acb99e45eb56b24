"""Stable Diffusion XL: `python examples/sdxl.py`."""

import torch
from diffusers import DiffusionPipeline

from tgate_processors import apply_tgate, get_tgate_report, remove_tgate

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float16, variant="fp16").to("cuda")

apply_tgate(pipe)
image = pipe("an astronaut riding a horse on the moon", num_inference_steps=25).images[0]
image.save("sdxl.png")
print(get_tgate_report(pipe))  # how many steps took half the batch, and what was held

remove_tgate(pipe)  # from here on it draws as it did before
