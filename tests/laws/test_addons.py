"""The laws of the core for everything that people build around Stable Diffusion and PixArt."""

import re
from collections import defaultdict

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.settings import apply_settings, computed
from tests.zoo.addons import FRAMES, HOSTS
from tests.zoo.case import TIERS, Case, rows, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateCallback, TGateSchedule, apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from tgate_processors._internal.families import attention_modules

GATE = 2
SETTINGS = {"v1": {"gate_step": GATE}, "v2": {"gate_step": 4, "sp_interval": 2, "fi_interval": 2, "warm_up": 1}}
# FreeInit denoises twice, the first time with fewer steps.
LOOPS = {"animatediff_free_init": [3, 6]}


def matrix():
    """Rows of the support matrix."""
    page = (ROOT / "docs/pipelines.md").read_text()
    return re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", page, flags=re.MULTILINE)


def test_the_support_matrix_has_a_row_for_every_host_and_no_other():
    assert sorted(what for _, what, _ in matrix()) == sorted(host.row for host in HOSTS)


def count(denoiser):
    """Batch sizes that `to_k` of every attention layer was given, and the denoiser's first layer; what is cross."""
    seen, kinds = defaultdict(list), {}

    def watch_kind(name):
        def hook(module, args, kwargs):
            context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            kinds[name] = context is not None and context is not args[0]

        return hook

    for name, module in denoiser.named_modules():
        if hasattr(module, "to_k"):
            module.register_forward_pre_hook(watch_kind(name), with_kwargs=True)
            module.to_k.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(len(args[0])))
    places = (getattr(denoiser, name, None) for name in ("pos_embed", "patch_embed"))
    first = denoiser.conv_in if hasattr(denoiser, "conv_in") else next(filter(None, places)).proj
    first.register_forward_pre_hook(lambda module, args: seen["denoiser"].append(len(args[0])))
    return seen, kinds


# With v2 all that v1 does happens too.
COUNTED = [pytest.param(host.name, "v2", marks=TIERS[host.tier]) for host in HOSTS]
COUNTED += [("gligen", "v1"), ("pix2pix", "v1")]
COUNTED += [thorough(name, "v1") for name in ("ip_adapter", "sdxl_loras", "animatediff_free_init", "turbo")]


@pytest.mark.parametrize(("name", "version"), COUNTED)
def test_to_k_runs_exactly_as_the_schedule_says(name, version):
    host, settings = BY_NAME[name], SETTINGS[version]
    pipe = apply_settings(host.build(), **settings)
    assert (type(pipe).__name__, host.row, host.stays) in matrix()
    seen, kinds = count(getattr(pipe, host.denoiser))
    host.run(pipe)
    report = get_tgate_report(pipe)
    loops = LOOPS.get(host.name, [report.num_inference_steps])
    assert sum(loops) == report.num_inference_steps >= 5
    plan = [computed(step, steps, **settings) for steps in loops for step in range(steps)]
    dropped = host.guidance > 1 and host.is_guided and not host.guidance_parts
    halves = [2 if dropped and not cross else 1 for cross, _ in plan]
    full = seen.pop("denoiser")
    assert full == [full[0] // part for part in halves]
    assert report.half_batch_forwards == halves.count(2)
    assert report.cross_attention_computed == sum(cross for cross, _ in plan)
    layers = {name: batches for name, batches in seen.items() if "fuser" not in name}
    assert {kinds[name] for name in layers} == {True, False}
    for name, batches in layers.items():
        kind = 0 if kinds[name] else 1
        expected = [batches[0] // part for part, ran in zip(halves, plan, strict=True) if ran[kind]]
        if host.name.startswith("pag") and kind == 1:
            # Layers with a perturbed part are diffusers' own during the call; they are computed in every step.
            assert batches in (expected, [batches[0]] * len(plan)), name
        else:
            assert batches == expected, name


@pytest.mark.parametrize("host", rows(host for host in HOSTS if "control" in host.name or "union" in host.name))
def test_a_controlnet_of_any_kind_is_halved_with_the_denoiser(host: Case):
    pipe = apply_tgate(host.build(), GATE)
    batches = []
    pipe.controlnet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    host.run(pipe)
    steps = get_tgate_report(pipe).num_inference_steps
    part = 1 if host.guidance_parts else 2
    full = batches[0]
    assert batches == [full if step < GATE else full // part for step in range(steps)]


def test_after_the_gate_the_half_with_the_boxes_stays_in_gligen():
    host = BY_NAME["gligen"]
    pipe = apply_tgate(host.build(), 1)
    masks = []
    pipe.unet.position_net.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["masks"].sum(1).tolist()), with_kwargs=True
    )
    host.run(pipe)
    assert masks == [[0, 1]] + [[1]] * 5


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["unclip", "unclip_image"])
def test_after_the_gate_the_half_with_the_picture_stays_in_unclip(name):
    host, told = BY_NAME[name], []
    pipe = apply_tgate(host.build(), 1)
    pipe.unet.class_embedding.register_forward_pre_hook(lambda module, args: told.append(args[0].any(1).tolist()))
    host.run(pipe)
    assert told == [[False, True]] + [[True]] * 5


@pytest.mark.parametrize("steps", [1, 2, 4, thorough(8)])
@pytest.mark.parametrize("name", ["lcm_lora", "tcd", "turbo"])
def test_few_steps_without_guidance(name, steps):
    host = BY_NAME[name]
    pipe = apply_tgate(host.build(), 1)
    seen, kinds = count(pipe.unet)
    host.run(pipe, [0, 1], num_inference_steps=steps)
    assert seen.pop("denoiser") == [2] * steps
    assert all(batches == [2] * (1 if kinds[name] else steps) for name, batches in seen.items())


@pytest.mark.parametrize("host", rows([host for host in HOSTS if host.guidance_parts]))
def test_guidance_of_other_parts_stays_on_and_every_part_keeps_its_own_cross_attention(host: Case):
    pipe = host.build()
    denoiser = getattr(pipe, host.denoiser)
    calls, kept, outputs = [], {}, []
    layers = {name: module for name, module in denoiser.named_modules() if name.endswith("attn2")}
    layers = {name: module for name, module in layers.items() if "motion_modules" not in name}
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)

    def keep(name):
        def hook(module, args, output):
            if len(calls) == GATE:
                kept[name] = output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    apply_tgate(pipe, GATE)
    inside = []

    def replay(module, args, output):
        if inside:
            return
        outputs.append(output[0])
        if len(outputs) == GATE + 1:
            # Here and not after the run: perturbed-attention guidance takes its processors out at its end.
            state = vars(pipe)["_tgate"].state
            for name, layer in layers.items():
                inside.append(layer.register_forward_hook(lambda module, args, output, name=name: kept[name]))
            with state.suspended():
                outputs[-1] = (output[0], module(*calls[GATE][0], **calls[GATE][1])[0])
            for handle in inside:
                handle.remove()

    handle = denoiser.register_forward_hook(replay)
    host.run(pipe)
    handle.remove()
    for each in handles:
        each.remove()
    ours, plain = outputs[GATE]
    parts = host.guidance_parts * (FRAMES if "animatediff" in host.name else 1)
    assert all(len(output) == parts for output in kept.values())
    assert len(kept) == len(layers) > 0
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert get_tgate_report(pipe).half_batch_forwards == 0


def test_guidance_that_stays_on_is_told(caplog):
    pipe = apply_tgate(BY_NAME["pix2pix"].build(), GATE)
    (record,) = caplog.records
    assert record.message.startswith(
        f"T-GATE: the guidance of {type(pipe).__name__} is not two halves, so it is kept after the gate"
    )
    caplog.clear()
    apply_tgate(BY_NAME["ip_adapter"].build(), GATE)
    assert not [record for record in caplog.records if "tgate" in record.name]


def test_a_half_cannot_be_chosen_where_guidance_has_none():
    host = BY_NAME["pix2pix"]
    pipe = host.build()
    with pytest.raises(ValueError, match=r"cfg_half='conditional' has no effect: the guidance of .*Pix2PixPipeline is"):
        apply_tgate(pipe, GATE, cfg_half="conditional")
    assert not is_tgate_applied(pipe)
    callback = TGateCallback(TGateSchedule(GATE), cfg_half="conditional")
    with pytest.raises(ValueError, match="cfg_half='conditional' has no effect"):
        host.run(pipe, callback_on_step_end=callback)
    assert not pipe.unet._forward_pre_hooks


def test_a_failure_leaves_no_perturbed_attention_behind():
    host = BY_NAME["pag"]
    pipe = apply_tgate(host.build(), GATE)
    baseline, expected = host.plain(), host.gated(GATE)
    gates = {name: layer.processor for name, layer in attention_modules(pipe.unet).items()}

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    for error, call in ((KeyboardInterrupt, {"callback_on_step_end": stop}), (ValueError, {"height": 7})):
        with pytest.raises(error):
            host.run(pipe, **call)
        assert {name: layer.processor for name, layer in attention_modules(pipe.unet).items()} == gates
    assert torch.equal(host.run(pipe), expected)
    assert torch.equal(host.run(remove_tgate(pipe)), baseline)
