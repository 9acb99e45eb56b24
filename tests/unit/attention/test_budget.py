"""`max_memory`: what cross-attention keeps is within a budget, and it is that which saves most for each byte."""

import random
import re
from collections import defaultdict

import diffusers
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.support.compiling import compile_blocks, compile_in_place
from tests.support.counting import keys_of
from tests.support.macs import COSTS, COUNTED, sizes, taken
from tests.support.settings import apply_settings
from tests.support.states import check_restored, snapshot
from tests.zoo.case import STEPS, Case
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, estimate_cost, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.attention.budget import MemoryBudget
from tgate_processors._internal.families import attention_modules, family_of

GATE = 3
DROP = {"gate_step": GATE}
# Every third step after the gate is a full one, and so is the last.
PREDICT = {"gate_step": GATE, "guidance": "predict", "cfg_interval": 3}


def rows(*names, quick=()):
    """Parameters of a law: these pipelines, most of them where every family is held to every law."""
    marks = [pytest.mark.slow, pytest.mark.thorough]
    return [
        pytest.param(
            BY_NAME[name],
            id=name,
            marks=[
                *([] if name in quick else marks),
                pytest.mark.skipif(
                    not getattr(BY_NAME[name], "is_there", True), reason=f"this diffusers has no {name}"
                ),
            ],
        )
        for name in names
    ]


def run(case, pipe, **settings):
    picture = case.run(apply_settings(pipe, **settings))
    return picture, get_tgate_report(pipe)


def layers_of(pipe, case):
    """The layers with cross-attention, in the order of the denoiser."""
    denoiser = getattr(pipe, case.denoiser)
    layout = family_of(denoiser).layout
    return {
        name: layer for name, layer in attention_modules(denoiser).items() if layout.is_cross_attention(name, layer)
    }


def watch(layers):
    """How often each layer makes its keys, and the multiply-accumulates and the bytes of its first call."""
    keys, macs, nbytes = defaultdict(int), defaultdict(int), {}

    def count(name):
        def hook(module, args, output):
            keys[name] += 1

        return hook

    def measure(name, layer):
        def hook(module, args, output):
            if name not in nbytes:
                macs[name] += output.numel() * module.in_features
                if module in (getattr(layer, "to_q", None), getattr(layer, "to_query", None)):
                    macs[name, "queries"] = output.numel()
                if module is keys_of(layer):
                    macs[name] += 2 * macs[name, "queries"] * output.shape[-2]

        return hook

    def end(name):
        def hook(module, args, output):
            nbytes.setdefault(name, output.nbytes)

        return hook

    for name, layer in layers.items():
        for part in layer.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(measure(name, layer))
        keys_of(layer).register_forward_hook(count(name))
        layer.register_forward_hook(end(name))
    return keys, macs, nbytes


def best(macs, nbytes, most):
    """The layers that save most for each byte, until one of them does not fit."""
    chosen = []
    for name in sorted(nbytes, key=lambda name: -macs[name] / nbytes[name]):
        most -= nbytes[name]
        if most < 0:
            break
        chosen.append(name)
    return set(chosen)


MATRIX = ("sdxl", "svd", "pixart_alpha", "wan", "ltx", "kandinsky5", "hunyuan")
law = pytest.mark.parametrize("case", rows(*MATRIX, quick=("wan",)))
ways = pytest.mark.parametrize(
    "settings",
    [DROP, pytest.param(PREDICT, marks=[pytest.mark.slow, pytest.mark.thorough])],
    ids=["drop", "predict"],
)


@law
@ways
def test_the_layers_that_save_most_for_each_byte_are_kept_and_no_other(case: Case, settings):
    pipe = case.build()
    calls = family_of(getattr(pipe, case.denoiser)).layout.calls_per_step
    # Its attributes are those of a call.
    case.run(pipe)
    before, layers = snapshot(pipe, case), layers_of(pipe, case)
    keys, macs, nbytes = watch(layers)
    # Differences of guidance come beside.
    beside = run(case, pipe, **settings, max_memory=0)[1].peak_bytes if settings is PREDICT else 0
    whole = run(case, pipe, **settings, cross_attention=True)[1].peak_bytes - beside
    most, most_held = whole * 3 // 5, []
    apply_settings(pipe, **settings, max_memory=most)
    state = vars(pipe)["_tgate"].state
    for layer in layers.values():
        layer.register_forward_hook(lambda module, args, output: most_held.append(state.nbytes))
    keys.clear()
    picture, report = case.run(pipe), get_tgate_report(pipe)
    # One half of the batch is kept, or what the first of two calls gives.
    nbytes = {name: size * calls // 2 for name, size in nbytes.items()}
    kept, full = best(macs, nbytes, most), len(report.full_steps)
    half = STEPS - full
    assert keys == {name: calls * full + (0 if name in kept else half) for name in layers}
    assert 0 < len(kept) == report.kept_layers < report.cross_attention_layers == len(layers)
    assert f", cross-attention of {len(kept)} of {len(layers)} layers" in str(report)
    assert report.cross_attention_reused == half
    assert report.cross_attention_computed == STEPS
    assert report.peak_bytes == sum(nbytes[name] for name in kept) + beside
    # At no time, and not only at the end of a step.
    assert max(most_held) <= most + beside
    assert torch.equal(case.run(pipe), picture)
    for part in (part for layer in layers.values() for part in layer.modules()):
        part._forward_hooks.clear()
    assert torch.equal(case.run(pipe), picture)
    check_restored(before, snapshot(remove_tgate(pipe), case))


@pytest.mark.parametrize("case", rows(*MATRIX, quick=("pixart_alpha",)))
@ways
def test_nothing_is_guidance_alone_and_enough_is_as_without(case: Case, settings, caplog):
    pipe = case.build()
    alone, enough = (run(case, pipe, **settings, cross_attention=cross) for cross in (False, True))
    for most, (picture, report) in ((0, alone), ("0", alone), (1, alone), ("2GB", enough), (np.int64(10**9), enough)):
        again, said = run(case, pipe, **settings, max_memory=most)
        assert torch.equal(again, picture)
        if most != 1:
            assert said == report
    whole = enough[1].peak_bytes - alone[1].peak_bytes
    # The report of guidance alone tells what the other choice holds.
    assert (alone[1].cross_attention_bytes, enough[1].cross_attention_bytes) == (whole, 0)
    assert f"; cross_attention=True would store {whole / 2**20:.1f} MiB more" in str(alone[1])
    assert str(enough[1]).endswith(" stored at most")
    assert torch.equal(run(case, pipe, **settings, max_memory=whole)[0], enough[0])
    assert not torch.equal(run(case, pipe, **settings, max_memory=whole - 1)[0], enough[0])
    (message,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(
        rf"T-GATE: max_memory=1 is too little to keep any cross-attention of this call of {type(pipe).__name__}: the "
        r"first layer needs \d+ bytes. All of it is computed in every step.",
        message,
    )


def given_to(case):
    """The arguments of `estimate_cost` that a case's inputs are as large as."""
    if not case.pipeline:
        return sizes(case)
    size = {name: number for name, number in case.size.items() if name in ("height", "width", "num_frames")}
    return {**size, **COSTS.get(case.name, COUNTED), "batch_size": 1}


@pytest.mark.parametrize("case", rows(*MATRIX, "sana", "ltx2", "stable_audio", "kandinsky3", "audioldm2", "lumina"))
@pytest.mark.parametrize("settings", [DROP, PREDICT], ids=["drop", "predict"])
def test_the_estimate_chooses_the_same_layers_as_the_run(case: Case, settings):
    pipe, given = case.build(), given_to(case)

    def estimate(**choice):
        return estimate_cost(pipe, TGateSchedule(**settings), STEPS, **given, **choice)

    bounds = [estimate(cross_attention=cross).report.peak_bytes for cross in (False, True)]
    whole = bounds[1] - bounds[0]
    for most in (whole * 3 // 10, whole * 7 // 10):
        cost = estimate(max_memory=most)
        gated = taken(apply_settings(pipe, **settings, max_memory=most), case, [0], linear=True)
        # It embeds its time once for all samples.
        assert cost.with_tgate.total == pytest.approx(gated.total, rel=0.005 if case.name == "stable_audio" else 0)
        assert cost.report == get_tgate_report(pipe)
    for most, cross in ((0, False), (whole, True)):
        assert estimate(max_memory=most) == estimate(cross_attention=cross)


def test_the_estimate_keeps_what_saves_most_for_a_byte_and_not_what_is_smallest():
    case = BY_NAME["sd"]
    pipe = case.build()
    # The layers at full resolution are wider here: larger, and they save more for each of their bytes.
    config = {**pipe.unet.config, "block_out_channels": (128, 32, 32)}
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    settings, given = {"gate_step": GATE}, sizes(case)
    whole = estimate_cost(pipe, TGateSchedule(**settings), STEPS, **given).report.peak_bytes
    _, macs, nbytes = watch(layers_of(pipe, case))
    case.run(pipe)
    nbytes = {name: size // 2 for name, size in nbytes.items()}
    smallest = min(nbytes, key=nbytes.get)
    kept = best(macs, nbytes, whole * 3 // 5)
    assert kept
    assert smallest not in kept
    cost = estimate_cost(pipe, TGateSchedule(**settings), STEPS, **given, max_memory=whole * 3 // 5)
    assert cost.report.peak_bytes == sum(nbytes[name] for name in kept)


def filled_slots(state):
    """How many layers of the run hold an output where their compiled code finds it."""
    return sum(slot.tensor is not None for slot in state.current().attention_cache.layers.slots)


@pytest.mark.parametrize("case", rows("wan", "pixart_alpha", "sdxl"))
@pytest.mark.parametrize("gate_step", [GATE, 1])
@pytest.mark.parametrize("compile_it", [compile_blocks, compile_in_place])
def test_compiled_code_keeps_the_same_layers(case: Case, gate_step, compile_it):
    torch._dynamo.reset()
    pipe = case.build()
    whole = run(case, pipe, gate_step=gate_step, cross_attention=True)[1].peak_bytes
    expected, report = run(case, pipe, gate_step=gate_step, max_memory=whole * 3 // 5)
    compile_it(pipe, case, counter := CompileCounter())
    state, filled = vars(pipe)["_tgate"].state, []
    if compile_it is compile_blocks:
        # At the end of the denoiser, which is not in a block.
        last = getattr(getattr(pipe, case.denoiser), "conv_out" if case.denoiser == "unet" else "proj_out")
        last.register_forward_hook(lambda module, args, output: filled.append(filled_slots(state)))
    torch.testing.assert_close(case.run(pipe), expected)
    assert get_tgate_report(pipe) == report
    # Where a step before has told their sizes, no more than is kept is ever held.
    assert not filled or max(filled) == (report.cross_attention_layers if gate_step == 1 else report.kept_layers)
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(case.run(pipe), expected)
    if case.name == "wan":
        # Compute, store and reuse, as without a budget: the second call has the same batch.
        assert graphs == 3


def test_the_choice_does_not_depend_on_the_order_in_which_layers_are_met():
    draw = random.Random(0)
    for _ in range(50):
        layers = [(place, draw.randint(1, 50), draw.randint(1, 9), place) for place in range(8)]
        most, chosen = draw.randint(0, 40), set()
        for _ in range(4):
            draw.shuffle(layers)
            budget, held = MemoryBudget(most), {}
            for key, saved, nbytes, place in layers:
                if budget.offer(key, saved, nbytes, place):
                    held[key] = nbytes
                # What is out stays out.
                held = {key: nbytes for key, nbytes in held.items() if key in budget}
                assert sum(held.values()) <= most
            chosen.add(frozenset(held))
        assert len(chosen) == 1
        by_rank = sorted(layers, key=lambda layer: (-layer[1] / layer[2], layer[3]))
        (kept,) = chosen
        assert {layer[0] for layer in by_rank[: len(kept)]} == kept


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_memory": "2 apples"}, ValueError, "`max_memory` must be bytes as an int .* got '2 apples'"),
        ({"max_memory": "infGB"}, ValueError, "`max_memory` must be bytes .* got 'infGB'"),
        ({"max_memory": -1}, ValueError, '`max_memory` must be .* a size with a unit such as "2GB" .* got -1'),
        ({"max_memory": True}, TypeError, "`max_memory` must be bytes as an int .* got True of type bool"),
        ({"max_memory": 2.5}, TypeError, "`max_memory` must be bytes as an int .* got 2.5 of type float"),
        ({"max_memory": [1]}, TypeError, r"`max_memory` must be bytes as an int .* got \[1\] of type list"),
        (
            {"max_memory": "2GB", "cross_attention": False},
            ValueError,
            "max_memory='2GB' is for kept cross-attention, and cross_attention=False keeps none: leave one of them out",
        ),
    ],
)
def test_what_is_no_budget_is_refused(settings, error, message):
    pipe = BY_NAME["sd"].build()
    for call in (
        lambda: apply_settings(pipe, GATE, **settings),
        lambda: estimate_cost(pipe.unet, TGateSchedule(GATE), STEPS, **settings),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not is_tgate_applied(pipe)
