"""Warnings of a run, each given once: what is left alone, what comes too late, what did not happen."""

from __future__ import annotations

from typing import Any

from ..attention.state import TGateState
from ..denoiser.inputs import is_another
from ..guidance.predictor import GuidedStepCounter
from ..logs import logger
from ..plan.schedule import Phase
from .call import PipelineCall


class PromptEmbedsWatcher:
    """
    The text embeddings of a run, watched when what is reused was made with them.

    Args:
        state (`TGateState`): What the gates of the pipeline share.
    """

    def __init__(self, state: TGateState) -> None:
        self._state = state
        self._before: Any = None

    def is_exchanged(self, text: Any, loop: GuidedStepCounter, *, at_gate: bool) -> bool:
        """
        Whether embeddings are not those of the step before, in a step that is to reuse something.

        Args:
            text (`torch.Tensor` or a list): The embeddings.
            loop (`GuidedStepCounter`): The loop.
            at_gate (`bool`): Whether to look in steps that keep something, too.
        """
        before, self._before = self._before, text
        # With another batch it is guidance that was switched, and not the prompt.
        if before is None or text is None or before is text or len(before) != len(text):
            return False
        phase = loop.planned().phase
        watched = phase is Phase.FIDELITY_IMPROVING or (at_gate and phase is Phase.GATE)
        return watched and is_another(before, text)

    def say(self, loop: GuidedStepCounter) -> None:
        """Warn once that new ones have no effect."""
        if self._state.warn_once("exchanged"):
            logger.warning(
                "T-GATE: the text embeddings were exchanged in step %s, after the gate: cross-attention still "
                "reuses the outputs for the old ones. Exchange them before gate_step=%s, or give a later gate_step.",
                loop.step_index,
                loop.gate_step,
            )

    def forget(self) -> None:
        """The call has ended."""
        self._before = None


def warn_gate_too_late(state: TGateState, call: PipelineCall, loop: GuidedStepCounter, *, gates_cross: bool) -> None:
    """Warn once of what the settings make impossible."""
    gate, steps = loop.gate_step, loop.timeline.steps
    stays = ["cross-attention is always computed"] if gates_cross else []
    stays += ["guidance stays on"] if call.guided() else []
    if stays and gate >= steps and not state.schedule.is_auto and state.warn_once("late"):
        logger.warning(
            "T-GATE: gate_step=%s is not before the last of the %s steps that run: %s. Give a smaller gate_step, or a "
            "share of the steps such as gate_step=0.4.",
            gate,
            steps,
            " and ".join(stays),
        )
    exchange = call.exchanges_text_at()
    # Where guidance is predicted, the new ones get a full step.
    stale = gates_cross and not (state.schedule.predicts and call.guided())
    if stale and exchange is not None and gate <= exchange < steps and state.warn_once("exchange"):
        logger.warning(
            "T-GATE: %s exchanges its text embeddings in step %s, after gate_step=%s: the new ones never enter the "
            "picture. Give a gate_step above %s.",
            call.subject,
            exchange,
            gate,
            exchange,
        )


def warn_exchanged_in_every_step(state: TGateState, call: PipelineCall) -> None:
    """Warn once of a call in which exchanges left no step that could reuse anything."""
    if state.warn_once("in vain"):
        logger.warning(
            "T-GATE: nothing was gated in this call of %s: its step callback gives other latents, or its text is "
            "exchanged, so often that all its steps are full ones. Change them in fewer steps, or call "
            "remove_tgate(pipe): T-GATE gains nothing here.",
            call.subject,
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
            call.subject,
            f"It guides with {call.guides_by}." if joint else remedy,
        )


def warn_budget_too_small(state: TGateState, call: PipelineCall, least: int) -> None:
    """Warn once that no layer keeps anything, because the budget is too small."""
    if state.warn_once("nothing fits"):
        logger.warning(
            "T-GATE: max_memory=%s is too little to keep any cross-attention of this call of %s: the first layer needs "
            "%s bytes. All of it is computed in every step.",
            state.max_memory,
            call.subject,
            least,
        )


def warn_ungated_processors(state: TGateState, call: PipelineCall, names: list[str]) -> None:
    """Warn once that layers without a gate leave the batch whole."""
    if state.warn_once("left alone"):
        logger.warning(
            "T-GATE: %s attention layers, %s among them, have a processor that is not gated: they compute as without "
            "T-GATE%s, because such processors may mix the samples of a batch or count their calls. Call "
            'apply_tgate(pipe, custom_processors="gate") if yours do neither.',
            len(names),
            names[0].removesuffix(".processor"),
            ", and all of guidance stays on" if call.guided() else "",
        )


def warn_cache_owns_cfg(state: TGateState, call: PipelineCall, *, gates_cross: bool) -> None:
    """Warn once that another one has the guidance."""
    if call.guided() and state.warn_once("guidance stays"):
        logger.warning(
            "T-GATE: FasterCache leaves out half of the guidance of %s itself, and T-GATE leaves that to it: %s.",
            call.subject,
            "cross-attention alone stops after the gate" if gates_cross else "guidance alone is gated, so nothing is",
        )


def warn_nothing_gated(call: PipelineCall, *, steps_seen: bool, halved: bool = False, left_alone: bool = False) -> None:
    """Warn of a call in which no layer reused anything, where it should have."""
    what = "no attention layer reused anything" if halved else "nothing was gated"
    why = "its attention layers do not call their processors" if steps_seen else "its steps were not seen"
    if left_alone:
        why = "its attention processors are left alone"
    stands = "Guidance alone was gated." if halved else "The picture is that without T-GATE."
    logger.warning("T-GATE: %s in this call of %s: %s. %s", what, call.subject, why, stands)
