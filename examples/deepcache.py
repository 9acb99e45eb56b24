"""Together with a cache that skips blocks (`pip install DeepCache`): `python examples/deepcache.py`."""

import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DiffusionPipeline

from tgate_processors import apply_tgate, get_tgate_report

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float16).to("cuda")

helper = DeepCacheSDHelper(pipe)
helper.set_params(cache_interval=3, cache_branch_id=0)
# DeepCache is handed over. Caches of diffusers and cache-dit are switched on as usual, before this or after it.
apply_tgate(pipe, deepcache=helper)

image = pipe("a watercolour of a harbour at dawn", num_inference_steps=25).images[0]
image.save("deepcache.png")
print(get_tgate_report(pipe))
