"""AnimateDiff's switches: FreeInit runs the loop several times, FreeNoise is refused."""

import pytest
import torch

from tests.support.comparing import distance
from tests.zoo.addons import FRAMES, HOSTS, text_encoder, tokenizer, with_frames
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate

GATE = 2
HOST = BY_NAME["animatediff"]
ANIMATED = [host for host in HOSTS if host.name.startswith("animatediff")]
CONTROLLED = [host for host in ANIMATED if "controlnet" in host.name]


# FRAMES frames are in the laws of all hosts.
QUICK = {"animatediff": (3,)}
FRAMED = [
    pytest.param(host, frames, id=f"{host.name}-{frames}", marks=[] if quick else [pytest.mark.slow])
    for host in ANIMATED
    for frames in (2, 3, 16)
    for quick in [frames in QUICK.get(host.name, ())]
]


@pytest.mark.parametrize(("host", "frames"), FRAMED)
def test_any_number_of_frames(host, frames):
    host = with_frames(host, frames)
    pipe = host.build()
    baseline = host.run(pipe)
    assert torch.equal(host.run(apply_tgate(pipe, 99)), baseline)
    batches = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0]) // frames))
    apply_tgate(pipe, GATE)
    gated = host.run(pipe)
    assert not torch.equal(gated, baseline)
    loops = [3, 6] if "free_init" in host.name else [get_tgate_report(pipe).num_inference_steps]
    assert batches == [2 if step < GATE else 1 for steps in loops for step in range(steps)]
    if host.batches and frames < 16:
        singles = torch.cat([gated, host.run(pipe, [1])])
        assert distance(host.run(pipe, [0, 1]), singles) < 1e-4
    assert torch.equal(host.run(remove_tgate(pipe)), baseline)


@pytest.mark.parametrize("half", [thorough("unconditional"), "conditional"])
@pytest.mark.parametrize("frames", [thorough(2), 3, thorough(4), slow(16)])
@pytest.mark.parametrize("host", CONTROLLED, ids=lambda host: host.name)
def test_halving_the_controlnet_changes_nothing(host, frames, half):
    host = with_frames(host, frames)
    pipe = apply_tgate(host.build(), GATE, cfg_half=half, custom_forwards="gate")
    rows = []
    forward = pipe.unet.forward

    def watched(*args, **kwargs):
        rows.append(len(kwargs["mid_block_additional_residual"]) // frames)
        return forward(*args, **kwargs)

    pipe.unet.forward = watched
    halved = host.run(pipe)
    assert rows == [2 if step < GATE else 1 for step in range(len(rows))]
    (hook,) = pipe.controlnet._forward_pre_hooks
    del pipe.controlnet._forward_pre_hooks[hook]
    assert distance(host.run(pipe), halved) < 1e-5
    assert rows[len(rows) // 2 :] == rows[: len(rows) // 2]


@pytest.mark.parametrize("fast", [True, False])
def test_every_loop_of_free_init_has_a_gate_of_its_own(fast):
    pipe = apply_tgate(HOST.build(), 0.5)
    pipe.enable_free_init(num_iters=3, use_fast_sampling=fast)
    batches = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0]) // FRAMES))
    HOST.run(pipe)
    steps = [2, 4, 6] if fast else [6, 6, 6]
    assert batches == [2 if step < loop / 2 else 1 for loop in steps for step in range(loop)]
    assert get_tgate_report(pipe).num_inference_steps == sum(steps)


def test_free_init_switched_on_and_off_after_apply():
    pipe = apply_tgate(HOST.build(), GATE)
    plain = HOST.gated(GATE)
    pipe.enable_free_init(num_iters=2)
    assert not torch.equal(HOST.run(pipe), plain)
    pipe.disable_free_init()
    assert torch.equal(HOST.run(pipe), plain)


def test_free_noise_switched_on_after_apply_is_refused_until_it_is_off():
    pipe = apply_tgate(HOST.build(), GATE)
    baseline, expected = HOST.plain(), HOST.gated(GATE)
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with pytest.raises(ValueError, match=r"AnimateDiffPipeline cannot be gated with FreeNoise.*disable_free_noise\(\)"):
        HOST.run(pipe)
    assert is_tgate_applied(pipe)
    pipe.disable_free_noise()
    assert torch.equal(HOST.run(pipe), expected)
    pipe.enable_free_noise(context_length=2, context_stride=1)
    # With FreeNoise, diffusers takes no embeddings.
    pipe.register_modules(text_encoder=text_encoder(), tokenizer=tokenizer())
    embeds = {"prompt_embeds": None, "negative_prompt_embeds": None}
    noisy = HOST.run(remove_tgate(pipe), prompt="a red circle", generator=torch.Generator(), **embeds)
    assert noisy.isfinite().all()
    assert not any("TGate" in type(processor).__name__ for processor in pipe.unet.attn_processors.values())
    pipe.disable_free_noise()
    assert torch.equal(HOST.run(pipe), baseline)
