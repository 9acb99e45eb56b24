"""The warnings of a run, each given once: what stays ungated, what comes too late and what did not happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..attention.state import TGateState
from ..denoiser.inputs import differs
from ..logs import logger
from ..plan.adaptive import MIN_HISTORY
from ..plan.forward_plan import ForwardContext
from ..plan.report import TGateReport
from ..plan.step_plan import Action, Phase, StepPlan
from ..plan.steps import StepCounter
from .call import PipelineCall


class PromptEmbedsWatcher:
    """The text embeddings of a run, watched when what is reused was made with them."""

    def __init__(self) -> None:
        self._before: Any = None

    def is_exchanged(self, text: Any, phase: Callable[[], Phase], *, at_gate: bool) -> bool:
        """
        Whether embeddings differ from those of the step before, in a step that reuses something.

        Args:
            text (`torch.Tensor` or a list): The embeddings.
            phase (`Callable`): Gives the phase of the step.
            at_gate (`bool`): Whether to compare in steps that cache something, too.
        """
        before, self._before = self._before, text
        # With another batch it is guidance that was switched, and not the prompt.
        if before is None or text is None or before is text or len(before) != len(text):
            return False
        now = phase()
        watched = now is Phase.FIDELITY_IMPROVING or (at_gate and now in (Phase.GATE, Phase.FORECAST))
        return watched and differs(before, text)


class RunWarnings:
    """
    The warnings of a run, and the record of it for those that come at its end.

    Args:
        state (`TGateState`): What the gates of the pipeline share, and the warnings that were given.
        call (`PipelineCall`): What the pipeline reports.
        gates_cross (`bool`): Whether cross-attention is gated.
        joint (`bool`): Whether the family has joint attention.

    Attributes:
        text (`PromptEmbedsWatcher`): The text embeddings.
    """

    def __init__(self, state: TGateState, call: PipelineCall, *, gates_cross: bool, joint: bool) -> None:
        self.text = PromptEmbedsWatcher()
        self._state = state
        self._call = call
        self._gates_cross = gates_cross
        self._joint = joint
        # Whether any step was to reuse something, was full only because of an exchange, and had layers without a gate.
        self._expected_reuse = self._lost_reuse = self._has_ungated = False

    def on_step_planned(self, step: StepPlan, context: ForwardContext) -> None:
        """A step is planned: note whether it is to reuse anything, and whether an exchange prevents that."""
        reuses = self._gates_cross and step.cross_attention is Action.REUSE
        self._expected_reuse = self._expected_reuse or reuses or step.self_attention is Action.REUSE
        if context.cache_invalidated:
            may_skip = step.phase is Phase.FIDELITY_IMPROVING or bool(self._state.schedule.tolerance)
            self._lost_reuse = self._lost_reuse or reuses or (context.splits_guidance and may_skip)

    def finish(self, report: TGateReport, *, completed: bool) -> None:
        """The call has ended: warn of what did not happen in it."""
        self.text = PromptEmbedsWatcher()
        reused = report.cross_attention_reused + report.self_attention_reused
        too_little = report.cross_attention_layers > report.kept_layers == 0
        gated = reused or report.half_batch_forwards or report.prediction_errors or report.forecast_errors
        ran = report.num_inference_steps > 0
        expected = self._expected_reuse or not (ran or self._call.timesteps.has_no_steps)
        if completed and self._lost_reuse and not gated:
            warn_exchanged_in_every_step(self._state, self._call)
        elif completed and expected and not (reused or too_little):
            halved, has_ungated = report.half_batch_forwards > 0, self._has_ungated
            warn_nothing_gated(self._call, steps_seen=ran, halved=halved, has_ungated=has_ungated)

    def ungated(self, names: Sequence[str]) -> None:
        """Warn of layers without a gate, which leave the batch whole; `names` is empty if that is known."""
        self._has_ungated = True
        if names:
            warn_ungated_processors(self._state, self._call, names)

    def no_cfg(self) -> None:
        """The loop begins: warn if nothing can be gated in it, because guidance is off."""
        schedule = self._state.schedule
        intervals = max(schedule.sp_interval, schedule.fi_interval) > 1
        needs_guidance = schedule.is_auto or not (self._gates_cross or intervals)
        if needs_guidance and not self._call.do_cfg_ever():
            warn_no_cfg(self._state, self._call, gates_cross=self._gates_cross, joint=self._joint)

    def gate_too_late(self, loop: StepCounter) -> None:
        """The first step has ended: warn of what the settings make impossible."""
        warn_gate_too_late(self._state, self._call, loop, gates_cross=self._gates_cross)

    def cache_owns_cfg(self) -> None:
        """Warn that another cache owns guidance."""
        if self._call.do_cfg_now() and self._state.warn_once("guidance stays"):
            logger.warning(
                "T-GATE: FasterCache leaves out half of the guidance of %s itself, and T-GATE leaves that to it: %s.",
                self._call.pipeline_name,
                "only cross-attention is reused" if self._gates_cross else "guidance alone is gated, so nothing is",
            )

    def text_exchanged(self, loop: StepCounter) -> None:
        """Warn that new text embeddings have no effect."""
        if self._state.warn_once("exchanged"):
            logger.warning(
                "T-GATE: the text embeddings were exchanged in step %s, after the gate: cross-attention still "
                "reuses the outputs for the old ones. Exchange them before gate_step=%s, or pass a later gate_step.",
                loop.step_index,
                loop.gate_step,
            )

    def budget_too_small(self, least: int) -> None:
        """Warn that the budget is too small for any layer."""
        if self._state.warn_once("nothing fits"):
            logger.warning(
                "T-GATE: max_memory=%s is too little to keep any cross-attention of this call of %s: the first layer "
                "needs %s bytes. All of it is computed in every step.",
                self._state.max_memory,
                self._call.pipeline_name,
                least,
            )


def warn_gate_too_late(state: TGateState, call: PipelineCall, loop: StepCounter, *, gates_cross: bool) -> None:
    """Warn once of what the settings make impossible."""
    gate, steps = loop.gate_step, loop.timeline.steps
    stays = ["cross-attention is always computed"] if gates_cross else []
    stays += ["guidance stays on"] if call.do_cfg_now() else []
    fixed = not (state.schedule.is_auto or state.schedule.levels)
    if stays and gate >= steps and fixed and state.warn_once("late"):
        logger.warning(
            "T-GATE: gate_step=%s is not before the last of the %s steps that run: %s. Give a smaller gate_step, or a "
            "share of the steps such as gate_step=0.4.",
            gate,
            steps,
            " and ".join(stays),
        )
    _warn_too_short(state, call, loop)
    exchange = call.embeds_swap_step()
    # Where guidance is predicted, the new ones get a full step.
    stale = gates_cross and not (state.schedule.predicts and call.do_cfg_now())
    if stale and exchange is not None and gate <= exchange < steps and state.warn_once("exchange"):
        logger.warning(
            "T-GATE: %s exchanges its text embeddings in step %s, after gate_step=%s: the new ones never enter the "
            "picture. Give a gate_step above %s.",
            call.pipeline_name,
            exchange,
            gate,
            exchange,
        )


def _warn_too_short(state: TGateState, call: PipelineCall, loop: StepCounter) -> None:
    """Warn once of a call that has no steps but those which `gate_step="auto"` computes in full."""
    guided, schedule = call.do_cfg_ever(), state.schedule
    # The last one is not forecast, and half steps need guidance.
    too_short = 0 < loop.timeline.passes <= MIN_HISTORY + (1 if guided else 2)
    saves = schedule.is_auto and schedule.tolerance and (guided or schedule.forecast)
    if saves and too_short and loop.timeline.is_reported and state.warn_once("short"):
        logger.warning(
            'T-GATE: nothing is gated in the %s steps of this call of %s: with gate_step="auto" the first three %s '
            "full. Take 10 steps or more.",
            loop.timeline.steps,
            call.pipeline_name,
            "are" if guided else "and the last one are",
        )


def warn_exchanged_in_every_step(state: TGateState, call: PipelineCall) -> None:
    """Warn once of a call in which exchanges left no step that could reuse anything."""
    if state.warn_once("in vain"):
        logger.warning(
            "T-GATE: nothing was gated in this call of %s: its step callback gives other latents, or its text is "
            "exchanged, so often that all its steps are full ones. Change them in fewer steps, or call "
            "remove_tgate(pipe): T-GATE gains nothing here.",
            call.pipeline_name,
        )


def warn_no_cfg(state: TGateState, call: PipelineCall, *, gates_cross: bool, joint: bool = False) -> None:
    """Warn once that there is no guidance, where nothing else is gated."""
    if state.warn_once("unguided"):
        remedies = ["gate_step as a number of steps"] if state.schedule.is_auto else []
        remedies += [] if gates_cross else ["cross_attention=True"]
        remedy = f"Give {' and '.join(remedies)} to reuse cross-attention alone."
        logger.warning(
            "T-GATE: %s, and this call of %s has no guidance in which half of the batch could be left out: nothing is "
            "gated. %s",
            'gate_step="auto" is set by the error of predicted guidance' if gates_cross else "guidance alone is gated",
            call.pipeline_name,
            f"It guides with {call.cfg_hint}." if joint else remedy,
        )


def warn_ungated_processors(state: TGateState, call: PipelineCall, names: Sequence[str]) -> None:
    """Warn once that layers without a gate leave the batch whole."""
    if state.warn_once("left alone"):
        logger.warning(
            "T-GATE: %s attention layers (first: %s) have a custom processor that is not gated, because it may mix the "
            'samples of a batch or count its calls%s. Call apply_tgate(pipe, custom_processors="gate") if yours does '
            "neither.",
            len(names),
            names[0].removesuffix(".processor"),
            ", so guidance is kept in full" if call.do_cfg_now() else "",
        )


def warn_nothing_gated(
    call: PipelineCall, *, steps_seen: bool, halved: bool = False, has_ungated: bool = False
) -> None:
    """Warn of a call in which no layer reused anything, where it should have."""
    what = "no attention layer reused anything" if halved else "nothing was gated"
    why = "its attention layers do not call their processors" if steps_seen else "its steps were not seen"
    if has_ungated:
        why = "its attention processors are not gated"
    stands = "Guidance alone was gated." if halved else "The picture is that without T-GATE."
    logger.warning("T-GATE: %s in this call of %s: %s. %s", what, call.pipeline_name, why, stands)


def raise_uncached_layers(layers: Sequence[str], what: str) -> None:
    """Raise an error for cross-attention layers that do not reuse a cached output while one half is skipped."""
    if layers:
        raise ValueError(
            f"T-GATE: {len(layers)} cross-attention layers, {layers[0].removesuffix('.processor')} among them, "
            f"{what}. Their processors are not called: was `Attention.forward` replaced (Prompt-to-Prompt, "
            "MasaCtrl), or are they skipped by another cache? Undo that, or call remove_tgate(pipe) to use this "
            "pipeline."
        )
