"""How many samples a run is for, and whether the denoiser's batch is what guidance makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..denoiser.inputs import DenoiserInputs, is_unconditional_first
from ..denoiser.spec import BatchLayout


class Reporting(Protocol):
    """A call of a pipeline, as far as it reports its batch."""

    is_diffusers_loop: bool

    @property
    def pipeline_name(self) -> str:
        """What errors call the pipeline."""

    def prompt_embeds_pair(self, callback_tensors: Mapping[str, Any]) -> tuple[Any, Any]:
        """The embeddings of the negative prompt and of the prompt, where the pipeline reports them."""


class CFGBatchCheck:
    """
    The batch of a run: checks that the denoiser gets what the latents of the last step lead to.

    Args:
        call (`Reporting`): What the pipeline reports.
        layout (`BatchLayout`): The batch of its denoiser.

    Attributes:
        unconditional_first (`bool`): Whether the first half of a guided batch is the unconditional one.
    """

    def __init__(self, call: Reporting, layout: BatchLayout) -> None:
        self.unconditional_first = not layout.conditional_first
        self._layout = layout
        self._call = call
        self._num_samples: int | None = None
        # The order is known in diffusers' own loops.
        self._order_checked = call.is_diffusers_loop

    def set_num_samples(self, num_samples: int | None) -> None:
        """Set the number of samples from the arguments of the call, if they say it."""
        if self._num_samples is None:
            self._num_samples = num_samples

    def reset(self) -> None:
        """A loop has ended, and the next one may have another number of samples."""
        self._num_samples = None

    def has_both_halves(self, inputs: DenoiserInputs) -> bool | None:
        """Whether a batch has both halves of guidance, compared with the last step's latents; `None` if unclear."""
        if self._num_samples is None:
            return None
        return {self._num_samples: False, 2 * self._num_samples: True}.get(inputs.batch_size)

    def validate(self, inputs: DenoiserInputs, guided: bool) -> None:
        """
        A forward begins: check that its batch fits the number of samples.

        Raises:
            ValueError: If it does not.
        """
        if self._num_samples is not None:
            self._validate_size(inputs.batch_size, self._num_samples, guided)

    def on_step_end(
        self, inputs: DenoiserInputs | None, guided: bool, callback_tensors: dict[str, Any], latents: Any
    ) -> None:
        """
        A step has ended: compare its batch with its latents, and set the number of samples of the next one.

        Args:
            inputs (`DenoiserInputs`, *optional*): What the denoiser was given.
            guided (`bool`): Whether it was given both halves of guidance.
            callback_tensors (`dict`): What the pipeline has passed to its callback.
            latents (`torch.Tensor`, *optional*): The latents of the next step, if the user's callback gave others.

        Raises:
            ValueError: If the batch is not what guidance makes of the latents, or the halves are not what they seem.
        """
        before = callback_tensors.get("latents")
        if inputs is not None:
            # Where the text of both halves meets latents without guidance, a loop of diffusers makes two rows of one.
            fits = self._call.is_diffusers_loop and self.has_both_halves(inputs) is guided
            if isinstance(before, torch.Tensor) and not fits:
                self._validate_size(inputs.batch_size, int(before.shape[0]), guided)
            if guided and not self._order_checked:
                # The one wait for the device, and only for a loop that is not diffusers' own.
                self._order_checked = True
                negative, positive = self._call.prompt_embeds_pair(callback_tensors)
                self.unconditional_first = is_unconditional_first(
                    inputs, self._layout.denoiser_arguments, negative, positive, self._call.pipeline_name
                )
        after = latents if isinstance(latents, torch.Tensor) else before
        if isinstance(after, torch.Tensor):
            self._num_samples = int(after.shape[0])
        elif inputs is not None:
            self.set_num_samples(inputs.batch_size // (2 if guided else 1))

    @staticmethod
    def _validate_size(batch: int, num_samples: int, guided: bool) -> None:
        """Check that a batch is two halves with guidance, else one."""
        expected = num_samples * (2 if guided else 1)
        if batch == expected:
            return
        ended = ""
        if guided and batch == num_samples:
            ended = (
                " Either its loop ends guidance by itself, or each process computes one half of it (CFG parallelism), "
                "which leaves no half to skip: pass each process its own prompts instead."
            )
        raise ValueError(
            f"T-GATE: the denoiser got a batch of {batch} for {num_samples} latents with classifier-free guidance "
            f"{'on' if guided else 'off'}, where T-GATE expects {expected}: the guidance of this pipeline is not two "
            f"halves of one batch in every step.{ended} Call remove_tgate(pipe) to use it."
        )
