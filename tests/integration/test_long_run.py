"""Many calls with all that changes between them: no memory grows, and no call shows in another."""

import contextlib
import gc
import random
import tracemalloc

import diffusers
import psutil
import pytest
import torch

from tests.support.settings import apply_settings
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import with_scheduler
from tgate_processors import is_tgate_applied, remove_tgate

SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"]
SETTINGS = [
    {"gate_step": 2},
    {"gate_step": 0.5},
    {"gate_step": 3, "sp_interval": 2, "fi_interval": 2, "warm_up": 1},
    None,
]
CALL_OPTIONS = [
    {"prompts": [0]},
    {"prompts": [1, 2]},
    {"prompts": [3], "height": 32},
    {"prompts": [4], "guidance_scale": 1.0},
    {"prompts": [5], "guidance_scale": 9.0, "num_inference_steps": 5},
]


class Broken(Exception):
    pass


def break_off(pipe, step_index, timestep, callback_kwargs):
    if step_index == 2:
        raise Broken
    return callback_kwargs


def live_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_memory_is_flat_and_results_are_those_of_fresh_pipelines():
    calls, warm = 200, 60
    case = BY_NAME["pixart_alpha"]
    chance = random.Random(0)
    plans = [(chance.choice(SCHEDULERS), chance.choice(SETTINGS), chance.choice(CALL_OPTIONS)) for _ in range(calls)]

    def call(pipe, options, **more):
        return case.run(pipe, **{"num_inference_steps": 4, **options, **more})

    def fresh(scheduler, settings, options):
        pipe = with_scheduler(case.build(), scheduler)
        return call(pipe if settings is None else apply_settings(pipe, **settings), options)

    expected = {}
    for plan in plans:
        if (key := repr(plan)) not in expected:
            expected[key] = fresh(*plan)

    pipe = case.build()
    process = psutil.Process()
    tensors, traced, resident = [], [], []
    for number, (scheduler, settings, options) in enumerate(plans):
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        if settings is None:
            remove_tgate(pipe)
        else:
            apply_settings(pipe, **settings)
        if number % 10 == 0:
            with contextlib.suppress(Broken):
                call(pipe, options, callback_on_step_end=break_off)
        torch.testing.assert_close(call(pipe, options), expected[repr((scheduler, settings, options))])
        if number == warm:
            tracemalloc.start()
        if number in (warm + 20, calls - 1):
            # The same both times.
            remove_tgate(pipe)
            pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
            tensors.append(live_tensors())
            traced.append(tracemalloc.get_traced_memory()[0])
            resident.append(process.memory_info().rss)
    tracemalloc.stop()
    assert tensors[0] == tensors[1]
    # Caches of Python and of the test runner, and the allocator's slack.
    assert traced[1] - traced[0] < 512 * 1024
    assert resident[1] - resident[0] < 32 * 2**20
    remove_tgate(pipe)
    assert not is_tgate_applied(pipe)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
