"""What changes the text, the guidance or the UNet's blocks, and not the layers: before and after are the same."""

import pytest
import torch
from transformers import CLIPTextModelWithProjection

from tests.zoo.addons import text_encoder, tokenizer
from tests.zoo.case import STEPS, images
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import GOLDEN_SD, GOLDEN_XL, load_golden
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate

GATE = 2
PROMPT = ["a large red circle on a white background", "a blue ring to the left of a green square"]


@pytest.fixture
def pipe():
    pipe = load_golden(*GOLDEN_SD)
    pipe.register_modules(text_encoder=text_encoder(), tokenizer=tokenizer())
    return pipe


def run(pipe, **call):
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": PROMPT[0], "num_inference_steps": STEPS, "output_type": "latent", **call}
    return pipe(generator=generator, height=64, width=64, **call).images


def test_prompts_and_their_embeddings_give_the_same(pipe):
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative_prompt=["blurred", "dark"])
    apply_tgate(pipe, GATE)
    expected = run(pipe, prompt=PROMPT, negative_prompt=["blurred", "dark"])
    given = run(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(given, expected)
    assert get_tgate_report(pipe).half_batch_forwards == STEPS - GATE


@pytest.fixture
def xl_pipe():
    pipe = load_golden(*GOLDEN_XL)
    pipe.register_modules(
        text_encoder=text_encoder(width=16),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, width=16),
        tokenizer_2=tokenizer(),
    )
    return pipe


@pytest.mark.parametrize("call", [{"clip_skip": 1}, {"guidance_rescale": 0.7}], ids=["clip_skip", "guidance_rescale"])
def test_arguments_of_the_call(xl_pipe, call):
    pipe = xl_pipe
    baseline = run(pipe, **call)
    assert torch.equal(run(apply_tgate(pipe, 99), **call), baseline)
    gated = run(apply_tgate(pipe, GATE), **call)
    assert not torch.equal(gated, baseline)
    assert not torch.equal(gated, run(pipe))
    assert torch.equal(run(remove_tgate(pipe), **call), baseline)


def test_textual_inversion(pipe):
    token = {"<thing>": torch.randn(2, 32, generator=torch.Generator().manual_seed(3))}
    prompt = "a <thing> on a white background"
    other = load_golden(*GOLDEN_SD)
    other.register_modules(text_encoder=text_encoder(), tokenizer=tokenizer())
    pipe.load_textual_inversion(dict(token))
    baseline = run(pipe, prompt=prompt)
    expected = run(apply_tgate(pipe, GATE), prompt=prompt)
    without = run(apply_tgate(other, GATE), prompt=prompt)
    other.load_textual_inversion(dict(token))
    assert torch.equal(run(other, prompt=prompt), expected)
    other.unload_textual_inversion()
    assert torch.equal(run(other, prompt=prompt), without)
    assert not torch.equal(without, expected)
    assert torch.equal(run(remove_tgate(pipe), prompt=prompt), baseline)


def test_free_u(pipe):
    plain = run(apply_tgate(pipe, GATE))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    expected = run(pipe)
    assert not torch.equal(expected, plain)
    remove_tgate(pipe)
    baseline = run(pipe)
    assert torch.equal(run(apply_tgate(pipe, GATE)), expected)
    assert torch.equal(run(remove_tgate(pipe)), baseline)
    pipe.disable_freeu()
    assert torch.equal(run(apply_tgate(pipe, GATE)), plain)


def test_base_and_refiner_are_gated_apart():
    base_case, refiner_case = BY_NAME["sdxl"], BY_NAME["sdxl_img2img"]
    base, refiner = base_case.build(), refiner_case.build()
    torch.nn.init.normal_(refiner.unet.conv_out.weight, std=0.1)

    def chain():
        latents = base_case.run(base, num_inference_steps=10, denoising_end=0.6)
        return refiner_case.run(refiner, num_inference_steps=10, denoising_start=0.6, image=latents, guidance_scale=4.0)

    baseline = chain()
    apply_tgate(base, 0.5)
    only_base = chain()
    apply_tgate(refiner, 1)
    both = chain()
    assert len({tensor.sum().item() for tensor in (baseline, only_base, both)}) == 3
    reports = get_tgate_report(base), get_tgate_report(refiner)
    assert [(report.num_inference_steps, report.gate_step) for report in reports] == [(6, 3), (4, 1)]
    assert [report.half_batch_forwards for report in reports] == [3, 3]
    remove_tgate(base)
    assert is_tgate_applied(refiner)
    apply_tgate(base, 0.5)
    remove_tgate(refiner)
    assert torch.equal(chain(), only_base)
    remove_tgate(base)
    assert torch.equal(chain(), baseline)


def test_denoising_end_of_a_pipeline_that_does_not_tell_its_steps():

    host = BY_NAME["sdxl_adapter"]
    pipe = apply_tgate(host.build(), 0.5)
    host.run(pipe, num_inference_steps=10, denoising_end=0.6)
    report = get_tgate_report(pipe)
    assert (report.num_inference_steps, report.gate_step) == (6, 3)
    assert (report.full_batch_forwards, report.half_batch_forwards) == (3, 3)


def test_a_control_image_of_the_wrong_batch_gets_the_error_of_diffusers_and_leaves_nothing():
    case = BY_NAME["sd_controlnet"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    with pytest.raises(ValueError, match="image batch size"):
        case.run(pipe, image=images([50, 51, 52]))
    assert torch.equal(case.run(pipe), expected)


@pytest.mark.parametrize("step", [0, GATE, STEPS - 2])
def test_text_that_is_exchanged_after_the_gate_is_stale_and_warned_of_once(step, caplog):
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    inputs = ["latents", "prompt_embeds"]

    def exchange(pipe, index, timestep, kwargs):
        return kwargs | ({"prompt_embeds": kwargs["prompt_embeds"] * 0.5} if index == step else {})

    call = {"callback_on_step_end": exchange, "callback_on_step_end_tensor_inputs": inputs}
    stale = step >= GATE
    for _ in range(2):
        assert torch.equal(case.run(pipe, **call), expected) is stale
    messages = [record.message for record in caplog.records if record.name == "tgate_processors"]
    assert len(messages) == int(stale)
    assert not messages or f"exchanged in step {step + 1}, after the gate" in messages[0]


def test_guidance_switched_off_by_a_callback_is_not_taken_for_another_text(caplog):
    from diffusers.callbacks import SDCFGCutoffCallback

    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    case.run(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3))
    assert not caplog.records
