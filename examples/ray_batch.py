"""A batch job on all GPUs of a Ray cluster: `python examples/ray_batch.py`."""

import ray
import torch
from diffusers import DiffusionPipeline

from tgate_processors import apply_tgate

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


class Painter:
    """What runs on each GPU: a gated pipeline, loaded once."""

    def __init__(self):
        self.pipe = apply_tgate(DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float16).to("cuda"))

    def __call__(self, row):
        seed = torch.Generator("cpu").manual_seed(row["seed"])  # the same picture on every GPU
        return {**row, "image": self.pipe(row["prompt"], num_inference_steps=25, generator=seed).images[0]}


rows = ray.data.from_items([{"seed": 0, "prompt": "a red fox in the snow"}, {"seed": 1, "prompt": "a harbour at dawn"}])
for row in rows.map(Painter, num_gpus=1, compute=ray.data.ActorPoolStrategy(size=2)).iter_rows():
    row["image"].save(f"ray-{row['seed']}.png")
