"""What a pipeline says about its current call: timesteps, guidance, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..denoiser.spec import AuxiliaryScale
from .scale_source import uses_given_scale
from .timesteps import TimestepReader

# Arguments that give the step in which a pipeline exchanges its text embeddings.
_EMBEDS_SWAP_ARGUMENTS = ("start_merge_step",)
# The share of the noise schedule that is guided, as its begin and its end.
_CFG_INTERVAL_DEFAULTS = {"start": 0.0, "end": 1.0}


class PipelineCall:
    """
    One call of a pipeline, read without a copy to the host.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that runs.
        arguments (`Mapping`, *optional*):
            The arguments of the call, for pipelines that keep in local variables what others have as attributes.
        is_diffusers_loop (`bool`, *optional*, defaults to `True`):
            Whether the loop is diffusers' own, so that what is known of its class holds for it.
        supports_cfg (`bool`, *optional*, defaults to `True`):
            Whether the pipeline can have guidance of two halves at all.
        scale_offset (`float`, *optional*, defaults to 0):
            What is added to the scale before guidance multiplies the difference of its halves with it.
        scale_attributes (`tuple` of `str`, *optional*): Where the pipeline has several scales.
        rereads_scale (`bool`, *optional*, defaults to `False`):
            Whether a loop that does not report its guidance reads the scale anew in every step.
        first_denoiser_index (`int`, *optional*, defaults to 0): The place of the first denoiser that the pipeline has.

    Attributes:
        timesteps (`TimestepReader`): What the pipeline and its scheduler report of the loop.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any] | None = None,
        *,
        is_diffusers_loop: bool = True,
        supports_cfg: bool = True,
        scale_offset: float = 0.0,
        scale_attributes: tuple[str, ...] = (),
        rereads_scale: bool = False,
        first_denoiser_index: int = 0,
    ) -> None:
        self._pipe = pipe
        self._arguments = dict(arguments or {})
        self.is_diffusers_loop = is_diffusers_loop
        self._supports_cfg = supports_cfg
        self._scale_offset = scale_offset
        self._scale_attributes = scale_attributes
        self._rereads_scale = rereads_scale
        self._first_denoiser_index = first_denoiser_index
        self._do_cfg: bool | None = None
        self._last_scale: Any = None
        self.timesteps = TimestepReader(pipe, self._arguments)

    @property
    def pipeline_name(self) -> str:
        """The name of the pipeline in messages."""
        return type(self._pipe).__name__

    def do_cfg_now(self) -> bool:
        """Whether the step that runs now has classifier-free guidance of two halves."""
        return self.do_cfg_ever() and self._in_cfg_interval()

    def do_cfg_ever(self) -> bool:
        """Whether some step of this call has classifier-free guidance of two halves."""
        self._reject_audio_cover()
        supports_cfg = self._supports_cfg and self._pipeline_does_cfg()
        if supports_cfg:
            self._reject_cfg_truncation()
        return supports_cfg

    def _pipeline_does_cfg(self) -> bool:
        """Whether the pipeline, or else its arguments, ask for guidance now."""
        if not self._reports_cfg:
            return self._arguments_do_cfg()
        # Callbacks may change the scale between two steps. Where it is a tensor (SVD), asking the pipeline waits for
        # the device, so ask only when it is another one.
        scale = getattr(self._pipe, "_guidance_scale", None)
        if self._do_cfg is None or scale is not self._last_scale or not self.is_diffusers_loop:
            try:
                self._do_cfg = bool(self._pipe.do_classifier_free_guidance)
            except AttributeError:
                # A custom loop may never set what the inherited property reads.
                self._do_cfg = self._arguments_do_cfg()
            self._last_scale = scale
        return self._do_cfg

    def guidance_scale(self, denoiser_index: int = 0) -> Any:
        """
        The factor of the difference of the halves in guidance now: a number, a tensor, or a list of numbers, one for
        each tensor of the denoiser's output.

        Args:
            denoiser_index (`int`, *optional*, defaults to 0): The denoiser that runs, as each may have a scale.

        Raises:
            ValueError: If the pipeline does not report it.
        """
        if self._scale_attributes:
            first, *others = self._scale_attributes
            # A pipeline without another scale does not guide what it would be for (the sound, in HDR).
            return [getattr(self._pipe, first), *(getattr(self._pipe, name, 0.0) for name in others)]
        if self._arguments.get("use_dynamic_cfg"):
            raise ValueError(
                f"T-GATE: use_dynamic_cfg=True changes the guidance scale of {self.pipeline_name} in every step, after "
                'its denoiser has run, and gate_step="auto" measures by it: leave it out, or give gate_step as a '
                'number of steps, apply_tgate(pipe, 20, guidance="predict", cross_attention=False).'
            )
        if self._uses_true_cfg:
            return self._arguments["true_cfg_scale"]
        denoiser_index += self._first_denoiser_index
        names = [*([f"guidance_scale_{denoiser_index + 1}"] if denoiser_index else []), "guidance_scale"]
        asked = [getattr(self._pipe, f"_{name}", None) for name in names]
        given = [self._arguments.get(name) for name in names]
        # A callback may have set another one, which only some loops read.
        uses_given = (
            self.is_diffusers_loop and "guidance_scale" in self._arguments and uses_given_scale(type(self._pipe))
        )
        scale = next((scale for scale in (given + asked if uses_given else asked + given) if scale is not None), None)
        if scale is None:
            raise ValueError(
                f'T-GATE: {self.pipeline_name} does not report its guidance scale, which gate_step="auto" measures '
                "with: it needs a `guidance_scale` in its call, or `_guidance_scale` set on the pipeline. Give "
                "gate_step as a number of steps."
            )
        return scale + self._scale_offset

    def auxiliary_scales(self, wanted: AuxiliaryScale) -> list[float] | None:
        """The scales of a further call now, for each part of its output; `None` if the pipeline reports none."""
        first, *others = wanted.attributes
        if getattr(self._pipe, first, None) is None:
            return None
        # A pipeline without another scale does not guide what it would be for (the sound, in HDR).
        found = [getattr(self._pipe, first), *(getattr(self._pipe, name, -wanted.offset) for name in others)]
        return [scale + wanted.offset for scale in found]

    def _arguments_do_cfg(self) -> bool:
        """Whether the arguments of the call ask for guidance."""
        if self._uses_true_cfg:
            return self._arguments["true_cfg_scale"] > 1 and self._has_negative_prompt()
        scale = self._arguments.get("guidance_scale")
        if self._rereads_scale and self._can_enable_cfg(scale):
            scale = getattr(self._pipe, "_guidance_scale", scale)
        if scale is None and not self.is_diffusers_loop:
            raise ValueError(
                f"T-GATE: {self.pipeline_name} has a loop of its own that does not say whether it guides: it needs a "
                "`guidance_scale` in its call, or `_guidance_scale` set on the pipeline. Call remove_tgate(pipe) to "
                "use it as it is."
            )
        return scale is not None and bool(scale > 1)

    def _can_enable_cfg(self, scale: Any) -> bool:
        """Whether guidance may come on later: loops that encode a negative prompt do so only if it is on at first."""
        given = [value for name, value in self._arguments.items() if name.startswith("negative_prompt_embeds")]
        return (scale is not None and scale > 1) or not given or any(value is not None for value in given)

    @property
    def cfg_hint(self) -> str:
        """How to enable guidance in a call, for messages."""
        return "true_cfg_scale above 1 and a negative prompt" if self._uses_true_cfg else "guidance_scale above 1"

    @property
    def _reports_cfg(self) -> bool:
        """Whether the pipeline reports whether it guides."""
        return hasattr(type(self._pipe), "do_classifier_free_guidance")

    @property
    def _uses_true_cfg(self) -> bool:
        """Whether guidance has a negative prompt and a scale apart from the one that is an input of the denoiser."""
        return not self._reports_cfg and "true_cfg_scale" in self._arguments

    def _has_negative_prompt(self) -> bool:
        """Whether the call has a negative prompt or all of its embeddings."""
        embeds = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
        given = [self._arguments[name] is not None for name in embeds if name in self._arguments]
        return self._arguments.get("negative_prompt") is not None or (bool(given) and all(given))

    def _in_cfg_interval(self) -> bool:
        """Whether the step that runs now is in the interval of guidance, where the call gives one (ACE-Step)."""
        start, end = (
            self._arguments.get(f"cfg_interval_{name}", all_of_it) for name, all_of_it in _CFG_INTERVAL_DEFAULTS.items()
        )
        if (start, end) == tuple(_CFG_INTERVAL_DEFAULTS.values()):
            return True
        scheduler = self._pipe.scheduler
        return bool(start <= 1.0 - float(scheduler.timesteps[scheduler.step_index or 0]) <= end)

    def _reject_cfg_truncation(self) -> None:
        """Refuse a call that ends guidance by itself (Lumina 2, Z-Image)."""
        for name in ("cfg_trunc_ratio", "cfg_truncation"):
            ratio = self._arguments.get(name)
            if ratio is not None and ratio < 1:
                raise ValueError(
                    f"T-GATE: {name}={ratio} ends the guidance of {self.pipeline_name} by itself, where T-GATE expects "
                    "both of its halves in every step: leave it out, or call remove_tgate(pipe) to use it."
                )

    def _reject_audio_cover(self) -> None:
        """Refuse a call that mixes two songs (ACE-Step)."""
        strength = self._arguments.get("audio_cover_strength", 1.0)
        if strength < 1:
            raise ValueError(
                f"T-GATE: audio_cover_strength={strength} calls the denoiser of {self.pipeline_name} a second time in "
                "every step, without the song that is covered, and what a layer keeps cannot serve both. Leave it out, "
                "or call remove_tgate(pipe) to use it."
            )

    def num_samples(self) -> int | None:
        """Number of samples that the call asks for, if its arguments say so."""
        prompt, embeds = self._arguments.get("prompt"), self._arguments.get("prompt_embeds")
        if isinstance(embeds, torch.Tensor):
            prompts = int(embeds.shape[0])
        elif isinstance(prompt, (str, list)):
            prompts = 1 if isinstance(prompt, str) else len(prompt)
        else:
            return None
        each = (self._arguments.get(f"num_{kind}_per_prompt") for kind in ("images", "videos", "waveforms"))
        return prompts * next((number for number in each if isinstance(number, int)), 1)

    def prompt_embeds_pair(self, callback_tensors: Mapping[str, Any]) -> tuple[Any, Any]:
        """The embeddings of the negative prompt and of the prompt, where the pipeline reports them."""
        negative = self._arguments.get("negative_prompt_embeds")
        if negative is None:
            negative = callback_tensors.get("negative_prompt_embeds")
        return negative, self._arguments.get("prompt_embeds")

    def embeds_swap_step(self) -> int | None:
        """The step in which this kind of pipeline exchanges its text embeddings (PhotoMaker, ConsistentID)."""
        steps = [self._arguments.get(name) for name in _EMBEDS_SWAP_ARGUMENTS]
        return next((step for step in steps if isinstance(step, int)), None)
