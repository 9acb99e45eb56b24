"""One call of a pipeline: the steps that were seen, what the layers do in the next forward, and what they keep."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .call import Call
from .companions.deepcache import DeepCacheOrder
from .layers import Layers
from .layout import DENOISER_ARGUMENTS, Seen, unconditional_first
from .processor import UNFIT, mean_of_halves
from .report import TGateReport
from .schedule import Action, Phase, StepPlan
from .state import Signals, Slot, TGateState
from .steps import Loop

logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """An output that is kept, how often it had been written to when it was, and whether self-attention gave it."""

    tensor: torch.Tensor
    version: int | None
    is_self: bool


class Stored(NamedTuple):
    """The forward that kept cross-attention: rows of an output for each one of the batch, shape of a sample."""

    rows: int
    shape: tuple[int, ...]
    guided: bool


class Control:
    """What the ControlNet ran on in this step: how many rows, and whether they are one half of guidance."""

    def __init__(self) -> None:
        self.conditional_only = False
        self.halved = False
        self._rows = 0

    def enter(self, rows: int) -> None:
        """The ControlNet is called."""
        self._rows = rows

    def see(self, residual_rows: int | None) -> None:
        """The denoiser, on its whole batch, is given what the ControlNet gave."""
        if residual_rows is not None:
            # In `guess_mode` it sees the conditional half, and the pipeline adds zeros for the other.
            self.conditional_only = 2 * self._rows == residual_rows


class Run:
    """
    One call of a pipeline. It is made anew for every call, and nothing of it outlives the call but the report.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
        call (`Call`): What the pipeline tells.
        layers (`Layers`): The attention layers of its denoiser.
        droppable (`bool`): Whether guidance is two halves of one batch, of which one can be left out.
        by_forward (`bool`, *optional*, defaults to `False`):
            Whether the end of a forward is the tick, for pipelines without step callbacks.
        deepcache (`DeepCacheOrder`, *optional*): What has to start afresh where the batch changes.
    """

    def __init__(
        self,
        state: TGateState,
        call: Call,
        layers: Layers,
        *,
        droppable: bool,
        by_forward: bool = False,
        deepcache: DeepCacheOrder | None = None,
    ) -> None:
        self.call = call
        self.layers = layers
        self.signals = Signals()
        self.kept: dict[Slot, Kept] = {}
        self.report = TGateReport()
        self.control = Control()
        self.whole: Any = None
        self.waiting = False
        self.half = False
        self.unconditional_first = True
        self._state = state
        self._droppable = droppable
        self._by_forward = by_forward
        self._deepcache = deepcache
        self._loop: Loop | None = None
        self._last_index: int | None = None
        self._steps_before = 0
        self._ticks = 0
        self._verified = call.vouched
        self._pictures: int | None = None
        self._seen: Seen | None = None
        self._guided = False
        self._stored: Stored | None = None
        self._phase = Phase.SEMANTICS_PLANNING
        self._layer_of: dict[Slot, Any] = {}
        self._in_forward: set[Slot] = set()
        self._did: Counter[tuple[bool, bool]] = Counter()
        self._due = False
        self._text: Any = None
        self._compiled: bool | None = None
        self._compiled_slots: set[Slot] = set()
        self._lent: dict[Slot, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held in stored outputs."""
        return sum(kept.tensor.nbytes for kept in self.kept.values())

    @property
    def between_loops(self) -> bool:
        """Whether no loop is under way."""
        return self._loop is None

    def halves_next(self, shape: tuple[int, ...]) -> bool:
        """Whether the step that runs now will run on half the batch, if its latents are of this shape."""
        if self._loop is None or self._loop.over or self._stored is None:
            return False
        improving = self._loop.now.phase is Phase.FIDELITY_IMPROVING
        fits = self._stored.guided and self._stored.shape[-2:] == shape[-2:]
        return self._droppable and improving and fits and self.call.guided()

    # What the hooks of the denoiser call.

    def before_forward(self, seen: Seen, *, may_halve: bool = True) -> None:
        """
        The denoiser is called: decide what its layers do.

        Args:
            seen (`Seen`): What it is given.
            may_halve (`bool`, *optional*, defaults to `True`): Whether nobody else reads the batch after us.

        Raises:
            ValueError: If the batch is not what guidance makes it, or what layers keep is not what it takes.
        """
        loop = self._loop or self._begin()
        loop.forward()
        self.layers.check()
        guided = self.call.guided()
        if self._droppable and (loop.passes or self._by_forward):
            self._check_batch(seen, guided)
        if self._by_forward and not self.call.vouched:
            self.call.check_timestep(seen.given.get("timestep"), loop.passes)
        self._watch_text(seen.text)
        self._decide(loop.now, seen, guided, may_halve)
        self._seen, self._guided = seen, guided
        self._did.clear()
        self._in_forward.clear()
        self._lend_to_compiled()

    def after_forward(self) -> None:
        """The denoiser has given its output."""
        self.take_from_compiled()
        if self.signals.cross_attention is Action.STORE and self._seen is not None:
            rows = self._seen.batch // 2 if self.signals.averaging else self._seen.batch
            self._stored = Stored(rows, self._seen.shape, self._guided)
        if self._by_forward:
            self.tick()

    def tick(self, index: int | None = None, latents: Any = None, tensors: dict[str, Any] | None = None) -> None:
        """
        A pass of the loop has ended.

        Args:
            index (`int`, *optional*): The pipeline's number of the pass.
            latents (`torch.Tensor`, *optional*): The latents of the next one.
            tensors (`dict`, *optional*): What the pipeline has told its callback.
        """
        loop = self._loop or self._begin()
        tensors = tensors or {}
        if self._last_index is not None and index == self._last_index + 1:
            raise ValueError(
                f"T-GATE: the loop goes on with step {index} after the {index} steps that the pipeline says it has "
                "(`num_timesteps`). Call remove_tgate(pipe) to use this pipeline."
            )
        self._last_index = None
        loop.tick(index)
        self._ticks += 1
        self._look(tensors)
        self._count(loop)
        loop.follow(self.call.timeline() if not self._by_forward else loop.timeline)
        self._expect(tensors.get("latents"), latents)
        if self._ticks == 1:
            self._say_what_is_late(loop)
        if loop.over:
            self._end(loop)

    # What the gates call.

    def reused(self, slot: Slot, attn: Any, hidden_states: torch.Tensor, is_self: bool) -> torch.Tensor | None:
        """The kept output of a layer, if it fits this forward."""
        self._enter(slot, attn)
        kept = self.kept.get(slot)
        if kept is not None and kept.tensor.shape[:2] == hidden_states.shape[:2]:
            if kept.version is not None and kept.tensor._version != kept.version:
                raise ValueError(
                    f"T-GATE: what {self.layers.name_of(attn)} keeps was written to in place by somebody else. Write "
                    "to a copy of a layer's output, or call remove_tgate(pipe) to use this pipeline."
                )
            self._did[is_self, True] += 1
            return kept.tensor.clone() if _is_exposed(attn, slot) else kept.tensor
        if self.signals.half and not is_self:
            raise ValueError(f"T-GATE: in {self.layers.name_of(attn)} {UNFIT}")
        return None

    def computed(self, slot: Slot, attn: Any, output: torch.Tensor, action: Action, is_self: bool) -> None:
        """A layer has computed its output."""
        if action is not Action.REUSE:
            self._enter(slot, attn, stores=action is Action.STORE)
        self._did[is_self, False] += 1
        if action is Action.COMPUTE:
            self.kept.pop(slot, None)
            return
        tensor = mean_of_halves(output) if self.signals.averaging else output
        if tensor is output and _is_exposed(attn, slot):
            tensor = output.clone()
        self._keep(slot, tensor, is_self)

    # The call begins and ends.

    def close(self, *, completed: bool = True) -> None:
        """The call has ended, however it ended: hold nothing, leave the report."""
        self._state.report = self.report
        self.kept.clear()
        self._seen = self._text = None
        idle = self.report.cross_attention_reused + self.report.self_attention_reused == 0
        if completed and idle and (self._due or not self._ticks):
            why = "its attention layers do not call their processors" if self._ticks else "its steps were not seen"
            logger.warning(
                "T-GATE: nothing was gated in this call of %s: %s. The picture is that without T-GATE.",
                self.call.subject,
                why,
            )

    def prime(self, plan: StepPlan) -> None:
        """Wait for a forward that no hook announces."""
        self.waiting = True
        self.signals.set(plan.cross_attention, plan.self_attention)
        self._state.compiled.take(self.signals)

    def adopt(self, call: Call, layers: Layers, *, droppable: bool) -> None:
        """The first pass of a loop has run unannounced, and a callback tells whose it was."""
        self.call, self.layers, self._droppable = call, layers, droppable
        self._verified = call.vouched
        self.waiting = False
        loop = self._begin()
        loop.forward()
        self.take_from_compiled()
        if self.signals.cross_attention is Action.STORE:
            # The layers themselves see whether it fits.
            self._stored = Stored(-1, (), False)

    @property
    def gates_first_step(self) -> bool:
        """Whether the gate lies in the first step."""
        return self._loop is not None and self._loop.gate_step == 1

    def _begin(self) -> Loop:
        """A loop begins: its steps are told by now, or in its first step."""
        self._loop = loop = Loop(self._state.schedule, self.call.timeline())
        left_alone = self.layers.settle()
        if left_alone and self._droppable:
            self._droppable = False
            self._say_left_alone(left_alone)
        if self._by_forward and self._pictures is None:
            self._pictures = self.call.pictures()
        self._phase = Phase.SEMANTICS_PLANNING
        return loop

    def _end(self, loop: Loop) -> None:
        """All passes have ended. Pipelines that run their loop several times in one call start the next one here."""
        self._steps_before += loop.timeline.steps
        self._last_index = loop.last_index
        self._loop = self._stored = None
        self._pictures = None
        self.half = False
        self.signals.rest()
        self.kept.clear()

    def _decide(self, plan: StepPlan, seen: Seen, guided: bool, may_halve: bool) -> None:
        """Set what the layers do, by the plan and by what they hold."""
        half = guided and self._droppable and plan.phase is Phase.FIDELITY_IMPROVING
        averaging = guided and self._droppable and plan.phase is Phase.GATE and seen.batch % 2 == 0
        cross, own, phase = plan.cross_attention, plan.self_attention, plan.phase
        self._due = self._due or Action.REUSE in (cross, own)
        if cross is Action.REUSE and not (self._fits(seen, half, guided) and (may_halve or not half)):
            # As at the gate: the whole batch, everything computed and kept anew.
            averaging, half = half, False
            cross, phase = Action.STORE, Phase.GATE
            own = Action.STORE if own is Action.REUSE else own
        if half:
            self._prove()
        batch_changes = half and self._phase is not Phase.FIDELITY_IMPROVING
        if self._deepcache is not None and (phase is Phase.GATE or batch_changes):
            self._deepcache.restart()
        self._phase, self.half = phase, half
        self.signals.set(cross, own, averaging=averaging, half=half)

    def _fits(self, seen: Seen, half: bool, guided: bool) -> bool:
        """Whether what is kept was made for such a forward."""
        stored = self._stored
        if stored is None:
            return False
        if stored.rows < 0:
            return not half
        rows = seen.batch // 2 if half else seen.batch
        return (stored.rows, stored.shape) == (rows, seen.shape) and (stored.guided or not guided)

    def _prove(self) -> None:
        """Before a half is left out: every cross-attention holds an output."""
        missing = [name for name, slot in self.layers.expected().items() if slot not in self.kept]
        if missing:
            raise ValueError(
                f"T-GATE: {len(missing)} cross-attention layers keep no output, {missing[0].removesuffix('.processor')}"
                " among them, so no half of the batch can be left out. Their processors were not called in the gate "
                "step: was `Attention.forward` replaced (Prompt-to-Prompt, MasaCtrl), or are they skipped by another "
                "cache? Undo that, or call remove_tgate(pipe) to use this pipeline."
            )

    def _check_batch(self, seen: Seen, guided: bool) -> None:
        """Compare the batch that the denoiser gets with the pictures that there are."""
        if self._pictures is not None and seen.batch != self._pictures * (2 if guided else 1):
            raise ValueError(self._wrong_batch(seen.batch, self._pictures, guided))

    def _wrong_batch(self, batch: int, pictures: int, guided: bool) -> str:
        """What is wrong with a batch."""
        expected = pictures * (2 if guided else 1)
        ended = " Its loop seems to end guidance by itself." if guided and batch == pictures else ""
        return (
            f"T-GATE: the denoiser got a batch of {batch} for {pictures} latents with classifier-free guidance "
            f"{'on' if guided else 'off'}, where T-GATE expects {expected}: the guidance of this pipeline is not two "
            f"halves of one batch in every step.{ended} Call remove_tgate(pipe) to use it."
        )

    def _look(self, tensors: dict[str, Any]) -> None:
        """Once a run, at the end of its first step: is the batch of a loop that nobody vouches for as expected?"""
        # Not as it is now: the user's callback may have switched guidance off.
        seen, guided, latents = self._seen, self._guided, tensors.get("latents")
        if seen is None or not self._droppable:
            return
        if isinstance(latents, torch.Tensor) and seen.batch != latents.shape[0] * (2 if guided else 1):
            raise ValueError(self._wrong_batch(seen.batch, latents.shape[0], guided))
        if guided and not self._verified:
            self._verified = True
            negative, positive = self.call.told(tensors)
            self.unconditional_first = unconditional_first(
                seen, DENOISER_ARGUMENTS, negative, positive, self.call.subject
            )

    def _expect(self, before: Any, after: Any) -> None:
        """How many pictures the next forward is for."""
        latents = after if isinstance(after, torch.Tensor) else before
        if isinstance(latents, torch.Tensor):
            self._pictures = int(latents.shape[0])
        elif self._seen is not None and self._pictures is None:
            self._pictures = self._seen.batch // (2 if self._guided else 1)

    def _enter(self, slot: Slot, attn: Any, stores: bool = True) -> None:
        """A gate was called: it has to be that of one layer, and that layer has to run once in a forward."""
        if self._layer_of.setdefault(slot, attn) is not attn:
            raise ValueError(
                "T-GATE: one TGateAttnProcessor serves several attention layers: make one for each entry of "
                "`denoiser.attn_processors`."
            )
        if stores and slot in self._in_forward:
            raise ValueError(
                f"T-GATE: {self.layers.name_of(attn)} ran twice in one call of the denoiser, and one kept output does "
                "not serve both (windows of frames, tiles). Call remove_tgate(pipe) to use this pipeline."
            )
        self._in_forward.add(slot)

    def _keep(self, slot: Slot, tensor: torch.Tensor, is_self: bool) -> None:
        """Keep an output."""
        # Tensors of inference mode do not count how often they are written to.
        self.kept[slot] = Kept(tensor, None if tensor.is_inference() else tensor._version, is_self)

    def _lend_to_compiled(self) -> None:
        """Put what is reused where compiled code finds it."""
        self._state.compiled.take(self.signals)
        for slot in self._compiled_slots:
            kept = self.kept.get(slot)
            if kept is None:
                continue
            action = self.signals.self_attention if kept.is_self else self.signals.cross_attention
            if action is Action.REUSE:
                exposed = _is_exposed(self.layers.of(slot), slot)
                slot.tensor = self._lent[slot] = kept.tensor.clone() if exposed else kept.tensor
            elif action is Action.COMPUTE:
                del self.kept[slot]

    def take_from_compiled(self) -> None:
        """Take what compiled code was lent or has stored, one after the other: its next call may write to it."""
        self._state.compiled.rest()
        for slot in self._state.filled_slots():
            tensor, slot.tensor = slot.tensor, None
            if tensor is not None and self._lent.get(slot) is not tensor:
                self._compiled_slots.add(slot)
                self._keep(slot, tensor.clone(), not self.layers.is_cross(slot))
        self._lent.clear()

    def _count(self, loop: Loop) -> None:
        """Add a forward to the report."""
        cross = self._did[False, False] > 0, self._did[False, True] > 0
        own = self._did[True, False] > 0, self._did[True, True] > 0
        if self._compiled_slots or (not self._did and self._is_compiled()):
            reusing = self.signals.cross_attention is Action.REUSE, self.signals.self_attention is Action.REUSE
            cross, own = ((not reused, reused) for reused in reusing)
        report = self.report
        self.report = replace(
            report,
            num_inference_steps=self._steps_before + loop.timeline.steps,
            gate_step=loop.gate_step,
            full_batch_forwards=report.full_batch_forwards + (not self.half),
            half_batch_forwards=report.half_batch_forwards + self.half,
            cross_attention_computed=report.cross_attention_computed + cross[0],
            cross_attention_reused=report.cross_attention_reused + cross[1],
            self_attention_computed=report.self_attention_computed + own[0],
            self_attention_reused=report.self_attention_reused + own[1],
            peak_bytes=max(report.peak_bytes, self.nbytes),
        )

    def _is_compiled(self) -> bool:
        """Whether the layers lie in compiled code, from where they cannot report."""
        if self._compiled is None:
            denoiser = self.layers.denoiser
            parts = [denoiser, *getattr(denoiser, "_orig_mod", denoiser).modules()]
            self._compiled = hasattr(denoiser, "_orig_mod") or any(
                getattr(part, "_compiled_call_impl", None) is not None for part in parts
            )
        return self._compiled

    # What is said.

    def _watch_text(self, text: Any) -> None:
        """Warn once of a prompt that is exchanged when nobody reads it any more."""
        if not isinstance(text, torch.Tensor):
            return
        before, self._text = self._text, text
        loop = self._loop
        reused = loop is not None and loop.now.cross_attention is Action.REUSE
        if not reused or before is None or before is text or before.shape[0] != text.shape[0]:
            # With another batch it is guidance that was switched off, and not the prompt.
            return
        if (before.shape != text.shape or not torch.equal(before, text)) and self._state.say_once("exchanged"):
            assert loop is not None
            logger.warning(
                "T-GATE: the text embeddings were exchanged in step %s, after the gate: cross-attention goes on with "
                "the outputs of the former ones. Exchange them before gate_step=%s, or give a later gate_step.",
                loop.step_index,
                loop.gate_step,
            )

    def _say_what_is_late(self, loop: Loop) -> None:
        """Warn once of what the settings make impossible."""
        gate, steps = loop.gate_step, loop.timeline.steps
        if gate >= steps and self._state.say_once("late"):
            logger.warning(
                "T-GATE: gate_step=%s is not before the last of the %s steps that run: cross-attention is always "
                "computed%s. Give a smaller gate_step, or a share of the steps such as gate_step=0.4.",
                gate,
                steps,
                " and guidance stays on" if self.call.guided() else "",
            )
        exchange = self.call.exchanges_text_at()
        if exchange is not None and gate <= exchange < steps and self._state.say_once("exchange"):
            logger.warning(
                "T-GATE: %s exchanges its text embeddings in step %s, after gate_step=%s: the new ones never enter the "
                "picture. Give a gate_step above %s.",
                self.call.subject,
                exchange,
                gate,
                exchange,
            )

    def _say_left_alone(self, names: list[str]) -> None:
        """Warn once that the batch stays whole."""
        if self._state.say_once("left alone"):
            logger.warning(
                "T-GATE: %s attention layers, %s among them, have a processor that is not gated: they compute as "
                "without T-GATE%s, because such processors may mix the samples of a batch or count their calls. "
                'Say apply_tgate(pipe, custom_processors="gate") if yours do neither.',
                len(names),
                names[0].removesuffix(".processor"),
                ", and all of guidance stays on" if self.call.guided() else "",
            )


def _is_exposed(attn: Any, slot: Slot) -> bool:
    """Whether somebody else can write to what a layer gives out: its hooks, its callers, its own processor."""
    hooked = attn._forward_hooks or "forward" in vars(attn) or torch.nn.modules.module._global_forward_hooks
    return bool(hooked) or not slot.own
