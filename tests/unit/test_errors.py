"""Bad input: an error that names the value and the remedy, and a pipeline that still works."""

import dataclasses
import math
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from tests.support.settings import apply_settings
from tests.zoo.case import seeded, slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.cross_attention import assemble, ltx, ltx2, model, wan_vae
from tests.zoo.inventory import shell
from tests.zoo.sequential import cosmos, wan
from tgate_processors import (
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    is_tgate_applied,
    measure_convergence,
    remove_tgate,
)

CASE = BY_NAME["sd"]


def still_works(pipe, baseline):
    assert not is_tgate_applied(pipe)
    assert not pipe.unet._forward_pre_hooks
    assert torch.equal(CASE.run(pipe), baseline)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gate_step": 0}, ValueError, 'such as "FFFF-F--FH" or a TGateSchedule, got 0.'),
        ({"gate_step": -1}, ValueError, "got -1."),
        ({"gate_step": True}, TypeError, "got True of type bool."),
        ({"gate_step": "10"}, ValueError, "got '10'. Write 10 without quotes."),
        ({"gate_step": 1.5}, ValueError, "between 0 and 1, a plan"),
        ({"gate_step": math.nan}, ValueError, "got nan."),
        ({"sp_interval": 0}, ValueError, "`sp_interval` must be an int of at least 1, got 0."),
        ({"fi_interval": 0}, ValueError, "`fi_interval` must be an int of at least 1, got 0."),
        ({"warm_up": -1}, ValueError, "`warm_up` must be an int of at least 0, got -1."),
        (
            {"cfg_half": "negative"},
            ValueError,
            '"unconditional" or "conditional", got \'negative\'.',
        ),
        ({"gate": 3}, TypeError, "unexpected keyword argument 'gate'"),
        (
            {"deepcache": 3},
            TypeError,
            "`deepcache` must be a DeepCacheSDHelper(pipe) from `pip install DeepCache`, got 3 of type int.",
        ),
    ],
)
def test_a_bad_setting(settings, error, message):
    pipe = CASE.build()
    baseline = CASE.plain()
    with pytest.raises(error, match=re.escape(message)):
        apply_settings(pipe, **settings)
    still_works(pipe, baseline)
    # Nor does it touch what is applied already.
    expected = CASE.gated(3)
    apply_tgate(pipe, 3)
    with pytest.raises(error, match=re.escape(message)):
        apply_settings(pipe, **settings)
    assert torch.equal(CASE.run(pipe), expected)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.array(0.5), 0.5),
        (Fraction(1, 2), 0.5),
        (Decimal("0.5"), 0.5),
        (torch.tensor(0.5), 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_every_kind_are_taken(given, meant):
    assert TGateSchedule(given) == TGateSchedule(meant)
    assert type(TGateSchedule(given).gate_step) is type(meant)


@pytest.mark.parametrize("given", [torch.tensor([3]), np.array([0.5]), torch.tensor(True), 1j, None, [3]], ids=str)
def test_what_is_no_number_is_refused(given):
    with pytest.raises(TypeError, match=r"`gate_step` must be .*a number of steps.* got .* of type \w+\."):
        TGateSchedule(given)


class Unwilling:
    """What raises errors of its own for everything that a number or a setting is asked."""

    def refuse(self, *args):
        raise RuntimeError("no")

    __float__ = __index__ = __eq__ = __repr__ = __len__ = __bool__ = refuse
    __hash__ = object.__hash__


ODD = [
    10**400,
    10**5000,
    Fraction(10**400),
    float,
    Decimal("sNaN"),
    torch.tensor(1 + 1j),
    torch.empty((), device="meta"),
    np.datetime64("2020-01-01"),
    np.array([1, 2]),
    Unwilling(),
    *map(
        slow,
        (
            -(10**5000),
            int,
            torch.tensor(1 + 0j),
            torch.empty((), device="meta", dtype=torch.int64),
            np.timedelta64(1, "s"),
            np.complex64(1),
            np.array("drop"),
            torch.ones(2),
        ),
    ),
]
SCHEDULED = [field.name for field in dataclasses.fields(TGateSchedule)]
APPLIED = [*SCHEDULED, "cfg_half", "cross_attention", "max_memory", "custom_processors", "deepcache"]
COUNTED = [
    "num_inference_steps",
    "do_classifier_free_guidance",
    "height",
    "width",
    "batch_size",
    "max_sequence_length",
    "num_frames",
]
COUNTED += ["vae_scale_factor", "dtype", "cross_attention", "max_memory", "extra_forwards"]


@pytest.fixture(scope="module")
def untouched():
    return CASE.build()


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{type(value).__module__}.{type(value).__name__}")
def test_what_is_no_setting_at_all_is_refused_by_name_everywhere(value, untouched):
    pipe, schedule = untouched, TGateSchedule(2)
    ways = [(name, lambda name=name: apply_settings(pipe, **{name: value})) for name in APPLIED]
    ways += [(name, lambda name=name: TGateSchedule(**{name: value})) for name in SCHEDULED]
    ways += [
        (name, lambda name=name: estimate_cost(pipe, schedule, **{"num_inference_steps": 5, name: value}))
        for name in COUNTED
    ]
    ways += [
        ("schedule", lambda: estimate_cost(pipe, value, 5)),
        ("schedule", lambda: TGateCallback(value)),
        ("cfg_half", lambda: TGateCallback(schedule, cfg_half=value)),
        ("num_inference_steps", lambda: schedule.plan(value)),
        ("num_inference_steps", lambda: schedule.resolve_gate_step(value)),
        ("tolerances", lambda: measure_convergence(pipe, ["a circle"], tolerances=[value])),
        ("prompts", lambda: measure_convergence(pipe, [value])),
        ("call", lambda: measure_convergence(pipe, ["a circle"], value)),
    ]
    for name, way in ways:
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            way()
    assert not is_tgate_applied(pipe)


def test_sizes_larger_than_torch_counts_are_refused_by_name():
    with pytest.raises(ValueError, match=r"height, width, .* larger than torch counts"):
        estimate_cost(CASE.build(), TGateSchedule(2), 5, height=8 * 10**5, width=8 * 10**5)


def test_joint_attention_is_told_what_helps_there():
    with pytest.raises(ValueError, match=r"enable_cache\(FirstBlockCacheConfig\(\)\)"):
        apply_tgate(added_keys())


def test_intervals_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        apply_tgate(CASE.build(), 10, 5)


@pytest.mark.parametrize("function", [apply_tgate, remove_tgate, is_tgate_applied, get_tgate_report])
@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "pipe is None, of type NoneType, not a diffusers pipeline: pass a DiffusionPipeline."),
        (3, "pipe is 3, of type int, not a diffusers pipeline: pass a DiffusionPipeline."),
        (
            "a/folder",
            "pipe is the name 'a/folder', not a diffusers pipeline: load it, DiffusionPipeline.from_pretrained(",
        ),
        (Path("a/folder"), "pipe is the name 'a/folder', not a diffusers pipeline: load it, DiffusionPipeline.from_"),
        (
            torch.nn.Linear(2, 2),
            "pipe is of type Linear, not a diffusers pipeline: pass the DiffusionPipeline that it is a part",
        ),
        (
            diffusers.StableDiffusionPipeline,
            "pipe is the class StableDiffusionPipeline, not a diffusers pipeline: make a pipeline of it, Stable",
        ),
    ],
    ids=["none", "number", "name", "path", "module", "class"],
)
def test_not_a_pipeline(function, thing, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        function(thing)


def test_swapped_arguments():
    with pytest.raises(TypeError, match=re.escape("the arguments are swapped: write apply_tgate(pipe, gate_step=10).")):
        apply_tgate(10, CASE.build())


def test_a_report_without_tgate():
    with pytest.raises(ValueError, match="not applied to this StableDiffusionPipeline: call apply_tgate"):
        get_tgate_report(CASE.build())


def test_removing_what_is_not_there_does_nothing():
    pipe = CASE.build()
    baseline = CASE.plain()
    assert remove_tgate(pipe) is pipe
    still_works(pipe, baseline)


def ddpm(attention):
    down = "AttnDownBlock2D" if attention else "DownBlock2D"
    up = "AttnUpBlock2D" if attention else "UpBlock2D"
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", down),
        up_block_types=(up, "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        add_attention=attention,
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


def semantic():
    components = {key: value for key, value in CASE.build().components.items() if key != "image_encoder"}
    return diffusers.SemanticStableDiffusionPipeline(**components, requires_safety_checker=False)


def panorama():
    components = {key: value for key, value in CASE.build().components.items() if key != "image_encoder"}
    return diffusers.StableDiffusionPanoramaPipeline(**components, requires_safety_checker=False)


def attention_guidance():
    return diffusers.StableDiffusionSAGPipeline(**CASE.build().components, requires_safety_checker=False)


def free_noise():

    pipe = BY_NAME["animatediff"].build()
    pipe.enable_free_noise(context_length=2, context_stride=1)
    return pipe


def added_keys():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=8,
    )
    absent = dict.fromkeys(["tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"])
    return diffusers.IFPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(), requires_safety_checker=False, **absent)


class OwnUNet(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A denoiser that nobody knows."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(4, cross_attention_dim=4)


def own_denoiser():
    pipe = CASE.build()
    pipe.unet = OwnUNet()
    return pipe


def ledits():
    components = CASE.build().components
    return diffusers.LEditsPPPipelineStableDiffusion(
        **{key: value for key, value in components.items() if key != "image_encoder"}, requires_safety_checker=False
    )


def kandinsky():
    movq = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2)
    return diffusers.KandinskyV22Pipeline(unet=added_keys().unet, scheduler=diffusers.DDPMScheduler(), movq=movq)


def stable_cascade():
    decoder = diffusers.StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=16,
        dropout=(0.1, 0.1),
        switch_level=(False,),
    )
    scheduler = diffusers.DDPMWuerstchenScheduler()
    return diffusers.StableCascadeDecoderPipeline(decoder, None, None, scheduler, None)


def diffusion_forcing():
    return assemble("SkyReelsV2DiffusionForcingPipeline", transformer=wan("SkyReelsV2Pipeline").transformer)


def cosmos_transfer():
    return cosmos("Cosmos2_5_TransferPipeline", vae=wan_vae())


def motif(**components):
    sizes = {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    sizes |= {"num_layers": 1, "num_single_layers": 1, "text_embed_dim": 8, "rope_axes_dim": (4, 6, 6)}
    return assemble("MotifVideoPipeline", transformer=model("MotifVideoTransformer3DModel", **sizes), **components)


def distilled_ltx2():
    return ltx2("LTX2DFRPipeline")


def long_ltx():
    return assemble("LTXI2VLongMultiPromptPipeline", transformer=ltx().transformer)


def needs(pipeline, build, reason):
    """A row that the oldest diffusers may not have."""
    return pytest.param(build, reason, marks=pytest.mark.skipif(not hasattr(diffusers, pipeline), reason=pipeline))


def without_denoiser():
    pipe = CASE.build()
    pipe.unet = None
    return pipe


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ddpm(attention=True), "UNet2DModel has no cross-attention"),
        (lambda: ddpm(attention=False), "UNet2DModel has no attention"),
        (semantic, "semantic guidance adds a part to the batch for every edit"),
        (panorama, "it denoises several views in every step"),
        (attention_guidance, "it has no callback_on_step_end, no num_timesteps, no do_classifier_free_guidance"),
        (free_noise, "with FreeNoise: its attention layers run once for every window"),
        (added_keys, "UNet2DConditionModel has joint attention"),
        (kandinsky, "UNet2DConditionModel has joint attention"),
        (ledits, "semantic guidance adds a part to the batch for every edit"),
        (own_denoiser, "T-GATE does not know how unet=OwnUNet does guidance"),
        (stable_cascade, "it denoises with decoder=StableCascadeUNet, whose attention joins the text with other keys"),
        needs(
            "SkyReelsV2DiffusionForcingPipeline",
            diffusion_forcing,
            "it denoises windows of frames, each with noise of its own (diffusion forcing)",
        ),
        needs(
            "Cosmos2_5_TransferPipeline",
            cosmos_transfer,
            "it denoises a video in pieces, with a ControlNet that runs twice in every step",
        ),
        needs("MotifVideoPipeline", motif, "MotifVideoTransformer3DModel has joint attention"),
        needs("LTX2DFRPipeline", distilled_ltx2, "calls its denoiser once for every tile of a video in each step"),
        needs("AnyFlowFARPipeline", lambda: shell("AnyFlowFARPipeline"), "it denoises a video piece by piece"),
        needs("Cosmos3OmniPipeline", lambda: shell("Cosmos3OmniPipeline"), "its Cosmos3OmniTransformer packs text, "),
        needs("LTXI2VLongMultiPromptPipeline", long_ltx, "it denoises windows of frames that overlap"),
        (without_denoiser, "it has no `unet` or `transformer` at present."),
    ],
    ids=[
        "no_cross_attention",
        "no_attention",
        "semantic",
        "panorama",
        "attention_guidance",
        "free_noise",
        "added_keys",
        "kandinsky",
        "ledits",
        "unknown",
        "stable_cascade",
        "diffusion_forcing",
        "cosmos_transfer",
        "motif",
        "distilled_ltx2",
        "any_flow_far",
        "cosmos3",
        "long_ltx",
        "no_denoiser",
    ],
)
def test_a_pipeline_that_cannot_be_gated_is_refused_with_the_reason(build, reason):
    pipe = build()
    before = dict(vars(pipe))
    instead = (
        r"(You can still use|What helps there is|Load one|Call pipe\.disable_free_noise\(\)|cross_attention=False\))"
    )
    with pytest.raises(ValueError, match=f"^{type(pipe).__name__} cannot be gated:? .*{re.escape(reason)}.*{instead}"):
        apply_tgate(pipe)
    assert vars(pipe) == before
    assert not is_tgate_applied(pipe)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(diffusers, "MotifVideoPipeline"), reason="this diffusers has no Motif")
def test_motif_with_a_guider_is_gated_by_it():
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe = motif(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=wan_vae(), guider=guider)
    calls = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(1))
    given = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 5, "output_type": "latent"}
    for name in ("prompt", "negative_prompt"):
        given |= {f"{name}_embeds": seeded((1, 5, 8), len(name)), f"{name}_attention_mask": torch.ones(1, 5)}

    def run():
        calls.clear()
        return pipe(**given, generator=torch.Generator().manual_seed(0)).frames

    plain = run()
    assert len(calls) == 10
    assert torch.equal((apply_tgate(pipe, tolerance=0), run())[1], plain)
    assert not torch.equal((apply_tgate(pipe, 2), run())[1], plain)
    assert len(calls) == 2 * 2 + 3
    assert remove_tgate(pipe).guider is guider
    assert torch.equal(run(), plain)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(diffusers, "MotifVideoPipeline"), reason="this diffusers has no Motif")
@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds"])
def test_what_a_callback_exchanges_in_motif_gets_a_full_step(name, caplog):
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    pipe = motif(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=wan_vae(), guider=guider)
    given = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 9, "output_type": "latent"}
    for kind in ("prompt", "negative_prompt"):
        given |= {f"{kind}_embeds": seeded((1, 5, 8), len(kind)), f"{kind}_attention_mask": torch.ones(1, 5)}
    given |= {"callback_on_step_end_tensor_inputs": ["latents", name]}

    def run(at):
        def callback(pipe, step, timestep, tensors):
            return {**tensors, name: tensors[name].flip(1)} if step in at else tensors

        return pipe(**given, generator=torch.Generator().manual_seed(0), callback_on_step_end=callback).frames

    full = {"drop": (0, 1, 5) if name == "latents" else (0, 1), "predict": (0, 1, 5)}
    for guidance, steps in full.items():
        apply_tgate(pipe, 2, guidance=guidance)
        run([4])
        assert get_tgate_report(pipe).full_steps == steps
    for settings, levels in (({"forecast": False}, "FFFHFFFFH"), ({}, "FFF--FFFH")):
        apply_settings(pipe, tolerance=math.inf, **settings)
        run([4])
        assert get_tgate_report(pipe).levels == levels
    assert not caplog.records
    run(range(9))
    assert get_tgate_report(pipe).full_steps == tuple(range(9))
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("T-GATE: nothing was gated in this call of MotifVideoPipeline")


def test_a_bad_argument_of_the_call_gets_the_pipelines_own_error():
    case = BY_NAME["svd"]
    pipe = apply_tgate(case.build(), 3)
    expected = case.gated(3)
    with pytest.raises(
        TypeError, match=r"StableVideoDiffusionPipeline.__call__\(\) got an unexpected keyword argument"
    ):
        case.run(pipe, nonsense=1)
    with pytest.raises(ValueError, match="divisible by 8"):
        case.run(pipe, height=63)
    assert torch.equal(case.run(pipe), expected)


def test_a_batch_that_is_not_what_guidance_makes_it_is_found_out():
    pipe = CASE.build()
    # Somebody else's hooks double the batch of an unguided call.
    double = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (torch.cat([args[0]] * 2), args[1]),
            {**kwargs, "encoder_hidden_states": torch.cat([kwargs["encoder_hidden_states"]] * 2)},
        ),
        with_kwargs=True,
    )
    halve = pipe.unet.register_forward_hook(lambda module, args, output: (output[0].chunk(2)[0],))
    apply_tgate(pipe, 3)
    with pytest.raises(ValueError, match=r"batch of 2 for 1 latents .*guidance off.*remove_tgate"):
        CASE.run(pipe, guidance_scale=1.0)
    double.remove()
    halve.remove()
    assert CASE.run(pipe, guidance_scale=1.0).isfinite().all()
    assert get_tgate_report(pipe).cross_attention_reused == 3


@pytest.mark.parametrize("cross_attention", [None, False, True])
def test_an_unknown_denoiser_is_told_of_all_that_can_be_gated_so(cross_attention):
    with pytest.raises(ValueError, match="does not know how unet=OwnUNet") as error:
        apply_tgate(own_denoiser(), cross_attention=cross_attention)
    assert ("SD3Transformer2DModel" in str(error.value)) is (cross_attention is not True)
    assert "UNet2DConditionModel" in str(error.value)


@pytest.mark.parametrize(("setting", "value"), [("guidance", "predict"), ("tolerance", 0.1)])
def test_what_a_schedule_says_is_not_said_beside_it(setting, value):
    pipe = CASE.build()
    for schedule in (TGateSchedule(), TGateSchedule(3)):
        message = f"`{setting}` must be left out beside a TGateSchedule, got {value!r}. Put it in the schedule: "
        with pytest.raises(ValueError, match=re.escape(f"{message}TGateSchedule(..., {setting}={value!r}).")):
            apply_tgate(pipe, schedule, **{setting: value})
    assert not is_tgate_applied(pipe)


@pytest.mark.parametrize("setting", ["sp_interval", "fi_interval", "warm_up", "cfg_interval", "forecast", "levels"])
def test_what_only_a_schedule_says_is_no_argument(setting):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        apply_tgate(CASE.build(), **{setting: 2})


@pytest.mark.parametrize("given", [3, 0.5, "auto", "FFFH-F", np.int64(3)], ids=repr)
def test_what_stands_for_a_schedule_is_taken_wherever_a_schedule_is(given):
    schedule, size = TGateSchedule(given), {"height": 64, "width": 64}
    assert apply_tgate(CASE.build(), given)._tgate.state.schedule == schedule
    assert apply_tgate(CASE.build(), schedule)._tgate.state.schedule is schedule
    assert TGateCallback(given).state.schedule == schedule
    assert TGateCallback(schedule).state.schedule is schedule
    assert estimate_cost(CASE.build(), given, 6, **size) == estimate_cost(CASE.build(), schedule, 6, **size)


WRONG = [
    # What stands in the place of the schedule.
    (lambda pipe: apply_tgate(pipe, 10.0), "got 10.0. For a number of steps, write 10."),
    (lambda pipe: apply_tgate(pipe, "10"), "got '10'. Write 10 without quotes."),
    (lambda pipe: apply_tgate(pipe, "Auto"), "got 'Auto'. Write \"auto\"."),
    (lambda pipe: apply_tgate(pipe, "ffhh"), "got 'ffhh'. Write \"FFHH\"."),
    (lambda pipe: apply_tgate(pipe, "full"), "got 'full'. The letters are F (full), H (half) and - (forecast)."),
    (lambda pipe: apply_tgate(pipe, "HF-F"), "`levels` must be a plan that begins with a full step, F, got 'HF-F'."),
    (lambda pipe: apply_tgate(pipe, None), "or a TGateSchedule, got None of type NoneType."),
    (lambda pipe: apply_tgate(pipe, 10**12), "and at most 2147483647, got 1000000000000."),
    (lambda pipe: estimate_cost(pipe, "x", 5), '`schedule` must be "auto", a number of steps, a share of them between'),
    # The error that is accepted.
    (lambda pipe: apply_tgate(pipe, tolerance=60), "got 60. For 60 %, write 0.6."),
    (lambda pipe: apply_tgate(pipe, tolerance=2.1), "must be a relative error between 0 and 2 such as 0.2"),
    (lambda pipe: measure_convergence(pipe, ["x"], tolerances=[20]), "`tolerances` must be a relative error between"),
    (lambda pipe: apply_tgate(pipe, 10, tolerance=0.2), "`tolerance` must be left out with gate_step=10, got 0.2."),
    (lambda pipe: apply_tgate(pipe, 0.2, tolerance=0.2), "`tolerance` must be left out with gate_step=0.2, got 0.2."),
    (lambda pipe: apply_tgate(pipe, "FFH", tolerance=0.2), "`tolerance` must be left out with levels='FFH', got 0.2."),
    # What has no meaning beside something else.
    (lambda pipe: apply_tgate(pipe, guidance="drop"), "To drop it, give a number of steps: gate_step=10."),
    (lambda pipe: apply_tgate(pipe, "FFH", guidance="drop"), "got 'drop'. A plan of levels predicts guidance."),
    (lambda pipe: TGateSchedule(cfg_interval=3), 'give a number of steps: gate_step=10 and guidance="predict".'),
    (lambda pipe: TGateSchedule(10, guidance="drop", cfg_interval=3), "`cfg_interval` must be left out where guidance"),
    (lambda pipe: TGateSchedule(warm_up=2), '`warm_up` must be left out with gate_step="auto", got 2. To use it,'),
    (lambda pipe: TGateSchedule("FFH", warm_up=2), "`warm_up` must be left out beside levels='FFH', got 2. It is for"),
    (lambda pipe: TGateSchedule(5, levels="FFH"), "`gate_step` must be left out beside levels='FFH', got 5. Both say"),
    (lambda pipe: TGateSchedule("FFH", forecast=True), "got True. The letter - stands for a forecast step."),
    (lambda pipe: TGateSchedule("FFH").plan(5), "`levels` must have a letter for each of the 5 steps that run, got 3"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_meant_is_told_what_to_write(wrong, message, untouched):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        wrong(untouched)
    assert not is_tgate_applied(untouched)


@pytest.mark.parametrize(
    ("doubtful", "message"),
    [
        (lambda pipe: apply_tgate(pipe, 0.2), "gate_step=0.2 drops guidance after 20 % of the steps. For an error to"),
        (lambda pipe: apply_tgate(pipe, TGateSchedule(10, warm_up=3)), "warm_up=3 has no effect with sp_interval=1"),
        (
            lambda pipe: apply_tgate(pipe, TGateSchedule(5, 2, warm_up=5)),
            "sp_interval=2 has no effect, as gate_step=5 ",
        ),
    ],
)
def test_what_is_hardly_meant_works_with_a_warning(doubtful, message, caplog):
    pipe = CASE.build()
    doubtful(pipe)
    (record,) = caplog.records
    assert record.message.startswith(f"T-GATE: {message}")
    assert is_tgate_applied(pipe)


def test_what_is_clearly_meant_gives_no_warning(caplog):
    pipe = CASE.build()
    for given, settings in ((0.2, {"guidance": "drop"}), (0.3, {}), (TGateSchedule(0.2), {}), (1, {})):
        apply_tgate(pipe, given, **settings)
    apply_tgate(pipe, TGateSchedule(5, 2, warm_up=4))
    assert not caplog.records
