"""`estimate_cost` of pipelines of every kind against the layers that run in one."""

import pytest
import torch

from tests.zoo.case import STEPS, TIERS
from tests.zoo.catalogue import CROSS_ATTENTION, JOINT_ATTENTION, SEQUENTIAL
from tests.zoo.cross_attention import TOKENS
from tgate_processors import TGateSchedule, apply_tgate, estimate_cost
from tgate_processors._internal.families import guidance_distillation_flag

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
GATE = 3
ALL = [*CROSS_ATTENTION, *SEQUENTIAL, *JOINT_ATTENTION]


def layers_of(pipe):
    """Multiply-accumulates of the layers of the denoisers from now on, in a list of one."""
    taken = [0]

    def count(layer, args, output):
        each = layer.in_features if isinstance(layer, torch.nn.Linear) else layer.weight[0].numel()
        taken[0] += output.numel() * each

    for name in ("unet", "transformer", "transformer_2"):
        for layer in getattr(pipe, name, torch.nn.Module()).modules() if getattr(pipe, name, None) else ():
            if isinstance(layer, LAYERS):
                layer.register_forward_hook(count)
    return taken


# What an estimate has to be told of a call, beside its size.
TOLD = {
    **{name: {"max_sequence_length": 512} for name in ("wan_image", "wan_animate", "chronoedit", "skyreels_image")},
    **{name: {"num_frames": 8} for name in ("stable_audio3", "stable_audio3_audio", "stable_audio3_inpaint")},
    **{name: {"num_frames": 5} for name in ("wan_video", "cogvideox_video", "cogvideox_control")},
    "ltx2": {"extra_forwards": []},
    "ltx2_image": {"extra_forwards": []},
    "ltx2_condition": {"extra_forwards": []},
    "ltx2_hdr": {"extra_forwards": []},
    "hunyuan_controlnet": {"max_sequence_length": None},
    "audioldm2": {"height": 64, "width": 16},
    "ernie": {"max_sequence_length": 3},
}
# What pipelines call the number of frames; Latte's is that of the configuration.
FRAMES = ("num_frames", "frames", "segment_frame_length")
# A time for every token, by default.
QUICK = "ltx_image"
MORE = [
    # Pictures by a denoiser of videos, no guidance, and places.
    "cosmos2",
    "kandinsky5_picture",
    "stable_audio3_audio",
    "ernie",
    "ltx_condition",
    "ltx2_image",
    "ltx2_condition",
    "ltx2_hdr",
    "latte",
    "sana_controlnet",
    "sana_video",
    "sana_video_image",
    "hunyuan_controlnet",
    "wan_experts",
    "wan_image",
    "wan_vace",
    "wan_animate",
    "wan_video",
    "chronoedit",
    "skyreels",
    "skyreels_image",
    "lucy",
    "cosmos",
    "cosmos_video",
    "cosmos2_video",
    "cosmos25",
    "kandinsky5_image",
    "kandinsky5_image_video",
    "stable_audio3_inpaint",
    "prx",
    "chroma_image",
    "chroma_inpaint",
    "flux_image",
    "flux_inpaint",
    "flux_controlnet",
    "qwen_image",
    "qwen_controlnet",
    "cogvideox_image",
    "cogvideox_video",
    "cogvideox_control",
    "hunyuan_video_image",
    "hunyuan_skyreels",
    "cogview4_control",
]


def sizes(kind):
    """The arguments of `estimate_cost` that say how large the inputs of a kind are."""
    frames = next((kind.size[name] for name in FRAMES if name in kind.size), None)
    sides = {name: kind.size[name] for name in ("height", "width") if name in kind.size}
    told = {"max_sequence_length": TOKENS, "num_frames": frames, **sides, **TOLD.get(kind.name, {})}
    return {name: value for name, value in told.items() if value is not None}


def tier_of(kind):
    # What denoisers with joint attention take is told in tests/laws/test_joint.py too.
    return TIERS["thorough" if not kind.way["cross_attention"] or kind.tier == "thorough" else "slow"]


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(k, id=k.name) for k in ALL if k.name == QUICK),
        *(pytest.param(k, marks=tier_of(k), id=k.name) for k in ALL if k.name in MORE),
    ],
)
def test_the_estimate_is_what_the_layers_take(kind):
    alone = {} if kind.way["cross_attention"] else kind.way
    negative = (
        {"do_classifier_free_guidance": True}
        if guidance_distillation_flag(kind.build().transformer) and kind.is_guided
        else {}
    )
    pipe = kind.build()
    taken = layers_of(pipe)
    kind.run(pipe)
    cost = estimate_cost(pipe, TGateSchedule(GATE), STEPS, **sizes(kind), **alone, **negative)
    assert cost.without_tgate.layers == taken[0]
    taken[0] = 0
    kind.run(apply_tgate(pipe, GATE, **alone))
    assert cost.with_tgate.layers == taken[0]


def test_latte_has_as_many_frames_as_its_configuration():
    pipe = next(kind for kind in ALL if kind.name == "latte").build()
    with pytest.raises(ValueError, match="num_frames=3, but this LatteTransformer3DModel has places for 2"):
        estimate_cost(pipe, TGateSchedule(GATE), STEPS, height=32, width=32, num_frames=3)


def test_guidance_of_a_call_that_has_none_is_refused():
    pipe = next(kind for kind in ALL if kind.name == "stable_audio3_audio").build()
    with pytest.raises(
        ValueError, match="do_classifier_free_guidance=True, but the call of StableAudio3AudioToAudioPipeline takes no"
    ):
        estimate_cost(pipe, TGateSchedule(GATE), STEPS, do_classifier_free_guidance=True)
