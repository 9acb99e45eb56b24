"""The difference ahead of time, on made-up sequences, and the pace that its error sets."""

import itertools
import math

import pytest
import torch

from tgate_processors._internal.guidance.prediction import CFGDifference, largest_error, predict, relative_error
from tgate_processors._internal.plan.adaptive import MAX_HALF_STEPS, AdaptiveController, StepErrors
from tgate_processors._internal.plan.step_plan import Level


def sample(seed=0, shape=(2, 4, 5, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(sequence, *positions):
    return [CFGDifference(position, sequence(position)) for position in positions]


def off(sequence, positions, ahead):
    """Error of a prediction, relative to the right value; and that of holding the last one."""
    right = sequence(positions[-1] + ahead)
    return tuple(
        ((value - right).norm() / right.norm()).item()
        for value in (predict(known(sequence, *positions), positions[-1] + ahead), sequence(positions[-1]))
    )


SPREAD = pytest.mark.parametrize(("positions", "ahead"), [((0, 1), 1), ((0, 1), 4), ((3, 6), 2), ((2, 7), 5)])


@SPREAD
def test_what_stands_still_is_predicted_exactly(positions, ahead):
    value = sample()
    predicted = predict(known(lambda position: value, *positions), positions[-1] + ahead)
    torch.testing.assert_close(predicted, value)


@SPREAD
@pytest.mark.parametrize("rate", [0.9, 0.95])
def test_what_shrinks_is_predicted_better_than_held(positions, ahead, rate):
    value = sample()
    error, held = off(lambda position: value * rate**position, positions, ahead)
    assert error < 0.75 * held


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_what_turns_is_predicted_better_than_held(ahead):
    a, b = sample(), sample(1)

    def turning(position):
        return a * math.cos(0.15 * position) + b * math.sin(0.15 * position)

    error, held = off(turning, (4, 5), ahead)
    assert error < 0.8 * held


def test_noise_is_damped():
    error, held = off(lambda position: sample(position), (0, 1), 1)
    # Without anything in common it is better to say less.
    assert error < held
    assert predict(known(lambda position: sample(position), 0, 1), 5).norm() < sample(1).norm()


@pytest.mark.parametrize("ahead", [1, 5, 50])
@pytest.mark.parametrize("growth", [1, 3, 100])
def test_a_prediction_is_never_longer_than_the_last_difference(ahead, growth):
    def growing(position):
        return sample() * growth**position + sample(1)

    predicted = predict(known(growing, 0, 1), 1 + ahead)
    assert (predicted.flatten(1).norm(dim=1) <= growing(1).flatten(1).norm(dim=1) * (1 + 1e-5)).all()


def test_one_difference_is_held():
    value = sample()
    assert predict([CFGDifference(3, value)], 9) is value


def test_every_sample_is_predicted_by_itself():
    both = known(lambda position: sample(position), 0, 2)
    predicted = predict(both, 3)
    for row in range(2):
        alone = [CFGDifference(position, value[row : row + 1]) for position, value in both]
        torch.testing.assert_close(predicted[row : row + 1], predict(alone, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_values_in_half_precision_stay_finite(dtype):
    # Their squares do not fit into float16.
    values = known(lambda position: (sample(shape=(1, 4, 64, 64)) * 900 * 0.9**position).to(dtype), 0, 1)
    predicted = predict(values, 2)
    assert predicted.dtype is dtype
    assert predicted.isfinite().all()
    assert relative_error(predicted, values[1].value, values[0].value, 7.5).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 3, 8, 8), (2, 3, 4, 8, 8), (3, 77, 16)])
def test_shapes_of_pictures_videos_and_tokens(shape):
    values = known(lambda position: sample(position, shape), 0, 1)
    assert predict(values, 2).shape == shape
    assert relative_error(predict(values, 2), values[1].value, values[0].value, 3.0).shape == shape[:1]


def test_zeros_are_predicted_as_zeros():
    values = known(lambda position: torch.zeros(1, 4, 8, 8), 0, 1)
    assert torch.equal(predict(values, 2), values[0].value)
    assert relative_error(values[0].value, values[1].value, values[1].value, 3.0).item() == 0


def test_the_error_is_that_of_the_guided_output():
    unconditional, difference = sample(), sample(1)
    predicted = difference + 0.1 * sample(2)
    scale = 6.0
    right, wrong = unconditional + scale * difference, unconditional + scale * predicted
    expected = (wrong - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
    torch.testing.assert_close(relative_error(predicted, difference, right, scale), expected)
    frames = torch.full((2, 4, 1, 1), scale)
    torch.testing.assert_close(relative_error(predicted, difference, right, frames), expected)


def plan(tolerance, errors, interval=1):
    """
    Full steps of a run, `F`, and half steps, `.`; the errors are those of the full steps from the third on.

    A cache repeats all steps, `r`, but each `interval`-th.
    """
    pace, steps, left = AdaptiveController(tolerance), "", list(errors)
    while left or pace.next_level(25) is Level.HALF:
        level = pace.next_level(25)
        if len(steps) % interval:
            steps += "r"
            pace.end_step(Level.HALF, computed=False)
        elif level is Level.HALF:
            steps += "."
            pace.end_step(level)
        else:
            pace.end_step(level, StepErrors(None if steps.count("F") < 2 else left.pop(0)))
            steps += "F"
    return steps


def test_the_gap_grows_while_the_prediction_is_right():
    assert plan(0.2, [0.0] * 6) == "FFF.F..F...F....F....F...."
    assert MAX_HALF_STEPS == 4


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(2, "FrFrFrFr.rFr.rFr.r.r"), (3, "FrrFrrFrrFrr.rrFrr.rrF"), (6, "FrrrrrFrrrrrFrrrrrFrrrrr.rrrrrF")],
)
def test_a_gap_of_two_steps_or_more_has_one_that_is_computed(interval, steps):
    made = plan(0.2, [0.0] * 6, interval)
    assert made[: len(steps)] == steps, made


def test_a_prediction_that_is_too_far_off_closes_the_gap():
    assert plan(0.2, [0.1, 0.1, 0.1, 0.5, 0.1]) == "FFF.F..F...FF."


def test_between_once_and_twice_the_tolerance_the_gap_shrinks():
    assert plan(0.2, [0.1, 0.1, 0.1, 0.3, 0.3, 0.3]) == "FFF.F..F...F..F.F"


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.4])
def test_what_is_no_number_or_too_large_keeps_every_step_full(error):
    assert plan(0.2, [error] * 4) == "FFFFFF"


def test_a_tolerance_of_zero_keeps_every_step_full():
    assert plan(0.0, [0.0] * 4) == "FFFFFF"


def parts_of_guidance(number, seed=0):
    """Parts of guidance as computed, and a forecast of them that is off, one after the other."""
    computed = sample(seed, (2 * number, 4, 5, 3))
    off = torch.linspace(0.1, 1, number).repeat_interleave(2).view(-1, 1, 1, 1) * sample(seed + 1, computed.shape)
    return computed + off, computed


@pytest.mark.parametrize("scale", [0.0, 1.5, 7.0])
def test_no_sum_of_parts_is_off_by_more_than_the_bound(scale):
    forecast, computed = parts_of_guidance(3)
    error = largest_error(forecast, computed, 3, scale)
    length = torch.stack([part.flatten(1).norm(dim=1) for part in computed.chunk(3)]).amax(0)
    off = (forecast - computed).chunk(3)
    ratios = []
    for start, first, second in itertools.product(range(3), repeat=3):
        total = off[start] + scale * (off[first] - off[second])
        ratios.append(total.flatten(1).norm(dim=1) / length)
    ratio = torch.stack(ratios).amax(0)
    assert (ratio <= error * (1 + 1e-5)).all()
    # It is a bound that some sum comes near to.
    assert (ratio > 0.6 * error).all()


def test_an_error_that_all_parts_share_is_no_error_of_guidance():
    _, computed = parts_of_guidance(3)
    shared = sample(5).repeat(3, 1, 1, 1)
    torch.testing.assert_close(
        largest_error(computed + shared, computed, 3, 7.0),
        largest_error(computed + shared, computed, 3, 0.0),
    )


def test_a_single_part_has_its_own_error_whatever_the_scale():
    forecast, computed = parts_of_guidance(1)
    own = (forecast - computed).flatten(1).norm(dim=1) / computed.flatten(1).norm(dim=1)
    for scale in (1.0, 7.0):
        torch.testing.assert_close(largest_error(forecast, computed, 1, scale), own)


def test_every_sample_has_its_own_bound():
    forecast, computed = parts_of_guidance(2)
    forecast[0::2] = computed[0::2]
    error = largest_error(forecast, computed, 2, 7.0)
    assert error[0] == 0
    assert error[1] > 0
