"""What T-GATE adds to a run: no operation, no wait for the device, and only the memory that it announces."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.support.operations import operations
from tests.support.settings import apply_settings
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report
from tgate_processors._internal.attention.processor import mean_of_halves

# Version 2 does all that version 1 does, and more.
versions = pytest.mark.parametrize(
    "settings", [thorough({}), {"sp_interval": 2, "fi_interval": 2, "warm_up": 1}], ids=["v1", "v2"]
)
NAMES = ["sd", slow("sdxl"), "pixart_alpha", "svd", slow("sd_controlnet"), "lcm", "lcm_pixart"]


@pytest.fixture(params=NAMES)
def case(request):
    return BY_NAME[request.param]


def test_with_a_late_gate_torch_is_asked_for_the_very_same_operations(case):
    pipe = case.build()
    plain = operations(case, pipe)
    gated = operations(case, apply_tgate(pipe, 99))
    if case.name == "svd":
        # Its guidance scale is a tensor, which T-GATE asks once a call whether it guides.
        assert gated.waiting == plain.waiting + 1
    else:
        assert gated.names == plain.names


@versions
def test_gating_adds_averages_and_halves_and_no_wait(case, settings):
    pipe = case.build()
    plain = operations(case, pipe)
    gated = operations(case, apply_settings(pipe, 3, **settings))
    assert gated.waiting <= plain.waiting + (case.name == "svd")
    more = Counter(gated.names) - Counter(plain.names)
    asked = {"aten._local_scalar_dense.default", "aten.max.default", "aten.gt.Scalar"} if case.name == "svd" else set()
    assert set(more) <= {"aten.slice.Tensor", "aten.lerp.Scalar", "aten.cat.default"} | asked
    # One for each half batch: its output is given back as both halves.
    assert more["aten.cat.default"] == get_tgate_report(pipe).half_batch_forwards


def peak_bytes(function):
    """Most bytes that torch held at a time, above those that it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def nothing(pipe, step_index, timestep, callback_kwargs):
    return callback_kwargs


@versions
@pytest.mark.parametrize(
    ("name", "guidance_scale"), [("sd", 5.0), ("sd", 1.0), thorough("sd_inpaint", 5.0), ("pixart_alpha", 4.5)]
)
def test_the_peak_is_that_of_the_plain_run_and_the_announced_bytes(name, guidance_scale, settings):
    case = BY_NAME[name]
    pipe = case.build()
    # A callback makes the pipeline keep a latent longer.
    options = {"callback_on_step_end": nothing} if case.has_callback else {}

    def run():
        case.run(pipe, guidance_scale=guidance_scale, **options)

    run()
    plain = peak_bytes(run)
    apply_settings(pipe, 3, **settings)
    run()
    gated, announced = peak_bytes(run), get_tgate_report(pipe).peak_bytes
    assert 0 < announced < plain
    assert gated <= plain + announced


@pytest.mark.parametrize("name", ["sd", "pixart_alpha"])
def test_after_the_gate_a_forward_works_with_the_memory_of_a_run_without_guidance(name):
    case = BY_NAME[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    forward, taken = denoiser.forward, []

    def measured(*args, **kwargs):
        result = []
        taken.append(peak_bytes(lambda: result.append(forward(*args, **kwargs))))
        return result[0]

    denoiser.forward = measured

    def working_sets(**options):
        case.run(pipe, **options)
        sets, taken[:] = list(taken), []
        return sets

    guided, unguided = working_sets(), working_sets(guidance_scale=1.0)
    apply_tgate(pipe, 3, custom_forwards="gate")
    gated = working_sets()
    assert max(unguided) < max(guided)
    assert max(gated[:2]) == max(guided)
    assert max(gated[3:]) <= max(unguided)


def test_the_average_needs_no_more_than_itself():
    output = torch.randn(4, 64, 32)
    torch.testing.assert_close(mean_of_halves(output), output.view(2, 2, 64, 32).mean(0))
    assert peak_bytes(lambda: mean_of_halves(output)) == output.nbytes // 2


@versions
def test_what_is_kept_keeps_nothing_larger_alive(case, settings):
    pipe = apply_settings(case.build(), 3, **settings)
    denoiser = getattr(pipe, case.denoiser)
    kept = []

    def after(module, args, output):
        for each in vars(pipe)["_tgate"].state.current().attention_cache.cached.values():
            kept.append((each.tensor.nbytes, each.tensor.untyped_storage().nbytes(), each.tensor.requires_grad))

    denoiser.register_forward_hook(after)
    case.run(pipe)
    assert kept
    assert all(nbytes == storage and not trains for nbytes, storage, trains in kept)
