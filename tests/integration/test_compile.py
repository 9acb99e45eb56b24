"""A gated denoiser compiles without a graph break: a graph each for compute, store and reuse, and none later."""

import contextlib
import copy
import itertools
import math
import sys
import threading

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from torch._dynamo.testing import CompileCounter

from examples.benchmarks.cost_table import load_denoiser
from examples.benchmarks.random_pipelines import narrowed, random_inputs, random_pipeline
from tests.support.compiling import compile_blocks, compile_in_place, exchange_for_compiled
from tests.support.settings import apply_settings
from tests.zoo.case import quiet, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report, remove_tgate
from tgate_processors._internal.install.recompile_limit import RaisedRecompileLimit, restore_recompile_limit

SLOW = pytest.mark.slow


@contextlib.contextmanager
def room_for_graphs():
    room = RaisedRecompileLimit()
    room.open()
    yield
    room.close()


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()
    restore_recompile_limit()


def other_calls(case):
    """Calls that compiled code has to serve as it is."""
    guided = case.guidance and case.guidance > 1 and case.name not in ("lcm", "turbo")
    return [{}, {"num_inference_steps": 9}, {"prompts": [1]}, *([{"guidance_scale": 2.5}] if guided else [])]


@pytest.mark.slow
@pytest.mark.thorough
def test_other_latents_of_a_callback_are_computed_anew():
    case = BY_NAME["sd"]

    def resample(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"][[0, 0]]} if step == 4 else {}

    def run():
        latents = case.run(pipe, [0, 1], num_inference_steps=12, callback_on_step_end=resample)
        return latents, get_tgate_report(pipe)

    pipe = apply_tgate(case.build(), TGateSchedule(8, sp_interval=6, fi_interval=2))
    expected, report = run()
    compile_in_place(pipe, case, "eager")
    latents, told = run()
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    assert told == report


@pytest.mark.parametrize("name", ["pixart_alpha", *map(thorough, ("sd", "sdxl", "lora", "ip_adapter"))])
def test_three_graphs_and_none_for_other_prompts_steps_and_scales(name):
    case = BY_NAME[name]
    pipe = apply_tgate(case.build(), 3)
    expected = [case.run(pipe, **call) for call in other_calls(case)]
    counter = CompileCounter()
    compile_in_place(pipe, case, counter)
    torch.testing.assert_close(case.run(pipe), expected[0])
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for call, plain in zip(other_calls(case), expected, strict=True):
            torch.testing.assert_close(case.run(pipe, **call), plain)
    assert counter.frame_count == 3


@SLOW
@pytest.mark.parametrize(
    "settings", [[{}], [{"tolerance": math.inf}, {"gate_step": "FFFF-F--FHFH"}]], ids=["one", "two"]
)
def test_a_warm_up_plan_makes_all_the_graphs_that_later_requests_need(settings):
    case = BY_NAME["pixart_alpha"]
    base = case.build()
    pipes = [copied(base) for _ in settings]
    counter = CompileCounter()
    compile_in_place(base, case, counter)
    for pipe in pipes:
        apply_tgate(pipe, "FFHH")
    with room_for_graphs():
        for pipe, prompts in itertools.product(pipes, ([0], [0, 1])):
            case.run(pipe, prompts, num_inference_steps=4)
        made = counter.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            for pipe, given in zip(pipes, settings, strict=True):
                apply_tgate(pipe, **given)
            for pipe, prompts in itertools.product(pipes, ([1], [1, 0])):
                case.run(copied(pipe), prompts, num_inference_steps=12)
                assert get_tgate_report(pipe).num_inference_steps != 12
    assert counter.frame_count == made > 1


def copied(pipe):
    """A copy for a call that overlaps with others."""
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other


# The transformer stands for all: it compiles in a fifth of the time. Compiled in place it is in the test above.
@pytest.mark.parametrize(
    ("name", "compile_it", "compiled_first"),
    [
        pytest.param("pixart_alpha", exchange_for_compiled, True, marks=SLOW),
        pytest.param("pixart_alpha", compile_in_place, False, marks=SLOW),
        pytest.param("pixart_alpha", compile_blocks, False, marks=SLOW),
        pytest.param("pixart_alpha", compile_in_place, True, marks=SLOW),
        thorough("pixart_alpha", exchange_for_compiled, False),
        pytest.param("pixart_alpha", compile_blocks, True, marks=SLOW),
        thorough("sd", exchange_for_compiled, True),
        pytest.param("sd", compile_blocks, False, marks=SLOW),
    ],
)
def test_applied_before_or_after_and_removed(name, compile_it, compiled_first):
    case = BY_NAME[name]
    pipe = case.build()
    baseline, expected = case.plain(), case.gated(3)
    counter = CompileCounter()
    if compiled_first:
        compile_it(pipe, case, counter)
        torch.testing.assert_close(case.run(pipe), baseline)
        apply_tgate(pipe, 3)
    else:
        apply_tgate(pipe, 3)
        compile_it(pipe, case, counter)
    for _ in range(2):
        torch.testing.assert_close(case.run(pipe), expected)
    remove_tgate(pipe)
    torch.testing.assert_close(case.run(pipe), baseline)
    graphs = counter.frame_count
    torch.testing.assert_close(case.run(apply_tgate(pipe, 3)), expected)
    torch.testing.assert_close(case.run(remove_tgate(pipe)), baseline)
    assert counter.frame_count == graphs
    if compile_it is not compile_blocks:
        assert graphs == 4


@pytest.mark.parametrize("name", [pytest.param("sd", marks=SLOW), pytest.param("sdxl", marks=SLOW), "pixart_alpha"])
def test_compiled_blocks_have_three_graphs_for_each_that_they_have_without(name):
    case = BY_NAME[name]
    pipe = case.build()
    compile_blocks(pipe, case, plain := CompileCounter())
    case.run(pipe)
    torch._dynamo.reset()
    pipe = apply_tgate(case.build(), 3)
    expected = [case.run(pipe, **call) for call in other_calls(case)]
    compile_blocks(pipe, case, counter := CompileCounter())
    torch.testing.assert_close(case.run(pipe), expected[0])
    assert plain.frame_count < counter.frame_count <= 3 * plain.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for call, uncompiled in zip(other_calls(case), expected, strict=True):
            torch.testing.assert_close(case.run(pipe, **call), uncompiled)


def narrow_sd15():
    """SD-1.5's blocks are of three widths, with a graph each."""
    pipe = random_pipeline(narrowed(load_denoiser("sd15")), torch.device("cpu"), torch.float32)
    inputs = random_inputs(pipe, 1, 128, 4)

    def call(guidance_scale, **more):
        generator = torch.Generator().manual_seed(0)
        return pipe(**inputs, guidance_scale=guidance_scale, generator=generator, **more).images

    return pipe, call


@SLOW
def test_there_is_room_for_three_times_the_graphs():
    limit = torch._dynamo.config.recompile_limit
    pipe, call = narrow_sd15()
    compile_blocks(pipe, BY_NAME["sd"], plain := CompileCounter())
    call(5.0), call(1.0)
    assert plain.frame_count == 6 <= limit
    torch._dynamo.reset()
    pipe, call = narrow_sd15()
    apply_tgate(pipe, 2)
    expected = [call(5.0), call(1.0)]
    compile_blocks(pipe, BY_NAME["sd"], counter := CompileCounter())
    torch.testing.assert_close(call(5.0), expected[0])
    assert counter.frame_count == 9 > limit
    torch.testing.assert_close(call(1.0), expected[1])
    assert counter.frame_count <= 3 * plain.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(call(5.0), expected[0])
    # The most of one function.
    assert limit < torch._dynamo.config.recompile_limit <= limit + counter.frame_count


# The limit itself has a default test, with a function alone.
@pytest.mark.slow
@pytest.mark.parametrize("whose", ["removed", "sibling"])
def test_calls_without_tgate_have_room_for_their_graphs_beside_those_that_tgate_made(whose):
    case = BY_NAME["pixart_alpha"]
    pipe = case.build()
    expected = [case.plain(), case.run(pipe, [0, 1])]
    apply_tgate(pipe, 3)
    compile_in_place(pipe, case, counter := CompileCounter())
    with torch._dynamo.config.patch(recompile_limit=2):
        case.run(pipe)
        other = remove_tgate(pipe) if whose == "removed" else quiet(type(case.build()).from_pipe(pipe))
        for prompts, plain in zip(([0], [0, 1]), expected, strict=True):
            torch.testing.assert_close(case.run(other, prompts), plain)
    assert counter.frame_count > 3


def test_the_limit_stays_higher_by_the_graphs_that_there_are_in_every_thread_and_as_long_as_they_are():
    limits = []

    def tell():
        limits.append(torch._dynamo.config.recompile_limit)

    def elsewhere(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    def make_graphs():
        add = torch.compile(lambda tensor, number: tensor + number, backend="eager", dynamic=False)
        with room_for_graphs(), room_for_graphs():
            for number in range(12):
                add(torch.ones(1), number)

    elsewhere(tell)
    elsewhere(make_graphs)
    elsewhere(tell)
    elsewhere(make_graphs)
    elsewhere(tell)
    restore_recompile_limit()
    elsewhere(tell)
    torch._dynamo.reset()
    restore_recompile_limit()
    elsewhere(tell)
    assert limits == [limits[0] + more for more in (0, 12, 12, 12, 0)]


class Broken(Exception):
    pass


def test_the_limit_on_graphs_is_the_users_again_whatever_happens():
    limit = torch._dynamo.config.recompile_limit
    pipe, call = narrow_sd15()
    inner, call_inner = narrow_sd15()
    apply_tgate(pipe, 2), apply_tgate(inner, 2)
    seen = []

    def on_step_end(pipeline, step_index, timestep, callback_kwargs):
        seen.append(torch._dynamo.config.recompile_limit)
        call_inner(5.0)
        if step_index == 1:
            raise Broken
        return callback_kwargs

    with pytest.raises(Broken):
        call(5.0, callback_on_step_end=on_step_end)
    assert len(set(seen)) == 1
    assert seen[0] >= 3 * limit
    assert torch._dynamo.config.recompile_limit == limit


def test_interrupts_do_not_add_up_in_the_limit():
    limit = torch._dynamo.config.recompile_limit
    lines = range(200)
    for where in ("open", "close"):
        for line in lines:
            room = RaisedRecompileLimit()
            left = [line]

            def trace(frame, event, arg, left=left):
                if frame.f_code.co_filename != sys.modules[RaisedRecompileLimit.__module__].__file__:
                    return None
                left[0] -= event == "line"
                if left[0] < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace

            if where == "close":
                room.open()
            sys.settrace(trace)
            try:
                room.open() if where == "open" else room.close()
            except KeyboardInterrupt:
                pass
            else:
                break
            finally:
                sys.settrace(None)
                room.close()
            assert torch._dynamo.config.recompile_limit == limit
    assert line > 5


def test_an_interrupt_before_there_is_room_leaves_the_limit_where_others_have_compiled():
    limit = torch._dynamo.config.recompile_limit
    add = torch.compile(lambda tensor, number: tensor + number, backend="eager", dynamic=False)
    for number in range(3):
        add(torch.ones(1), number)
    RaisedRecompileLimit().close()
    assert torch._dynamo.config.recompile_limit == limit


def test_calls_that_overlap_leave_the_limit_as_it_was():
    limit = torch._dynamo.config.recompile_limit
    entered, left = threading.Event(), threading.Event()
    seen = []

    def first():
        with room_for_graphs():
            entered.set()
            left.wait(600)

    def second():
        entered.wait(600)
        with room_for_graphs():
            seen.append(torch._dynamo.config.recompile_limit)
            left.set()
            threads[0].join()
        seen.append(torch._dynamo.config.recompile_limit)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] >= 9 * limit
    assert seen[1] == limit
    assert torch._dynamo.config.recompile_limit == limit


@SLOW
def test_self_attention_at_intervals_needs_a_graph_for_each_pair_of_actions():
    case = BY_NAME["pixart_alpha"]
    pipe = apply_tgate(case.build(), TGateSchedule(10, sp_interval=5, warm_up=2))
    expected = case.run(pipe, num_inference_steps=25)
    compile_in_place(pipe, case, counter := CompileCounter())
    torch.testing.assert_close(case.run(pipe, num_inference_steps=25), expected)
    assert counter.frame_count == 5
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(case.run(pipe, num_inference_steps=25), expected)


class BorrowedMemory:
    """A backend whose outputs last until its next call, as those of CUDA graphs do."""

    def __init__(self):
        self.given = []

    def __call__(self, graph, example_inputs):
        def run(*args):
            for earlier in self.given:
                earlier.fill_(torch.nan)
            outputs = graph(*args)
            inputs = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            self.given = [o for o in outputs if isinstance(o, torch.Tensor) and o.data_ptr() not in inputs]
            return outputs

        return run


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, id="v1"), pytest.param({"sp_interval": 2, "fi_interval": 2, "warm_up": 1}, id="v2", marks=SLOW)],
)
@pytest.mark.parametrize("compile_it", [compile_in_place, pytest.param(exchange_for_compiled, marks=SLOW)])
@pytest.mark.parametrize("name", ["pixart_alpha", pytest.param("lcm_pixart", marks=SLOW)])
def test_what_is_stored_outlives_the_memory_of_compiled_code(name, compile_it, settings):
    case = BY_NAME[name]
    pipe = apply_settings(case.build(), 3, **settings)
    expected = case.run(pipe)
    compile_it(pipe, case, BorrowedMemory())
    for _ in range(2):
        torch.testing.assert_close(case.run(pipe), expected)


@SLOW
def test_the_real_compiler_draws_the_same_picture():
    case = BY_NAME["pixart_alpha"]
    pipe = apply_tgate(case.build(), 3)
    expected = case.run(pipe)
    # A block, of which there are several: that takes the compiler a third of the time.
    compile_blocks(pipe, case, "inductor")
    torch.testing.assert_close(case.run(pipe), expected, rtol=1e-4, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(case.run(pipe), expected, rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize("compile_it", [thorough(compile_in_place), compile_blocks])
def test_with_deepcache_as_far_as_that_compiles(compile_it):
    case = BY_NAME["sd"]
    pipe = case.build()
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    expected = case.run(apply_tgate(pipe, 3, deepcache=helper))
    counter = CompileCounter()
    if compile_it is compile_blocks:
        compile_blocks(pipe, case, counter)
    else:
        # DeepCache reads the timestep on the host, which breaks the graph.
        pipe.unet.compile(backend=counter)
    for _ in range(2):
        torch.testing.assert_close(case.run(pipe), expected)
    assert counter.frame_count
    if compile_it is compile_blocks:
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(case.run(pipe), expected)
