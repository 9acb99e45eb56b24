"""How many pictures a run is for, and whether the denoiser's batch is what guidance makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..denoiser.inputs import DenoiserInputs, is_unconditional_first
from ..denoiser.spec import Layout


class Reporting(Protocol):
    """What a call of a pipeline reports of its batch."""

    is_diffusers_loop: bool

    @property
    def subject(self) -> str:
        """What errors call the pipeline."""

    def told(self, callback_tensors: Mapping[str, Any]) -> tuple[Any, Any]:
        """The embeddings of the negative prompt and of the prompt, where the pipeline tells them."""


class CFGBatchCheck:
    """
    The batch of a run: what the latents of the last step lead to, compared with what the denoiser gets.

    Args:
        call (`Reporting`): What the pipeline tells.
        layout (`Layout`): What the batch of its denoiser is.

    Attributes:
        unconditional_first (`bool`): Whether the first half of a guided batch is the unconditional one.
    """

    def __init__(self, call: Reporting, layout: Layout) -> None:
        self.unconditional_first = not layout.conditional_first
        self._layout = layout
        self._call = call
        self._pictures: int | None = None
        # diffusers' own loops need no look.
        self._looked_at = call.is_diffusers_loop

    def expect(self, pictures: int | None) -> None:
        """Note how many pictures are asked for, if the arguments say."""
        if self._pictures is None:
            self._pictures = pictures

    def forget(self) -> None:
        """A loop has ended, and the next one may be for others."""
        self._pictures = None

    def holds_halves(self, inputs: DenoiserInputs) -> bool | None:
        """Whether the denoiser is given both halves of guidance, by the latents of the last step, if that tells."""
        if self._pictures is None:
            return None
        return {self._pictures: False, 2 * self._pictures: True}.get(inputs.batch_size)

    def check(self, inputs: DenoiserInputs, guided: bool) -> None:
        """
        A forward begins: check that its batch fits the number of pictures.

        Raises:
            ValueError: If it is not.
        """
        if self._pictures is not None:
            self._compare(inputs.batch_size, self._pictures, guided)

    def settle(self, inputs: DenoiserInputs | None, guided: bool, told: dict[str, Any], latents: Any) -> None:
        """
        A step has ended: compare its batch with its latents, and know how many pictures the next one is for.

        Args:
            inputs (`DenoiserInputs`, *optional*): What the denoiser was given.
            guided (`bool`): Whether it was given both halves of guidance.
            told (`dict`): What the pipeline has told its callback.
            latents (`torch.Tensor`, *optional*): The latents of the next step, if the user's callback gave others.

        Raises:
            ValueError: If the batch is not what guidance makes of the latents, or the halves are not what they seem.
        """
        before = told.get("latents")
        if inputs is not None:
            # Where the text of both halves meets latents without guidance, a loop of diffusers makes two rows of one.
            fits = self._call.is_diffusers_loop and self.holds_halves(inputs) is guided
            if isinstance(before, torch.Tensor) and not fits:
                self._compare(inputs.batch_size, int(before.shape[0]), guided)
            if guided and not self._looked_at:
                # The one wait for the device, and only for a loop that is not diffusers' own.
                self._looked_at = True
                negative, positive = self._call.told(told)
                self.unconditional_first = is_unconditional_first(
                    inputs, self._layout.denoiser_arguments, negative, positive, self._call.subject
                )
        after = latents if isinstance(latents, torch.Tensor) else before
        if isinstance(after, torch.Tensor):
            self._pictures = int(after.shape[0])
        elif inputs is not None:
            self.expect(inputs.batch_size // (2 if guided else 1))

    @staticmethod
    def _compare(batch: int, pictures: int, guided: bool) -> None:
        """Two halves with guidance, else one."""
        expected = pictures * (2 if guided else 1)
        if batch == expected:
            return
        ended = " Its loop seems to end guidance by itself." if guided and batch == pictures else ""
        raise ValueError(
            f"T-GATE: the denoiser got a batch of {batch} for {pictures} latents with classifier-free guidance "
            f"{'on' if guided else 'off'}, where T-GATE expects {expected}: the guidance of this pipeline is not two "
            f"halves of one batch in every step.{ended} Call remove_tgate(pipe) to use it."
        )
