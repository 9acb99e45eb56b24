"""A video by Wan 2.1: `python examples/wan.py`."""

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.utils import export_to_gif

from tgate_processors import apply_tgate, get_tgate_report

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
vae = AutoencoderKLWan.from_pretrained(MODEL, subfolder="vae", dtype=torch.float32)
pipe = DiffusionPipeline.from_pretrained(MODEL, vae=vae, dtype=torch.bfloat16).to("cuda")

# By itself it keeps no cross-attention. A limit asks for it: as many layers are kept as it has room for.
apply_tgate(pipe, max_memory="2GB")
size = {"height": 480, "width": 832, "num_frames": 81}
frames = pipe("a red fox walks through fresh snow", num_inference_steps=50, output_type="pil", **size).frames[0]
export_to_gif(frames, "wan.gif", fps=16)
print(get_tgate_report(pipe))
