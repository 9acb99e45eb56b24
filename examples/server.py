"""Requests drawn side by side in threads, on one set of weights: `python examples/server.py`."""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import DiffusionPipeline

from tgate_processors import apply_tgate

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = apply_tgate(DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float16, variant="fp16").to("cuda"))


def answer(prompt: str):
    """What a server calls for each request, in a thread of its own."""
    own = copy.copy(pipe)  # has the same weights, and is gated too
    for name in ("scheduler", "tokenizer", "tokenizer_2"):  # these change as they are used
        setattr(own, name, copy.deepcopy(getattr(pipe, name)))
    return own(prompt, num_inference_steps=25).images[0]


with ThreadPoolExecutor(max_workers=2) as pool:
    for number, image in enumerate(pool.map(answer, ["a red fox in the snow", "a harbour at dawn"])):
        image.save(f"request-{number}.png")
