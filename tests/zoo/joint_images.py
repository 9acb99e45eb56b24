"""Tiny real pipelines of further image models with joint attention, of which guidance alone is gated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPTokenizer, GPT2Config, GPT2LMHeadModel

from tests.zoo.case import by_length, images, seeded
from tests.zoo.cross_attention import SHAPES, TOKENS, _flow, assemble, model, text, together
from tests.zoo.joint import _SMALL, _TRUE, _TWO, Joint, pooled


class _Reader:
    """What some pipelines ask when they are made."""

    image_processor = None

    def __init__(self) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")

    def apply_chat_template(self, messages: Any, **how: Any) -> list[list[int]]:
        return [[0]]


def glm(vae: Any = None) -> Any:
    transformer = model(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        prior_vq_quantizer_codebook_size=8,
    )
    return assemble("GlmImagePipeline", transformer=transformer, scheduler=_flow(), vae=vae)


def _glm_edit() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 4}
    return glm(model("AutoencoderKL", **blocks, **sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))


def _drawn(prompts: list[int], guided: bool) -> dict[str, Any]:
    """Likewise of a given picture."""
    tokens, sides = torch.arange(16) % 8, torch.tensor([[1, 4, 4]])
    return {"prior_token_image_ids": [tokens], "source_image_grid_thw": [sides], "image": [images([0])[0]]}


def _prior(prompts: list[int], guided: bool) -> dict[str, Any]:
    """What another model has drawn of the picture: a token for each patch."""
    return {"prior_token_ids": torch.stack([(torch.arange(4) + prompt) % 8 for prompt in prompts])}


def fibo2() -> Any:
    transformer = model(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=8,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=1,
        axes_dims=(4, 2, 2),
        axes_lens=(16, 16, 16),
    )
    return assemble("BriaFibo2Pipeline", transformer=transformer, scheduler=_flow())


def _fibo2_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    names = (("", 100), ("negative_", 200)) if guided else (("", 100),)
    return {
        f"{name}prompt_embeds": torch.stack([seeded((2, TOKENS, 8), seed + p) for p in prompts]) for name, seed in names
    }


def hidream() -> Any:
    transformer = model(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=8,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    pipe = assemble("HiDreamImagePipeline", transformer=transformer, scheduler=_flow())
    # Whatever size is asked for, it draws so many pixels.
    pipe.default_sample_size = 4
    return pipe


def _llama(prompts: list[int], guided: bool) -> dict[str, Any]:
    """Embeddings of every layer, which stand before the prompts."""
    names = (("", 100), ("negative_", 200)) if guided else (("", 100),)
    return {
        f"{name}prompt_embeds_llama3": torch.stack([seeded((2, TOKENS, 8), seed + 50 + p) for p in prompts], 1)
        for name, seed in names
    }


def longcat(name: str = "LongCatImagePipeline", vae: Any = None) -> Any:
    transformer = model(
        "LongCatImageTransformer2DModel",
        # The pipeline makes latents of so many.
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = assemble(name, transformer=transformer, scheduler=_flow(), vae=vae, text_processor=_Reader())
    # diffusers 0.42 cannot do without texts, and an encoder for them is large.
    pipe._encode_prompt = _numbered
    return pipe


def _numbered(prompt: list[str], image: Any = None) -> torch.Tensor:
    """Embeddings of texts that are numbers."""
    return torch.stack([seeded((TOKENS, 8), int(each)) for each in prompt])


def _longcat_edit() -> Any:
    # Pictures have a side of 1024 there.
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 7, "up_block_types": ("UpDecoderBlock2D",) * 7}
    sizes = {"block_out_channels": (2,) * 7, "norm_num_groups": 2, "latent_channels": 16}
    return longcat("LongCatImageEditPipeline", model("AutoencoderKL", **blocks, **sizes, shift_factor=0.1))


def _fibo_edit() -> Any:
    vae = model(
        "AutoencoderKLQwenImage",
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return fibo("BriaFiboEditPipeline", vae=vae)


def _numbers(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = {"prompt": [str(100 + p) for p in prompts]}
    return given | {"negative_prompt": [str(200 + p) for p in prompts]} if guided else given


def fibo(name: str = "BriaFiboPipeline", **components: Any) -> Any:
    transformer = model(
        "BriaFiboTransformer2DModel",
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 2, 2],
        text_encoder_dim=8,
    )
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer")
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    encoder = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    parts = {"transformer": transformer, "text_encoder": encoder, "tokenizer": tokenizer}
    return assemble(name, **parts, scheduler=_flow(), **components)


def _words(prompts: list[int], guided: bool) -> dict[str, Any]:
    """Texts of several lengths, so that some are masked."""
    given: dict[str, Any] = {"prompt": ["a blue" if p % 2 else "a green circle, on grey" for p in prompts]}
    return given | {"negative_prompt": ["red"] * len(prompts)} if guided else given


def qwen21() -> Any:
    transformer = model(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    return assemble("QwenImage21Pipeline", transformer=transformer, scheduler=_flow(), processor=_Reader())


def _of_two_lengths(prompts: list[int], guided: bool) -> dict[str, Any]:
    """The negative prompt has another number of tokens."""
    given = {"prompt_embeds": torch.stack([seeded((TOKENS, 8), 100 + p) for p in prompts])}
    if guided:
        given["negative_prompt_embeds"] = torch.stack([seeded((TOKENS + 2, 8), 200 + p) for p in prompts])
    return given


def nucleus() -> Any:
    transformer = model(
        "NucleusMoEImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
        num_experts=2,
        capacity_factors=1.0,
        moe_intermediate_dim=8,
    )
    torch.manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "experts" in name:
            # They start as what lies in memory.
            torch.nn.init.normal_(parameter, std=0.1)
    return assemble("NucleusMoEImagePipeline", transformer=transformer, scheduler=_flow())


def _nucleus_text(prompts: list[int], guided: bool) -> dict[str, Any]:
    given = text(8)(prompts, guided)
    return {name.replace("attention", "embeds"): value for name, value in given.items()}


def joy() -> Any:
    transformer = model(
        "JoyImageEditTransformer3DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=8,
        num_layers=1,
        rope_dim_list=[4, 2, 2],
    )
    sizes = {"base_dim": 2, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False] * 3}
    vae = model("AutoencoderKLWan", **sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe = assemble("JoyImageEditPipeline", transformer=transformer, scheduler=_flow(), vae=vae)
    # Else the smallest picture has a million pixels.
    pipe.vae_image_processor.get_default_height_width = _small_sides
    return pipe


def _small_sides(*asked: Any) -> tuple[int, int]:
    return 64, 64


_BIG = {"height": 64, "width": 64}

_SHORT = {"max_sequence_length": TOKENS}

PICTURES = [
    Joint(
        "joy",
        joy,
        _nucleus_text,
        pipeline="JoyImageEditPipeline",
        first="img_in",
        tier="thorough",
        batches=False,
        size=_BIG,
        extra={"image": images([0])[0]},
        at_end=True,
        rescaled=by_length(2),
        **_TWO,
    ),
    Joint(
        "longcat_edit",
        _longcat_edit,
        _numbers,
        pipeline="LongCatImageEditPipeline",
        first="x_embedder",
        tier="thorough",
        batches=False,
        extra={"image": images([0])[0]},
        **_TWO,
    ),
    Joint(
        "fibo_edit",
        _fibo_edit,
        together(_words, prompt='{"edit_instruction": "blue"}', negative_prompt="red"),
        pipeline="BriaFiboEditPipeline",
        first="x_embedder",
        tier="thorough",
        batches=False,
        size=_BIG,
        extra={**_SHORT, "image": images([0])[0]},
    ),
    Joint(
        "longcat_image",
        longcat,
        _numbers,
        pipeline="LongCatImagePipeline",
        first="x_embedder",
        tier="thorough",
        size=_SMALL,
        extra={"enable_prompt_rewrite": False},
        **_TWO,
        rescaled=by_length(-1, most=1),
    ),
    Joint(
        "hidream",
        hidream,
        together(text(8, masked=False, suffix="_t5"), _llama, pooled(8)),
        pipeline="HiDreamImagePipeline",
        first="x_embedder.proj",
        tier="thorough",
        size=_SMALL,
        sign=-1,
    ),
    Joint(
        "fibo", fibo, _words, pipeline="BriaFiboPipeline", first="x_embedder", tier="thorough", size=_BIG, extra=_SHORT
    ),
    Joint(
        "qwen21",
        qwen21,
        _of_two_lengths,
        pipeline="QwenImage21Pipeline",
        first="img_in",
        tier="thorough",
        size=_BIG,
        at_end=True,
        **_TRUE,
    ),
    Joint(
        "glm",
        glm,
        together(text(8, masked=False), _prior),
        pipeline="GlmImagePipeline",
        first="image_projector.proj",
        tier="thorough",
        size=_SMALL,
        **_TWO,
    ),
    Joint(
        "fibo2",
        fibo2,
        _fibo2_text,
        pipeline="BriaFibo2Pipeline",
        first="x_embedder",
        tier="thorough",
        size=_SMALL,
        **_TWO,
    ),
    Joint(
        "nucleus",
        nucleus,
        _nucleus_text,
        pipeline="NucleusMoEImagePipeline",
        first="img_in",
        tier="thorough",
        size=_SMALL,
        rescaled=by_length(-1),
        sign=-1,
        **_TWO,
    ),
]

# It reads a picture before its loop.
GLM_EDIT = Joint(
    "glm_edit",
    _glm_edit,
    together(text(8, masked=False), _prior, _drawn),
    pipeline="GlmImagePipeline",
    first="image_projector.proj",
    tier="thorough",
    batches=False,
    size=_SMALL,
    **_TWO,
)
