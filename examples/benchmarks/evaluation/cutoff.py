"""Classifier-free guidance cut off after a step, and nothing else: what T-GATE has to beat."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback

from examples.testbeds.shapes.evaluation import draws_videos


class CFGCutoffCallback(PipelineCallback):
    """
    `SDCFGCutoffCallback` and `SDXLCFGCutoffCallback` for batches.

    Those of diffusers keep the last row of what the pipeline computes with; with two prompts or more the first prompts
    lose theirs. This keeps the conditional half.
    """

    def __init__(self, step: int, names: list[str]):
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=step)
        self.names = names

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline hands over and takes back."""
        return self.names

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        # A callback runs at the end of its step: after this one, `cutoff_step_index` steps have been guided.
        if step_index == self.config.cutoff_step_index - 1 and pipeline.do_classifier_free_guidance:
            for name in self.names:
                tensor = callback_kwargs[name]
                callback_kwargs[name] = tensor[len(tensor) // 2 :]
            pipeline._guidance_scale = 0.0
        return callback_kwargs


def half_of(value: Any, whole: int) -> Any:
    """The conditional half of what is as long as the batch, in containers too."""
    if isinstance(value, dict):
        return {name: half_of(part, whole) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(half_of(part, whole) for part in value)
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == whole:
        return value[whole // 2 :]
    return value


class CutoffHooks:
    """The same for a denoiser whose pipeline has no callbacks: the conditional half in, and out twice."""

    def __init__(self, step: int):
        self.step = step
        self.forwards = 0

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Halve what is as long as the batch."""
        self.forwards += 1
        if self.forwards <= self.step:
            return None
        return half_of(args, len(args[0])), half_of(kwargs, len(args[0]))

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Give the output for both halves: guidance of any scale then yields it."""
        if self.forwards <= self.step:
            return None
        return tuple(torch.cat([part, part]) for part in output)


@contextlib.contextmanager
def cut_off(pipe: Any, step: int) -> Iterator[dict[str, Any]]:
    """Guidance in the first `step` steps of one call; yields what the call needs."""
    if draws_videos(pipe):
        # The second call, which is the unconditional one, is left out.
        yield {"callback_on_step_end": CFGCutoffCallback(step, [])}
        return
    if hasattr(pipe, "transformer"):
        hooks = CutoffHooks(step)
        handles = [
            pipe.transformer.register_forward_pre_hook(hooks.before, with_kwargs=True),
            pipe.transformer.register_forward_hook(hooks.after, with_kwargs=True),
        ]
        try:
            yield {}
        finally:
            for handle in handles:
                handle.remove()
        return
    names = ["prompt_embeds"]
    # SDXL's.
    names += [name for name in ("add_text_embeds", "add_time_ids") if name in pipe._callback_tensor_inputs]
    yield {"callback_on_step_end": CFGCutoffCallback(step, names)}
