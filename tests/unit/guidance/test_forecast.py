"""The forecast of an output: from made-up tensors."""

import pytest
import torch

from tests.zoo.case import seeded
from tgate_processors._internal.guidance.forecast import Output, OutputForecaster, extrapolate


def known(function, *positions):
    return [Output(position, function(position)) for position in positions]


@pytest.mark.parametrize("positions", [(0, 1, 2), (1, 4, 9), (3, 4, 7)])
def test_what_goes_on_linearly_is_forecast_exactly(positions):
    start, slope = seeded((2, 4, 8, 8), 0), seeded((2, 4, 8, 8), 1)
    *before, position = positions
    forecast = extrapolate(known(lambda at: start + at * slope, *before), position)
    torch.testing.assert_close(forecast, start + position * slope, rtol=1e-5, atol=1e-4)


def test_one_output_is_held():
    value = seeded((1, 4, 8, 8), 0)
    assert extrapolate([Output(3, value)], 9) is value


def test_every_sample_is_forecast_by_itself():
    both = known(lambda position: seeded((2, 3, 5), position), 0, 2)
    alone = [Output(position, value[1:]) for position, value in both]
    assert torch.equal(extrapolate(both, 3)[1:], extrapolate(alone, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_computed_in_full_precision(dtype):
    values = known(
        lambda position: (seeded((1, 4, 8, 8), 0) * 3e4 * (1 + position / 8)).clamp(-5e4, 5e4).to(dtype), 0, 1
    )
    forecast = extrapolate(values, 3)
    assert forecast.dtype is dtype
    exact = values[0].value.double() + 3 * (values[1].value.double() - values[0].value.double())
    assert torch.equal(forecast, exact.to(torch.float32).to(dtype))


def test_a_variance_is_that_of_the_last_output_and_an_output_without_one_holds_no_more_than_its_parts():
    forecaster, variance = OutputForecaster(), OutputForecaster()
    for position in range(3):
        output = (seeded((2, 8, 4, 4), position),)
        forecaster.record(position, [output[0]])
        forecaster.record_template(output, [output[0]])
        variance.record(position, [output[0][:, :4]])
        variance.record_template(output, [output[0][:, :4]])
    assert forecaster.nbytes == 2 * output[0].nbytes
    assert variance.nbytes == 2 * output[0].nbytes
    made = variance.make_output(lambda made: made[0][:, :4].zero_())
    assert torch.equal(made[0][:, 4:], output[0][:, 4:])
    assert not made[0][:, :4].any()
    assert forecaster.make_output(lambda made: made[0].fill_(2))[0].unique().tolist() == [2]


def test_another_size_begins_anew_and_a_pass_counts_once():
    forecaster = OutputForecaster()
    for position, size in ((0, 4), (0, 4), (1, 4), (2, 6)):
        forecaster.record(position, [seeded((1, size), position)])
        assert forecaster.has_history is (position == 1)
    assert torch.equal(forecaster.forecast_parts(5)[0], seeded((1, 6), 2))


def test_a_buffer_that_is_written_again_is_no_part_of_it():
    forecaster, buffer = OutputForecaster(), torch.ones(1, 4)
    forecaster.record(0, [buffer])
    buffer.zero_()
    assert forecaster.forecast_parts(1)[0].all()
