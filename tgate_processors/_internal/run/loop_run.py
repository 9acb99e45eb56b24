"""What one call of a pipeline has seen so far: its loop, its denoisers, and what their layers hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from ..attention.cache import AttentionCache
from ..attention.layers import GatedLayers
from ..attention.state import TGateState
from ..caches.adapter import CacheAdapters
from ..caches.foreign_forwards import ForeignForwards
from ..denoiser.inputs import DenoiserInputs, is_latents
from ..guidance.batch_check import CFGBatchCheck
from ..guidance.batched_cfg import BatchedCFG
from ..guidance.denoiser_cfg import DenoiserCFG
from ..guidance.sequential_cfg import SequentialCFG
from ..plan.report_builder import NO_LAYER_COUNTS
from ..plan.step_plan import Level
from ..plan.steps import StepCounter
from .base import Run
from .call import PipelineCall
from .denoisers import DenoiserCaches
from .messages import RunWarnings
from .planner import ForwardPlanner
from .ranks import agreement_of


class LoopRun(Run[DenoiserCFG]):
    """
    One call of a pipeline, from one loop to the next, with what hooks ask it.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        call (`PipelineCall`): What the pipeline reports.
        layers (`GatedLayers` or a sequence of them): The attention layers of its denoiser, or of its denoisers.
        can_skip_half (`bool`): Whether guidance is two halves, of which one can be skipped.
        counts_forwards (`bool`, *optional*, defaults to `False`):
            Whether the end of a forward is the end of a step, for pipelines without step callbacks.
        caches (`CacheAdapters`, *optional*): The caches of others on the denoiser.
        cross_attention (`bool`, *optional*): Whether cross-attention is gated. Defaults to what the family says.
        forwards (`ForeignForwards`, *optional*): What its denoisers do when they are called.
        can_forecast (`bool`, *optional*, defaults to `False`):
            Whether calls of the denoiser, and of what is called before it, can be left out.
        check_rows (`Callable`, *optional*):
            Is told after each forward how many rows of guidance the layers of the denoiser should have got.
    """

    def __init__(
        self,
        state: TGateState,
        call: PipelineCall,
        layers: GatedLayers | Sequence[GatedLayers],
        *,
        can_skip_half: bool,
        counts_forwards: bool = False,
        caches: CacheAdapters | None = None,
        cross_attention: bool | None = None,
        forwards: ForeignForwards | None = None,
        can_forecast: bool = False,
        check_rows: Callable[[torch.nn.Module, int], None] | None = None,
    ) -> None:
        self.denoisers = DenoiserCaches(state, [layers] if isinstance(layers, GatedLayers) else layers)
        layout = self.denoisers.active.layers.layout
        form = SequentialCFG if layout.calls_per_step > 1 else BatchedCFG
        cfg = form(state.schedule, layout, call.guidance_scale)
        forwards = forwards or ForeignForwards(())
        agree = agreement_of([each.layers.denoiser for each in self.denoisers])
        super().__init__(state, cfg, forwards, can_skip_half=can_skip_half, can_forecast=can_forecast, agree=agree)
        self.call = call
        self.gates_cross = layout.gates_cross_by_default if cross_attention is None else cross_attention
        self.batch = CFGBatchCheck(call, layout)
        self._counts_forwards = counts_forwards
        self._check_rows = check_rows
        self._caches = caches or CacheAdapters()
        self.denoisers.set_sees_half_inside(self._caches.owns_cfg)
        self._planner = ForwardPlanner(state, self.denoisers, self._caches, cfg, gates_cross=self.gates_cross)
        self._warnings = RunWarnings(state, call, gates_cross=self.gates_cross, joint=layout.joint)
        self._last_index: int | None = None
        # The inputs of the forward that runs, or has run last.
        self._inputs: DenoiserInputs | None = None
        self._guided = False
        self._active_index = 1
        self._num_samples: int | None = None
        # What was exchanged too late for the step that runs.
        self._exchanged_late: Collection[str] = ()

    @property
    def attention_cache(self) -> AttentionCache:
        """The cached outputs of the layers that run now."""
        return self.denoisers.attention_cache

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs, and in differences of the halves of guidance."""
        return self.denoisers.nbytes + self._cfg.nbytes

    @property
    def guided(self) -> bool:
        """Whether the last forward was given both halves of guidance, in one batch."""
        return self._guided and self._can_skip_half

    @property
    def computes_cross_attention(self) -> bool:
        """Whether half steps compute any cross-attention."""
        return not self.gates_cross or bool(self.denoisers.active.per_call[0].over_budget)

    @property
    def halves_batch(self) -> bool:
        """Whether the forward that runs now runs on half of the batch that the pipeline gives."""
        return self._planner.plan.halves_batch

    @property
    def step_index(self) -> int:
        """The step that runs now."""
        return self._report_builder.step_offset + (self._loop.step_index if self._loop is not None else 0)

    @property
    def pass_index(self) -> int:
        """Passes of the loop that have ended."""
        return self._loop.pass_index if self._loop is not None else 0

    @property
    def is_between_loops(self) -> bool:
        """Whether no loop is under way."""
        return self._loop is None

    @property
    def gates_first_step(self) -> bool:
        """Whether the gate lies in the first step."""
        return self._loop is not None and self._loop.gate_step == 1

    @property
    def may_halve_batch(self) -> bool:
        """Whether the batch of a guided step of this loop may be halved."""
        return not self._is_sequential and self._loop is not None and self._loop.can_halve_batch

    def halves_next_forward(self, shape: tuple[int, ...]) -> bool:
        """Whether the step that runs now will run on half the batch, if its latents are of this shape."""
        loop = self._loop
        halves = loop is not None and self._planner.halves_next_forward(loop, shape)
        return halves and self.guided and self.call.do_cfg_now()

    def invalidate(self, names: Collection[str]) -> None:
        """
        Some inputs are exchanged: the next step is a full one if what is cached depends on them.

        What is cached goes by the place in the batch, so other latents leave nothing of it. Other conditions (the text)
        leave cross-attention as it is, but not the difference that they make.

        Args:
            names (`Collection` of `str`): Their names in pipelines.
        """
        loop = self._loop
        if loop is None or not (any(map(is_latents, names)) or (names and (self._predicts or self._can_forecast))):
            return
        if self.denoisers.active.nbytes:
            # All layers have to run in the full step.
            self._caches.reset()
        self.denoisers.active.reset()
        self._planner.invalidate()
        self._restart_guidance(loop)

    def _begin_loop(self) -> StepCounter:
        """A loop begins: its steps are reported by now, or in its first step."""
        ungated = self.denoisers.regate_replaced()
        if ungated:
            self._warnings.ungated(ungated if self._can_skip_half else [])
            # Their processors may count their calls.
            self._can_skip_half = self._can_forecast = False
        loop = self._begin_counting(self.call.timesteps.read_timeline())
        if self._caches.owns_cfg:
            self._warnings.cache_owns_cfg()
        if self._counts_forwards:
            self._num_samples = self.call.num_samples()
            self.batch.set_num_samples(self._num_samples)
        self.denoisers.set_budget(self._state.max_memory, shared=not self._can_skip_half)
        self._planner.reset()
        return loop

    def _end_loop(self, loop: StepCounter) -> None:
        """All passes have ended. Pipelines that run their loop several times in one call start the next one here."""
        self._report_builder.end_loop(loop)
        self._last_index = loop.last_index
        self._loop = None
        self.batch.reset()
        self._caches.on_loop_end()
        self._cfg.release()
        self.denoisers.reset()
        self._planner.reset()

    @property
    def _is_sequential(self) -> bool:
        """Whether guidance is sequential: two calls of the denoiser in a step."""
        return self._cfg.calls_per_step > 1

    @property
    def _predicts(self) -> bool:
        """Whether the difference of the halves of guidance is predicted from what is known."""
        return self._state.schedule.predicts and self._can_skip_half and self.call.do_cfg_now()

    def _is_guided(self, loop: StepCounter, inputs: DenoiserInputs) -> bool:
        """Whether this step is guided: as its batch shows, or else as the call says."""
        shows = not self._is_sequential and self._can_skip_half and self.call.is_diffusers_loop
        if shows and loop.pass_index and not self._counts_forwards:
            # Some loops ask the pipeline in every step, which a callback may have changed; others ask once.
            halves = self.batch.has_both_halves(inputs)
            if halves is not None:
                return halves
        return self.call.do_cfg_now()

    def _switch_guidance(self, loop: StepCounter, guided: bool) -> None:
        """Guidance goes off or on within the loop; it begins with full steps, and nothing from before is reused."""
        if guided:
            self.denoisers.active.cache_key = None
        self.denoisers.switched = True
        self._restart_guidance(loop)

    def _report_step(self, loop: StepCounter, step: int) -> None:
        """A pass of this step has ended: add it to the report."""
        level, first = self._planner.plan.level, self.denoisers.active.per_call[0]
        kept = self.denoisers.cached_layer_counts
        self._report_builder.add_pass(
            loop,
            step,
            level=level,
            counts=NO_LAYER_COUNTS if level is Level.FORECAST else first.last_forward_counts(),
            cached_bytes=self.nbytes,
            cached_layers=kept,
        )
        if not self.gates_cross and level is Level.FULL:
            self._report_builder.add_uncached_bytes(
                first.uncached_bytes // (2 if self._planner.plan.caches_one_half else 1)
            )
        if first.min_bytes is not None and not self.report.kept_layers:
            self._warnings.budget_too_small(first.min_bytes)
