"""What the layers do in the next forward: by the plan of its step, and by what they hold."""

from __future__ import annotations

from ..attention.state import CachedPart, TGateState
from ..caches.adapter import CacheAdapters
from ..denoiser.inputs import DenoiserInputs
from ..guidance.predictor import GuidedStepCounter
from ..plan.schedule import Action, CFGHalf, Phase, StepPlan
from .denoisers import CacheKey, DenoiserCaches

# Kept by a forward that no hook has seen. Whether it fits is for the layers to see.
UNSEEN = CacheKey(-1, (), CachedPart.ALL)


class Decision:
    """
    The decision about the forward that runs now. It sets the signals of the layers.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        experts (`DenoiserCaches`): The denoisers, and what their layers keep.
        adapters (`CacheAdapters`): The caches of others.
        cross_attention (`bool`): Whether cross-attention is gated.

    Attributes:
        half (`bool`): Whether one half of guidance is left out in the step that runs now.
        phase (`Phase`): The phase that this step is in.
        due (`bool`): Whether any step so far was to reuse something.
        stores (`bool`): Whether cross-attention is kept in it.
        lost (`bool`): Whether any step so far was a full one only because something was exchanged before it.
    """

    def __init__(
        self, state: TGateState, experts: DenoiserCaches, adapters: CacheAdapters, *, cross_attention: bool
    ) -> None:
        self._schedule = state.schedule
        self._experts = experts
        self._adapters = adapters
        self._gates_cross = cross_attention
        self._part = CachedPart.ALL
        self.due = self.lost = False
        self.begin()

    def begin(self) -> None:
        """A loop begins, or has ended."""
        self.half = self.stores = self._afresh = False
        self.phase = Phase.SEMANTICS_PLANNING

    def begin_afresh(self) -> None:
        """Nothing that was kept is there any more."""
        self._afresh = True

    @property
    def halves_batch(self) -> bool:
        """Whether the forward that runs now runs on half of the batch that the pipeline gives."""
        return self.half and self._calls == 1

    @property
    def keeps_half(self) -> bool:
        """Whether what is kept of an output is one half of its batch, or the mean of both."""
        return self._part is not CachedPart.ALL

    def halves(self, loop: GuidedStepCounter, shape: tuple[int, ...]) -> bool:
        """Whether the step that runs now will run on half the batch, if its latents are of this shape."""
        stored = self._experts.now.stored
        if loop.over or stored is None:
            return False
        improving = self._planned(loop).phase is Phase.FIDELITY_IMPROVING
        return improving and stored.part is not CachedPart.ALL and stored.shape[-2:] == shape[-2:]

    def make(
        self,
        loop: GuidedStepCounter,
        seen: DenoiserInputs,
        kept: CFGHalf,
        *,
        guided: bool,
        droppable: bool,
        may_halve: bool,
    ) -> None:
        """
        Decide about a forward, the first one of its step.

        Args:
            loop (`GuidedStepCounter`): Its loop.
            seen (`DenoiserInputs`): What the denoiser is given.
            kept (`str`): The half that a half step runs on, by its place.
            guided (`bool`): Whether guidance is on.
            droppable (`bool`): Whether guidance is two halves, of which one can be left out.
            may_halve (`bool`): Whether nobody else reads the batch after us.
        """
        self._part = self._part_kept(kept) if guided and droppable and self._calls == 1 else CachedPart.ALL
        plan = self._planned(loop)
        half = guided and droppable and plan.phase is Phase.FIDELITY_IMPROVING
        may_halve = may_halve and self._knows_guidance(loop)
        cross, own, phase = plan.cross_attention, plan.self_attention, plan.phase
        self.due = self.due or own is Action.REUSE or (self._gates_cross and cross is Action.REUSE)
        if self._afresh:
            own = Action.STORE if own is Action.REUSE else own
            reuses = half or (self._gates_cross and cross is Action.REUSE)
            self.lost = self.lost or reuses or bool(guided and droppable and self._schedule.tolerance)
            self._afresh = False
        if cross is Action.REUSE and not (self._fits(seen, half, guided) and (may_halve or not half)):
            # As at the gate: the whole batch, everything computed and kept anew.
            half = False
            cross, phase = Action.STORE, Phase.GATE
            own = Action.STORE if own is Action.REUSE else own
        early = cross is Action.COMPUTE and self._adapters.skip_the_gate and loop.may_halve
        if early:
            # Whatever layers a cache skips at the gate, what they gave before is there.
            cross = Action.STORE
        part = self._part if (phase is Phase.GATE or early) and seen.batch % 2 == 0 else CachedPart.ALL
        self.phase, self.half, self.stores = phase, half, cross is Action.STORE
        outputs = self._experts.outputs
        if not self._gates_cross:
            cross = Action.COMPUTE
        elif half:
            refuse(outputs.missing(), "keep no output, so no half of the batch can be left out")
        outputs.signals.set(cross, own, part=part, half=self.halves_batch and self._gates_cross)
        rows = seen.batch // 2 if self.halves_batch else seen.batch
        # Without guidance there is no second call either.
        left_out = half or (self._calls > 1 and not guided)
        at_gate = phase is Phase.GATE
        self._adapters.begin_step(rows, half=left_out, kept=int(kept == "conditional"), at_gate=at_gate)

    def of_second_call(self, *, droppable: bool) -> tuple[Action, Action]:
        """What cross-attention and self-attention do in the second call of a full step: as in the first one."""
        signals = self._experts.outputs.signals
        if droppable and self.phase is Phase.GATE:
            # Only half steps reuse what is kept, and there is no second call in them.
            return Action.COMPUTE, Action.COMPUTE
        cross = Action.COMPUTE if droppable and self.stores else signals.cross_attention
        return cross, signals.self_attention

    @property
    def _calls(self) -> int:
        """Calls that guidance is made of."""
        return self._experts.now.layers.layout.calls

    def _planned(self, loop: GuidedStepCounter) -> StepPlan:
        """The plan of the step that runs now."""
        return loop.planned(repeats=self._adapters.repeats(), half=self._adapters.half)

    def _knows_guidance(self, loop: GuidedStepCounter) -> bool:
        """Whether enough is known to leave a half out; a denoiser that takes over begins with full steps."""
        return loop.guidance is None or not self._experts.took_over or loop.guidance.judges

    def _part_kept(self, kept: CFGHalf) -> CachedPart:
        """What a full step keeps of an output for the half steps after it."""
        if not self._schedule.predicts and self._experts.now.layers.layout.mean:
            return CachedPart.MEAN
        return CachedPart.FIRST if kept == "unconditional" else CachedPart.SECOND

    def _fits(self, seen: DenoiserInputs, half: bool, guided: bool) -> bool:
        """Whether what is kept was made for such a forward."""
        stored = self._experts.now.stored
        if stored is None or stored is UNSEEN:
            return stored is UNSEEN and not half
        rows = seen.batch // 2 if half and self._calls == 1 else seen.batch
        return (stored.rows, stored.shape) == (rows, seen.shape) and (stored.part is self._part or not guided)


def refuse(layers: list[str], what: str) -> None:
    """Refuse cross-attention layers that go their own way while a half is left out."""
    if layers:
        raise ValueError(
            f"T-GATE: {len(layers)} cross-attention layers, {layers[0].removesuffix('.processor')} among them, "
            f"{what}. Their processors are not called: was `Attention.forward` replaced (Prompt-to-Prompt, "
            "MasaCtrl), or are they skipped by another cache? Undo that, or call remove_tgate(pipe) to use this "
            "pipeline."
        )
