"""The truth table of a forward: what it does, by its step, what is cached and what is known."""

import itertools

import pytest

from tgate_processors._internal.plan.forward_plan import (
    UNSEEN,
    CachedPart,
    CacheKey,
    ForwardContext,
    ForwardMode,
    ForwardPlan,
    plan_forward,
)
from tgate_processors._internal.plan.step_plan import Action, Phase, StepPlan

COMPUTE, STORE, REUSE = Action.COMPUTE, Action.STORE, Action.REUSE
PLANNING, GATE, IMPROVING = Phase.SEMANTICS_PLANNING, Phase.GATE, Phase.FIDELITY_IMPROVING
FULL, HALF, FIRST_CALL = ForwardMode.FULL, ForwardMode.HALF_BATCH, ForwardMode.SKIP_SECOND_CALL

SHAPE = (4, 8, 8)
# Two samples with both halves of guidance, and what a gate step has cached of them.
HALF_KEY = CacheKey(2, SHAPE, CachedPart.SECOND)
WHOLE_KEY = CacheKey(4, SHAPE, CachedPart.ALL)
SEQUENTIAL = {"calls_per_step": 2, "active_part": CachedPart.ALL, "cached": WHOLE_KEY}

# The step, what is known of the forward, and the plan: phase, cross-attention, self-attention, mode, cached part.
TABLE = {
    "planning": ((PLANNING, COMPUTE, COMPUTE), {"cached": None}, (PLANNING, COMPUTE, COMPUTE, FULL, "all")),
    "planning reuses self-attention": ((PLANNING, COMPUTE, REUSE), {}, (PLANNING, COMPUTE, REUSE, FULL, "all")),
    "gate": ((GATE, STORE, STORE), {"cached": None}, (GATE, STORE, STORE, FULL, "second half")),
    "gate of an odd batch": ((GATE, STORE, COMPUTE), {"batch_size": 3}, (GATE, STORE, COMPUTE, FULL, "all")),
    "half": ((IMPROVING, REUSE, COMPUTE), {}, (IMPROVING, REUSE, COMPUTE, HALF, "all")),
    "half that reuses self-attention": ((IMPROVING, REUSE, REUSE), {}, (IMPROVING, REUSE, REUSE, HALF, "all")),
    "nothing is cached": ((IMPROVING, REUSE, REUSE), {"cached": None}, (GATE, STORE, STORE, FULL, "second half")),
    "another size": (
        (IMPROVING, REUSE, COMPUTE),
        {"sample_shape": (4, 9, 8)},
        (GATE, STORE, COMPUTE, FULL, "second half"),
    ),
    "other samples": ((IMPROVING, REUSE, COMPUTE), {"batch_size": 6}, (GATE, STORE, COMPUTE, FULL, "second half")),
    "the other half": (
        (IMPROVING, REUSE, COMPUTE),
        {"active_part": CachedPart.FIRST},
        (GATE, STORE, COMPUTE, FULL, "first half"),
    ),
    "may not be skipped": ((IMPROVING, REUSE, REUSE), {"may_skip": False}, (GATE, STORE, STORE, FULL, "second half")),
    "self-attention afresh": (
        (IMPROVING, REUSE, REUSE),
        {"cache_invalidated": True},
        (IMPROVING, REUSE, STORE, HALF, "all"),
    ),
    "cached unseen": ((IMPROVING, REUSE, COMPUTE), {"cached": UNSEEN}, (GATE, STORE, COMPUTE, FULL, "second half")),
    "guidance alone": ((IMPROVING, REUSE, COMPUTE), {"gates_cross": False}, (IMPROVING, COMPUTE, COMPUTE, HALF, "all")),
    "unguided": (
        (IMPROVING, REUSE, COMPUTE),
        {"guided": False, "active_part": CachedPart.ALL, "cached": WHOLE_KEY},
        (IMPROVING, REUSE, COMPUTE, FULL, "all"),
    ),
    "unguided, cached unseen": (
        (IMPROVING, REUSE, COMPUTE),
        {"guided": False, "active_part": CachedPart.ALL, "cached": UNSEEN},
        (IMPROVING, REUSE, COMPUTE, FULL, "all"),
    ),
    "other parts": (
        (IMPROVING, REUSE, COMPUTE),
        {"can_skip_half": False, "active_part": CachedPart.ALL, "cached": WHOLE_KEY},
        (IMPROVING, REUSE, COMPUTE, FULL, "all"),
    ),
    "a cache may skip layers": (
        (PLANNING, COMPUTE, COMPUTE),
        {"stores_early": True, "cached": None},
        (PLANNING, STORE, COMPUTE, FULL, "second half"),
    ),
    "two calls": ((IMPROVING, REUSE, COMPUTE), SEQUENTIAL, (IMPROVING, REUSE, COMPUTE, FIRST_CALL, "all")),
    "two calls at the gate": ((GATE, STORE, COMPUTE), SEQUENTIAL, (GATE, STORE, COMPUTE, FULL, "all")),
    "two calls without guidance": (
        (IMPROVING, REUSE, COMPUTE),
        {**SEQUENTIAL, "guided": False},
        (IMPROVING, REUSE, COMPUTE, FULL, "all"),
    ),
}


def context(**given):
    return ForwardContext(
        **{
            "batch_size": 4,
            "sample_shape": SHAPE,
            "active_part": CachedPart.SECOND,
            "cached": HALF_KEY,
            **given,
        }
    )


@pytest.mark.parametrize(("step", "known", "expected"), TABLE.values(), ids=TABLE)
def test_a_forward_does_what_the_table_says(step, known, expected):
    plan = plan_forward(StepPlan(*step), context(**known))
    assert (plan.phase, plan.cross_attention, plan.self_attention, plan.mode, plan.part.value) == expected


@pytest.mark.parametrize(
    ("plan", "can_skip_half", "expected"),
    [
        (ForwardPlan(GATE, STORE, STORE, marks_cache=True), True, (COMPUTE, COMPUTE)),
        (ForwardPlan(GATE, STORE, STORE, marks_cache=True), False, (STORE, STORE)),
        (ForwardPlan(PLANNING, STORE, REUSE, marks_cache=True), True, (COMPUTE, REUSE)),
        (ForwardPlan(PLANNING, COMPUTE, STORE), True, (COMPUTE, STORE)),
    ],
)
def test_a_second_call_does_as_the_first_one_but_caches_nothing_for_half_steps(plan, can_skip_half, expected):
    assert plan.for_second_call(can_skip_half=can_skip_half) == expected


def test_no_forward_skips_a_half_that_it_may_not_or_reuses_what_does_not_fit():
    cross_of = ((PLANNING, COMPUTE), (GATE, STORE), (GATE, COMPUTE), (IMPROVING, REUSE))
    steps = [StepPlan(*each, own) for each, own in itertools.product(cross_of, Action)]
    switches = [{name: False} for name in ("guided", "can_skip_half", "may_skip", "gates_cross")]
    keys = [{"cached": key} for key in (None, HALF_KEY, WHOLE_KEY, UNSEEN, CacheKey(2, (4, 9, 8), CachedPart.SECOND))]
    more = [{"cache_invalidated": True}, {"stores_early": True}, {"calls_per_step": 2}, {}]
    for step, first, second, key in itertools.product(steps, switches + more, switches + more, keys):
        known = context(**{**first, **second, **key})
        plan = plan_forward(step, known)
        if plan.is_half_step:
            assert known.splits_guidance
            assert known.may_skip
            assert step.phase is plan.phase is IMPROVING
        if plan.cross_attention is REUSE:
            assert known.cached is not None
            assert known.cached is UNSEEN or known.cached.sample_shape == known.sample_shape
        if known.cache_invalidated:
            assert plan.self_attention is not REUSE
        if not known.gates_cross:
            assert plan.cross_attention is COMPUTE
