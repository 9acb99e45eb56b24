"""Denoising loops of somebody's own, around the tiny pipelines: they differ where such loops differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from tests.zoo.case import quiet
from tests.zoo.core import BY_NAME

NAMES = ["sd", "sdxl"]


class Loop:
    """A plain loop, as diffusers' own: told steps, one batch `[unconditional, conditional]`, a callback every step."""

    tells_steps = True
    callback_every = 1
    more_steps = 0

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        pooled_prompt_embeds=None,
        negative_pooled_prompt_embeds=None,
        num_inference_steps=6,
        guidance_scale=5.0,
        generator=None,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=["latents"],  # noqa: B006
        **kwargs,
    ):
        return self.loop(
            (negative_prompt_embeds, prompt_embeds),
            (negative_pooled_prompt_embeds, pooled_prompt_embeds),
            num_inference_steps,
            guidance_scale,
            generator,
            callback_on_step_end,
        )

    def loop(self, texts, pooled, steps, scale, generator, callback):
        self._guidance_scale = scale
        self.scheduler.set_timesteps(steps + self.more_steps)
        if self.tells_steps:
            self._num_timesteps = steps
        x = self.prepare_latents(len(texts[1]), 4, 64, 64, texts[1].dtype, torch.device("cpu"), generator)
        self.before_loop(x, texts, pooled)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.predict(i, self.scheduler.scale_model_input(x, t), t, texts, pooled, scale)
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
            if callback is not None and (i + 1) % self.callback_every == 0:
                x = callback(self, i, t, {"latents": x}).pop("latents", x)
        return SimpleNamespace(images=x)

    def before_loop(self, x, texts, pooled):
        pass

    def predict(self, i, x, t, texts, pooled, scale):
        u, c = self.denoise(torch.cat([x, x]), t, torch.cat(texts), pooled).chunk(2)
        return u + scale * (c - u)

    def denoise(self, x, t, text, pooled):
        given = {}
        if pooled[1] is not None:
            each = [part for part in pooled if part is not None]
            ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(len(x), 1)
            given["added_cond_kwargs"] = {"text_embeds": torch.cat(each) if len(each) > 1 else each[0], "time_ids": ids}
        return self.unet(x, t, encoder_hidden_states=text, **given).sample


def built(name: str, loop: type = Loop) -> Any:
    """A pipeline of a tiny family with a loop of its own."""
    base = type(BY_NAME[name].build())
    more = {"requires_safety_checker": False} if base is diffusers.StableDiffusionPipeline else {}
    own = type(loop.__name__, (loop, base), {"__module__": __name__})
    return quiet(own(**BY_NAME[name].build().components, **more))


class Inverting(Loop):
    """Runs the denoiser before its loop, as inversions do."""

    def before_loop(self, x, texts, pooled):
        for t in self.scheduler.timesteps.flip(0)[:4]:
            self.denoise(torch.cat([x, x]), t, torch.cat(texts), pooled)


class OwnLoop:
    """A loop of somebody's own."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)
