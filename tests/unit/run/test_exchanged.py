"""What a callback exchanges: pictures by their places in the batch, and the text. Nothing kept of the old goes on."""

import functools
import math

import diffusers
import pytest
import torch

from tests.support.settings import apply_settings
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import with_scheduler
from tgate_processors import apply_tgate, get_tgate_report

STEPS, AT = 12, 4
WAYS = {
    "drop": {"gate_step": 3},
    "predict": {"gate_step": 3, "guidance": "predict"},
    "interval": {"gate_step": 3, "guidance": "predict", "cfg_interval": 4},
    # Tiny pipelines with random weights predict badly: this accepts whatever comes.
    "auto": {"gate_step": "auto", "tolerance": math.inf, "forecast": False},
    "forecast": {"gate_step": "auto", "tolerance": math.inf},
    "reuse": {"gate_step": 8, "sp_interval": 6, "fi_interval": 2},
}
# Full steps after an exchange at the end of step `AT`, and of those from the beginning.
FULL = {
    "drop": (0, 1, 2, 5),
    "predict": (0, 1, 2, 5),
    "interval": (0, 1, 2, 5, 6, 10),
    "auto": (0, 1, 2, 4, 5, 6, 7, 9),
    "forecast": (0, 1, 2, 5, 6, 7),
    "reuse": tuple(range(8)),
}
# Those whose step callback is the old one, which can only write to latents.
LEGACY = {"pixart_alpha", "stable_audio"}


def said(caplog):
    return [record.message for record in caplog.records if record.name.startswith("tgate")]


def resample(pipe, step, timestep, tensors, at=AT):
    """The first picture has won."""
    if step == at:
        tensors["latents"] = tensors["latents"][[0] * len(tensors["latents"])]
    return tensors


def resample_in_place(pipe, step, timestep, tensors):
    if step == AT:
        tensors["latents"][:] = tensors["latents"][:1].clone()
    return {}


def legacy(step, timestep, latents):
    resample_in_place(None, step, timestep, {"latents": latents})


def spread(case, pipe, **callback):
    """Two seeds of one prompt: how far the second is from the first, of which it is a copy."""
    inputs = case.inputs([0, 1])
    told = {name: value for name, value in inputs.items() if "embeds" in name or "mask" in name}
    same = {name: value[:1].expand_as(value).clone() for name, value in told.items()}
    if case.control:
        same[case.control] = inputs[case.control][:1] * 2
    if not callback:
        callback = {"callback": legacy} if case.name in LEGACY else {"callback_on_step_end": resample}
    result = case.run(pipe, [0, 1], **same, num_inference_steps=STEPS, **callback)
    return (result - result[:1]).abs().max().item()


ROWS = [("sd", "drop"), ("sd", "auto"), ("sd", "forecast"), ("pixart_alpha", "drop"), ("wan", "predict")]
ROWS += [
    *(slow("sd", way) for way in ("predict", "interval", "reuse")),
    *(slow("wan", way) for way in ("auto", "drop", "forecast")),
    slow("sd3", "auto"),
]
ROWS += [slow(name, way) for name in ("pixart_alpha", "sdxl") for way in ("predict", "auto")]
ROWS += [thorough(name, way) for name in ("sd_controlnet", "ltx", "wan_experts") for way in ("drop", "predict", "auto")]
ROWS += [thorough("sd3", "drop"), thorough("sd3", "predict"), thorough("stable_audio", "auto")]


@pytest.mark.parametrize(("name", "way"), ROWS)
def test_copies_of_one_picture_stay_equal(name, way):
    case = BY_NAME[name]
    joint = {} if BY_NAME[name].way.get("cross_attention", True) else BY_NAME[name].way
    # The solvers of some remember by the place in the batch too.
    plain = with_scheduler(case.build(), "DDIMScheduler") if case.name in LEGACY else case.build()
    assert spread(case, plain) < 1e-3
    pipe = apply_settings(plain, **WAYS[way], **joint)
    assert spread(case, pipe) < 1e-3
    if name != "wan_experts":
        # There the second one takes over in between.
        assert get_tgate_report(pipe).full_steps == FULL[way]
    assert vars(pipe)["_tgate"].state.nbytes == 0


@pytest.mark.parametrize("way", ["drop", *map(slow, ("predict", "auto", "reuse"))])
@pytest.mark.parametrize("write", [resample, resample_in_place])
def test_the_step_after_computes_both_halves_of_everything(way, write):
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **WAYS[way])
    rows = {"attn1": [], "attn2": []}
    for name, module in pipe.unet.named_modules():
        if name.endswith(tuple(rows)):
            module.to_k.register_forward_hook(
                lambda layer, args, output, kind=name[-5:]: rows[kind].append((pipe._tgate_step, len(output)))
            )
    pipe._tgate_step = 0
    pipe.unet.register_forward_hook(lambda *_: setattr(pipe, "_tgate_step", pipe._tgate_step + 1))
    assert spread(case, pipe, callback_on_step_end=write) < 1e-3
    layers = sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules())
    after = [[rows for step, rows in computed if step == AT + 1] for computed in rows.values()]
    assert after == [[4] * layers] * 2
    assert (AT + 1) in get_tgate_report(pipe).full_steps


@pytest.mark.parametrize("way", ["drop", *map(slow, ("predict", "interval", "auto", "reuse"))])
def test_latents_that_are_given_back_as_they_were_change_no_bit(way, caplog):
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **WAYS[way])
    expected, full = case.run(pipe, num_inference_steps=STEPS), get_tgate_report(pipe)

    def give_back(pipe, step, timestep, tensors):
        return [tensors, {}, {"latents": tensors["latents"].clone()}][step % 3]

    assert torch.equal(case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=give_back), expected)
    assert get_tgate_report(pipe) == full
    assert not said(caplog)


@pytest.mark.parametrize(
    ("name", "way"),
    [slow("sd", "drop"), ("sd", "auto"), slow("sd", "predict"), slow("wan", "predict"), slow("wan", "auto")],
)
def test_latents_that_are_others_in_every_step_leave_nothing_to_gate_and_it_is_said_once(name, way, caplog):
    case = BY_NAME[name]

    def blend(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.99}

    pipe = case.build()
    plain = case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=blend)
    apply_settings(pipe, **WAYS[way])
    for _ in range(2):
        assert torch.equal(case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=blend), plain)
    assert get_tgate_report(pipe).full_steps == tuple(range(STEPS))
    (message,) = said(caplog)
    assert message.startswith("T-GATE: nothing was gated in this call of ")
    assert "gives other latents" in message
    caplog.clear()
    case.run(pipe, num_inference_steps=STEPS)
    assert get_tgate_report(pipe).half_batch_forwards > 0
    assert not said(caplog)


@pytest.mark.slow
def test_steps_of_two_passes():
    case = BY_NAME["sd"]
    callback = {"callback_on_step_end": functools.partial(resample, at=2 * AT + 1)}
    assert spread(case, with_scheduler(case.build(), "HeunDiscreteScheduler"), **callback) < 1e-3
    for way in ("drop", "predict", "auto"):
        pipe = apply_settings(with_scheduler(case.build(), "HeunDiscreteScheduler"), **WAYS[way])
        assert spread(case, pipe, **callback) < 1e-3
        # The second pass of the step may be on half of the batch again.
        assert AT + 1 in get_tgate_report(pipe).full_steps


@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "predict", "auto"])
def test_deepcache_starts_afresh(way):
    from DeepCache import DeepCacheSDHelper

    case = BY_NAME["sd"]
    pipe = case.build()
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    assert spread(case, apply_settings(pipe, **WAYS[way], deepcache=helper)) < 1e-3
    assert AT + 1 in get_tgate_report(pipe).full_steps


@pytest.mark.slow
def test_a_legacy_callback_of_a_pipeline_that_has_both_may_write_to_latents():
    case = BY_NAME["sd"]
    for way in ("drop", "predict", "auto"):
        pipe = apply_settings(case.build(), **WAYS[way])
        assert spread(case, pipe, callback=legacy, callback_steps=1) < 1e-3
        assert get_tgate_report(pipe).full_steps == FULL[way]


def travel(new, names=("prompt_embeds",), asked=None):
    """The text of another prompt from step `AT + 1` on."""

    def callback(pipe, step, timestep, tensors):
        return {**tensors, **(dict.fromkeys(names, new) if step == AT else {})}

    asked = names if asked is None else asked
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", *asked]}


@pytest.mark.parametrize("name", ["sd3", "wan", slow("sd"), slow("qwen"), slow("lumina2")])
@pytest.mark.parametrize("way", ["predict", slow("auto")])
def test_another_text_gets_a_full_step_where_guidance_is_predicted(name, way, caplog):
    case = BY_NAME[name]
    seen = []

    def callback(pipe, step, timestep, tensors):
        if step == AT:
            old = tensors["prompt_embeds"]
            seen.append(len(old))
            new = case.conditioning([5], True)["prompt_embeds"]
            tensors["prompt_embeds"] = new if len(old) == len(new) else torch.cat([old[:1], new])
        return tensors

    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    pipe = apply_settings(case.build(), **WAYS[way], cross_attention=False)
    case.run(pipe, num_inference_steps=STEPS, **call)
    assert get_tgate_report(pipe).full_steps == FULL[way]
    assert seen
    assert not said(caplog)
    # The same text again is no other one.
    again = {**call, "callback_on_step_end": lambda p, i, t, k: {**k, "prompt_embeds": copied(k["prompt_embeds"])}}
    expected = case.run(pipe, num_inference_steps=STEPS)
    full = get_tgate_report(pipe).full_steps
    assert torch.equal(case.run(pipe, num_inference_steps=STEPS, **again), expected)
    assert get_tgate_report(pipe).full_steps == full


def copied(value):
    return [each.clone() for each in value] if isinstance(value, list) else value.clone()


@pytest.mark.parametrize("asked", [True, slow(False)])
def test_another_negative_prompt_gets_a_full_step_too(asked):
    # Where guidance is two calls, a half step is not given it.
    case = BY_NAME["wan"]
    new = case.conditioning([5], True)["prompt_embeds"]
    name = "negative_prompt_embeds"
    pipe = apply_settings(case.build(), **WAYS["predict"])
    call = travel(new, (name,), None if asked else ())
    case.run(pipe, num_inference_steps=STEPS, **call)
    assert get_tgate_report(pipe).full_steps == FULL["predict"]
    # Given in every step, it is another one in the first of them.
    call["callback_on_step_end"] = lambda pipe, step, timestep, tensors: {name: new} if step >= AT else {}
    case.run(pipe, num_inference_steps=STEPS, **call)
    assert get_tgate_report(pipe).full_steps == FULL["predict"]


def test_with_guidance_dropped_and_nothing_else_gated_the_text_needs_no_full_step(caplog):
    case = BY_NAME["wan"]
    new = case.conditioning([5], True)["prompt_embeds"]
    pipe = apply_tgate(case.build(), 3)
    case.run(pipe, num_inference_steps=STEPS, **travel(new))
    assert get_tgate_report(pipe).full_steps == (0, 1, 2)
    assert not said(caplog)


@pytest.mark.parametrize("way", ["predict", slow("auto")])
def test_cross_attention_follows_the_text_where_guidance_is_predicted(way, caplog):
    case = BY_NAME["sd"]
    pipe = apply_settings(case.build(), **WAYS[way])
    rows = []
    pipe.unet.register_forward_pre_hook(lambda *_: rows.append(0))
    layer = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    layer.to_k.register_forward_hook(lambda module, args, output: rows.__setitem__(-1, len(output)))
    new = torch.cat([case.conditioning([5], True)[f"{name}prompt_embeds"] for name in ("negative_", "")])
    case.run(pipe, num_inference_steps=STEPS, **travel(new))
    assert get_tgate_report(pipe).full_steps == FULL[way]
    assert [step for step, computed in enumerate(rows) if computed] == list(FULL[way])
    assert not said(caplog)


@pytest.mark.parametrize("name", ["sd", slow("sd_controlnet")])
def test_text_that_the_pipeline_itself_exchanges(name, caplog):
    """As PhotoMaker does, which joins text and face from some step on."""
    case = BY_NAME[name]
    pipe, steps = case.build(), []
    # A ControlNet has run on one half already.
    late = name == "sd_controlnet"

    def merge(module, args, kwargs):
        if late and not steps:
            # T-GATE's own hook comes first here, where the text is to be that of the pipeline.
            hooks = pipe.unet._forward_pre_hooks
            pipe.controlnet.register_forward_hook(lambda *_: hooks.move_to_end(hook.id, last=False))
        steps.append(kwargs["encoder_hidden_states"])
        return args, {**kwargs, "encoder_hidden_states": steps[-1] * (1 if len(steps) <= AT + 1 else 0.5)}

    apply_settings(pipe, **WAYS["predict"])
    hook = pipe.unet.register_forward_pre_hook(merge, with_kwargs=True)
    case.run(pipe, num_inference_steps=STEPS)
    assert get_tgate_report(pipe).full_steps == (0, 1, 2, AT + 1 + late)
    assert not said(caplog)


def test_guidance_that_a_callback_of_diffusers_switches_off_is_nothing_exchanged():
    case = BY_NAME["sd"]
    callback = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=AT)
    pipe = apply_settings(case.build(), **WAYS["predict"])
    case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=callback)
    assert get_tgate_report(pipe).cross_attention_computed == 3
