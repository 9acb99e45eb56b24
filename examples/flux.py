"""FLUX.1-dev, guided by a negative prompt: `python examples/flux.py`."""

import torch
from diffusers import DiffusionPipeline

from tgate_processors import apply_tgate, get_tgate_report

MODEL = "black-forest-labs/FLUX.1-dev"
pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16).to("cuda")

# Joint attention has no cross-attention output to keep. Half of guidance is left out, and whole steps are forecast.
apply_tgate(pipe)

# FLUX guides by two calls of its denoiser if it has both of these. Without them whole steps alone are forecast.
guidance = {"negative_prompt": "blurry, low contrast", "true_cfg_scale": 4.0}
prompt = "a lighthouse on a cliff in a storm, oil painting"
image = pipe(prompt, num_inference_steps=28, height=1024, width=1024, **guidance).images[0]
image.save("flux.png")
print(get_tgate_report(pipe))
