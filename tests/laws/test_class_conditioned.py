"""AudioLDM and MusicLDM, whose layers attend to no text: guidance alone, as the text is a class."""

import diffusers
import pytest
import torch
from transformers import ClapTextConfig, ClapTextModelWithProjection

from tests.support.comparing import distance
from tests.support.prediction import errors_of
from tests.support.settings import EVERY, FIXED, PATIENT, full_steps
from tests.support.states import check_restored, snapshot
from tests.zoo.core import STEPS, rows, seeded
from tests.zoo.cross_attention import Kind, assemble, audioldm2, model
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate

ALONE = {"cross_attention": False}
DROP = {"gate_step": 3}


def sound(name):
    """A pipeline whose UNet is told the text together with the time."""
    unet = model(
        "UNet2DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=2,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True,
    )
    vae = model(
        "AutoencoderKL",
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = ClapTextModelWithProjection(ClapTextConfig(**sizes, projection_dim=8, vocab_size=8)).eval()
    parts = {"vae": vae, "text_encoder": encoder, "vocoder": audioldm2().vocoder}
    return assemble(name, unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False), **parts)


def classes(prompts, guided):
    names = (("", 100), ("negative_", 200)) if guided else (("", 100),)
    return {f"{name}prompt_embeds": torch.stack([seeded((8,), seed + p) for p in prompts]) for name, seed in names}


def kind_of(name):
    more = {"size": {"audio_length_in_s": 16.0}, "extra": {"output_type": "pt"}, "denoiser": "unet", "first": "conv_in"}
    return Kind(name, lambda: sound(f"{name}Pipeline"), classes, pipeline=f"{name}Pipeline", tier="thorough", **more)


KINDS = [kind_of("AudioLDM"), kind_of("MusicLDM")]
every = pytest.mark.parametrize("kind", rows(KINDS))


@every
def test_guidance_is_gated_alone_and_nothing_else(kind):
    pipe = kind.build()
    seen = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    baseline, before = kind.run(pipe), snapshot(pipe, kind)
    for settings in (DROP, FIXED):
        seen.clear()
        gated = kind.run(apply_tgate(pipe, **settings, **ALONE))
        full = full_steps(STEPS, settings) if settings is FIXED else range(3)
        assert seen == [2 if step in full else 1 for step in range(STEPS)]
        report = get_tgate_report(pipe)
        assert (report.full_steps, report.half_batch_forwards) == (tuple(full), STEPS - len(full))
        assert not torch.equal(gated, baseline)
        assert torch.equal(kind.run(pipe), gated)
    for settings in EVERY:
        assert torch.equal(kind.run(apply_tgate(pipe, **settings, **ALONE)), baseline)
    remove_tgate(pipe)
    check_restored(before, snapshot(pipe, kind))
    assert torch.equal(kind.run(pipe), baseline)


@every
def test_the_halves_of_a_half_step_differ_by_the_prediction(kind):
    pipe, outputs = apply_tgate(kind.build(), **PATIENT, **ALONE), []
    pipe.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    kind.run(pipe)
    report = get_tgate_report(pipe)
    errors = errors_of(outputs, report.full_steps, None, kind.guidance, judged=True, conditional_first=False)
    assert list(report.prediction_errors) == errors != []
    assert report.half_batch_forwards > 0


@every
def test_two_prompts_are_two_single_ones_and_a_call_without_guidance_is_the_plain_one(kind):
    pipe = apply_tgate(kind.build(), **FIXED, **ALONE)
    singles = torch.cat([kind.run(pipe, [0]), kind.run(pipe, [1])])
    assert distance(kind.run(pipe, [0, 1]), singles) < 1e-4
    assert torch.equal(kind.run(pipe, **kind.off), kind.plain(**kind.off))
    assert get_tgate_report(pipe).half_batch_forwards == 0


@every
@pytest.mark.parametrize("settings", [{}, {"cross_attention": True}, {"max_memory": "1GB"}], ids=str)
def test_cross_attention_that_is_none_is_not_gated(kind, settings):
    pipe = kind.build()
    with pytest.raises(ValueError, match=r"attends to no text.* apply_tgate\(pipe, cross_attention=False\) gates gui"):
        apply_tgate(pipe, 3, **settings)
    assert not is_tgate_applied(pipe)
