"""Every pipeline that diffusers exports: which stands for which, and why others are refused."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

import diffusers
import torch

from tests.support.paths import ROOT
from tests.zoo.cross_attention import _HUNYUAN, KINDS
from tests.zoo.joint import JOINT
from tests.zoo.sequential import TWO_CALLS
from tests.zoo.variants import AROUND, AROUND_JOINT, AROUND_TWO

# Accepted with the loop and the denoiser of another one, which is tested.
AS_ANOTHER = {
    "AltDiffusionImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "AltDiffusionPipeline": "StableDiffusionPipeline",
    "HunyuanVideo15ImageToVideoPipeline": "HunyuanVideo15Pipeline",
    "KolorsImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
    "KolorsPAGPipeline": "StableDiffusionXLPAGPipeline",
    "EasyAnimateControlPipeline": "EasyAnimatePipeline",
    "EasyAnimateInpaintPipeline": "EasyAnimatePipeline",
    "MotifVideoImage2VideoPipeline": "MotifVideoPipeline",
    "PIAPipeline": "AnimateDiffPipeline",
    "PRXPixelPipeline": "PRXPipeline",
    "QwenImageEditInpaintPipeline": "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline": "QwenImageEditPipeline",
    "QwenImageLayeredPipeline": "QwenImageEditPipeline",
    "SanaSprintImg2ImgPipeline": "SanaSprintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline": "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionLDM3DPipeline": "StableDiffusionPipeline",
    "StableDiffusionPAGImg2ImgPipeline": "StableDiffusionPAGPipeline",
    "StableDiffusionPAGInpaintPipeline": "StableDiffusionPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGPipeline": "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline": "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGInpaintPipeline": "StableDiffusionXLPAGPipeline",
}

# Gated by their guider, in test_modular.py and test_errors.py.
BY_GUIDER = {"HunyuanVideo15Pipeline", "MotifVideoPipeline"}
# Guidance alone, in test_class_conditioned.py.
TEXTLESS = {"AudioLDMPipeline", "MusicLDMPipeline"}
# By what the error says, without "Pipeline" at the end; what has another end has a full stop instead.
REFUSED = {
    "fills in the tokens of a picture": """
        AmusedImg2Img AmusedInpaint Amused
    """,
    "is guided by a second denoiser": """
        Ideogram4
    """,
    "is told the sizes of all pictures": """
        JoyImageEditPlus
    """,
    "is told given pictures by the place": """
        OmniGen
    """,
    "it has no callback_on_step_end, no num_timesteps, no do_classifier_free_guidance": """
        BlipDiffusionControlNet BlipDiffusion CycleDiffusion DreamLiteMobile DreamLite LDMTextToImage
        MarigoldDepth MarigoldIntrinsics MarigoldNormals StableDiffusionAttendAndExcite
        StableDiffusionDiffEdit StableDiffusionGLIGENTextImage StableDiffusionInpaintPipelineLegacy.
        StableDiffusionModelEditing StableDiffusionParadigms StableDiffusionPipelineSafe.
        StableDiffusionPix2PixZero StableDiffusionSAG TextToVideoZero
        TextToVideoZeroSDXL
    """,
    "has no cross-attention layers": """
        ConsistencyModel DDIM DDPM DiT KarrasVe LDM LDMSuperResolution PNDM RePaint ScoreSdeVe VQDiffusion
    """,
    "with a ControlNet that runs twice in every step": """
        Cosmos2_5_Transfer
    """,
    "has no attention layers": """
        DanceDiffusion
    """,
    "it has no denoiser that T-GATE knows": """
        DiffusionGemma FluxPriorRedux LLaDA2 LTX2LatentUpsample LTX2VideoDiffusionDecode LTXLatentUpsample
        VersatileDiffusionDualGuided VersatileDiffusionImageVariation VersatileDiffusion
        VersatileDiffusionTextToImage
    """,
    "it has no num_timesteps": """
        VisualCloze
    """,
    "text and image share one softmax": """
        IFImg2Img IFImg2ImgSuperResolution IFInpainting IFInpaintingSuperResolution IF IFSuperResolution
        KandinskyCombined KandinskyImg2ImgCombined KandinskyImg2Img KandinskyInpaintCombined KandinskyInpaint
        Kandinsky KandinskyV22Combined KandinskyV22ControlnetImg2Img KandinskyV22Controlnet
        KandinskyV22Img2ImgCombined KandinskyV22Img2Img KandinskyV22InpaintCombined KandinskyV22Inpaint
        KandinskyV22
    """,
    "whose attention joins the text with other keys": """
        KandinskyPrior KandinskyV22PriorEmb2Emb KandinskyV22Prior ShapEImg2Img ShapE StableCascadeCombined
        StableCascadeDecoder StableCascadePrior UnCLIPImageVariation UnCLIP WuerstchenCombined WuerstchenDecoder
        WuerstchenPrior
    """,
    "semantic guidance adds a part": """
        LEditsPPPipelineStableDiffusion. LEditsPPPipelineStableDiffusionXL. SemanticStableDiffusion
    """,
    "it does not guide, and calls its denoiser once for every tile": """
        LTX2DFR LTX2DFRTemporalRefine
    """,
    "it denoises a video piece by piece": """
        AnyFlowFAR
    """,
    "it refines a video tile by tile": """
        Kandinsky6SR
    """,
    "packs text, video and sound into one sequence": """
        Cosmos3Omni
    """,
    "makes proteins, without a text": """
        RFD4Proteina
    """,
    "Its guidance compares calls that get fresh noise": """
        UniDiffuser
    """,
    "windows of frames that overlap": """
        LTXI2VLongMultiPrompt
    """,
    "diffusion forcing": """
        SkyReelsV2DiffusionForcingImageToVideo SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingVideoToVideo
    """,
    "it denoises several views in every step": """
        StableDiffusionPanorama
    """,
}
# Gated by forecast steps alone: what the error says where none are asked for.
FORECAST_ONLY = {
    "its guidance is distilled into it": """
        Flux2KleinKV Flux2 FluxControlImg2Img FluxControlInpaint FluxControlNetImg2Img FluxControlNetInpaint
        FluxControl FluxFill VisualClozeGeneration
    """,
    "is not two halves": """
        StableDiffusion3PAGImg2Img StableDiffusion3PAG
    """,
    # Tested in test_modular.py.
    "cannot be gated with guider=AdaptiveProjectedMixGuidance": """
        HunyuanImage HunyuanImageRefiner
    """,
}

# What a configuration needs besides its defaults, so that the model can be made without weights.
_NEEDED: dict[str, dict[str, Any]] = {
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "caption_channels": [8, 8],
        "llama_layers": [0, 1],
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_emb_dim": 8,
        "axes_dims_rope": (4, 2, 2),
    },
    "HunyuanDiT2DModel": _HUNYUAN,
    "LatteTransformer3DModel": {"cross_attention_dim": 8, "in_channels": 4, "patch_size": 2, "caption_channels": 8}
    | {"sample_size": 8, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10},
    "LuminaNextDiT2DModel": {"hidden_size": 8, "num_attention_heads": 2, "num_kv_heads": 1},
    "OmniGenTransformer2DModel": {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    "Transformer2DModel": {"num_vector_embeds": 4, "sample_size": 4, "num_embeds_ada_norm": 4},
    "UniDiffuserModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "clip_img_dim": 8,
    }
    | {"num_text_tokens": 4, "num_attention_heads": 2, "attention_head_dim": 8},
    "WanVACETransformer3DModel": {"vace_layers": [0]},
    "WuerstchenDiffNeXt": {"blocks": [1, 1, 1, 1], "c_hidden": [8, 8, 8, 8], "nhead": [-1, 1, 1, 1]},
}
# Those that need a package which the tests do not have.
UNAVAILABLE = {
    "AudioDiffusionPipeline",
    "ConsisIDPipeline",
    "SpectrogramDiffusionPipeline",
    "StableDiffusionOnnxPipeline",
}
_FEWER = ("num_layers", "num_single_layers", "num_refiner_layers", "depth")
# Denoisers that checkpoints configure otherwise than their class does by default: keys of the text beside those of the
# picture (`AddedKV`), or a distilled model.
_ADDED = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "attention_head_dim": 8,
}
_AS_LOADED = {
    "IF": _ADDED,
    "Kandinsky(V22)?(?!Prior|3|5|6)": _ADDED,
    "SanaSprint": {"guidance_embeds": True},
    "Flux2Klein": {"guidance_embeds": False},
}
_made: dict[Any, Any] = {}


def with_rows() -> set[str]:
    """The pipelines that have a row of their own."""
    classes = {kind.pipeline for kind in (*KINDS, *AROUND, *TWO_CALLS, *AROUND_TWO, *JOINT, *AROUND_JOINT)}
    page = (ROOT / "docs/pipelines.md").read_text()
    # The page is held against the cases and hosts elsewhere; here they would have to be built.
    return (
        classes
        | BY_GUIDER
        | TEXTLESS
        | set(re.findall(r"^\| `(\w+Pipeline)`", page[: page.index("## Notes by model")], re.MULTILINE))
    )


def refused() -> dict[str, str]:
    """What the error says of every pipeline that is refused."""
    return _by_name(REFUSED)


def forecast_only() -> dict[str, str]:
    """What the error says of every pipeline without half steps, where no steps are to be forecast."""
    return _by_name(FORECAST_ONLY)


def _by_name(reasons: dict[str, str]) -> dict[str, str]:
    """The reason for each pipeline."""
    named = {name: reason for reason, names in reasons.items() for name in names.split()}
    return {name[:-1] if name.endswith(".") else f"{name}Pipeline": reason for name, reason in named.items()}


def exported() -> list[str]:
    """The names of all pipelines; those of blocks have guiders instead of loops, and are listed elsewhere."""
    names = [name for name in dir(diffusers) if re.search(r"Pipeline(StableDiffusion(XL)?|Legacy|Safe)?$", name)]
    left_out = r"DiffusionPipeline$|Onnx|Flax|\w*Modular"
    return [name for name in names if name not in UNAVAILABLE and not re.match(left_out, name)]


def shell(name: str) -> Any:
    """A pipeline of this class that has nothing but its denoisers, without weights."""
    cls = getattr(diffusers, name)
    required, optional = cls._get_signature_keys(cls)
    parts: dict[str, Any] = dict.fromkeys((*required, *optional))
    for part, parameter in inspect.signature(cls.__init__, eval_str=True).parameters.items():
        kinds = [kind for kind in _classes(parameter.annotation) if issubclass(kind, diffusers.ModelMixin)]
        if part in ("unet", "transformer", "prior", "decoder") and kinds:
            parts[part] = _meta(kinds[-1] if part == "unet" else kinds[0], name)
        if part == "guider":
            kind = _classes(parameter.annotation)[0]
            parts[part] = (diffusers.ClassifierFreeGuidance if kind.__name__ == "BaseGuidance" else kind)()
    pipe = cls.__new__(cls)
    pipe.register_modules(**{part: module for part, module in parts.items() if part in required})
    return pipe


def _classes(annotation: Any) -> list[type]:
    """The classes in an annotation."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation]
    return [kind for each in typing.get_args(annotation) for kind in _classes(each)]


def _meta(kind: type, pipeline: str) -> Any:
    """A model without weights, as small as it gets."""
    parameters = inspect.signature(kind.__init__).parameters
    config: dict[str, Any] = {name: 1 for name in _FEWER if isinstance(_default(parameters, name), int)}
    config |= _NEEDED.get(kind.__name__, {})
    for pattern, as_loaded in _AS_LOADED.items():
        if re.match(pattern, pipeline):
            config |= {name: value for name, value in as_loaded.items() if name in parameters}
    key = (kind, repr(config))
    if key not in _made:
        with torch.device("meta"):
            _made[key] = kind(**config)
    return _made[key]


def _default(parameters: Any, name: str) -> Any:
    return parameters[name].default if name in parameters else None
