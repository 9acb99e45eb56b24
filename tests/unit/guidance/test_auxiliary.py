"""Further calls of a step, without a pipeline."""

import torch

from tgate_processors._internal.guidance.auxiliary import AuxiliaryCalls


def seen(positions, settings="stg"):
    """Further calls of which one has run in these passes."""
    calls = AuxiliaryCalls()
    for position in positions:
        output = torch.full((1, 4), float(position))
        calls.record(position, settings, output, [output], [1.0])
        calls.end_pass()
    return calls


def test_a_call_is_forecast_by_the_line_through_its_last_two():
    assert torch.equal(seen([0, 1]).skip(3, "stg", lambda output: [output]), torch.full((1, 4), 3.0))


def test_a_call_with_other_settings_is_not_the_same_one():
    calls = seen([0, 1])
    assert calls.skip(2, "modality", lambda output: [output]) is None
    output = torch.zeros(1, 4)
    calls.record(2, "modality", output, [output], [1.0])
    assert not calls.can_forecast(measures_errors=True)


def test_what_a_computed_pass_does_not_call_is_forgotten():
    calls = seen([0, 1])
    calls.end_pass()
    assert not calls.are_expected
    assert calls.nbytes == 0


def test_what_a_pass_leaves_out_is_not_forgotten():
    calls = seen([0, 1])
    calls.skip(2, "stg", lambda output: [output])
    calls.end_pass()
    assert calls.are_expected
    assert calls.nbytes == 2 * 4 * 4
