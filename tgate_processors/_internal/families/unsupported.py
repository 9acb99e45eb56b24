"""Why a denoiser has no cross-attention to keep, or no half of guidance to leave out."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..attention.layers import attention_modules
from ..denoiser.spec import GuidanceLayout, LayerLayout
from ..plan.schedule import TGateSchedule

# What makes a pipeline faster that T-GATE cannot gate.
ALTERNATIVES = "You can still use fewer steps, half precision and torch.compile."
# Arguments of a pipeline's call that give away a loop, or a batch, of a shape that changes from step to step.
REFUSED_ARGUMENTS = {
    "edit_guidance_scale": "semantic guidance adds a part to the batch for every edit",
    "view_batch_size": "it denoises several views in every step",
    "overlap_history": "it denoises windows of frames, each with noise of its own (diffusion forcing)",
    "temporal_tile_size": "it denoises windows of frames that overlap, and runs a step less in each than it says",
    "tiles_batch_size": "it refines a video tile by tile, and has neither a text nor guidance to leave out",
    "controls_conditioning_scale": "it denoises a video in pieces, with a ControlNet that runs twice in every step",
    "chunk_partition": "it denoises a video piece by piece, and calls its denoiser between them to keep their keys",
    "keyframe_positions": "it does not guide, and calls its denoiser once for every tile of a video in each step",
}
# Denoisers that cannot be gated, and why.
REFUSED_DENOISERS = {
    "Cosmos3OmniTransformer": (
        "packs text, video and sound into one sequence, and predicts and guides several of them at once. What helps "
        "there is diffusers' SeaCache, pipe.transformer.enable_cache(SeaCacheConfig())."
    ),
    "Ideogram4Transformer2DModel": (
        "is guided by a second denoiser, pipe.unconditional_transformer, which knows no text. T-GATE can leave out a "
        f"call of the same denoiser, or half of its batch, but not that. {ALTERNATIVES}"
    ),
    "JoyImageEditPlusTransformer3DModel": (
        "is told the sizes of all pictures of each sample in a list (`shape_list`), and T-GATE can leave out one half "
        f"of tensors only. JoyImageEditPipeline, for one picture to edit, can be gated. {ALTERNATIVES}"
    ),
    "OmniGenTransformer2DModel": (
        "is told given pictures by the place that they have in the batch, and with them guidance adds a third part to "
        f"it, so it is not two halves that T-GATE could tell apart. {ALTERNATIVES}"
    ),
    "RFD4ProteinaTransformer": f"makes proteins, without a text and without classifier-free guidance. {ALTERNATIVES}",
    "UVit2DModel": (
        "fills in the tokens of a picture, some of them at random in every step. It does not denoise all of it from "
        f"step to step, as T-GATE's predictions and what its layers keep take for granted. {ALTERNATIVES}"
    ),
    "UniDiffuserModel": (
        "has text and picture in one sequence. Its guidance compares calls that get fresh noise in every step in the "
        f"place of one of them, so there is no difference to predict. {ALTERNATIVES}"
    ),
}

# Pipelines that tell the text as a class, together with the time. Their layers, which have the flag of cross-attention,
# attend to none.
CLASS_CONDITIONED_PIPELINES = ("AudioLDMPipeline", "MusicLDMPipeline")


def no_denoiser_message(pipe: Any) -> str:
    """The reason why a pipeline has neither a UNet nor a transformer."""
    # `T2IAdapter` and the like have no attention; text encoders are not diffusers' own.
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    others = [f"{name}={type(part).__name__}" for name, part in parts.items() if attention_modules(part)]
    if "unet" in pipe.components or "transformer" in pipe.components:
        return "it has no `unet` or `transformer` at present. Load one first."
    if others:
        return (
            f"it denoises with {' and '.join(others)}, whose attention joins the text with other keys, so there is no "
            f"cross-attention output to keep. {ALTERNATIVES}"
        )
    return f"it has no denoiser that T-GATE knows, `unet` or `transformer`. {ALTERNATIVES}"


def check_attention(
    denoiser: torch.nn.Module, subject: str, layout: LayerLayout | None = None, cross_attention: bool | None = None
) -> None:
    """Refuse a denoiser that has no cross-attention of its own to keep, where it is to be kept."""
    layout = layout or LayerLayout()
    if layout.joint:
        if cross_attention:
            raise ValueError(_joint_attention_message(denoiser, subject, layout))
        return
    modules = list(attention_modules(denoiser).values())
    inner = getattr(denoiser, "_orig_mod", denoiser)
    name = type(inner).__name__
    # Where added keys are `decoupled_image_attention`, they have a softmax of their own.
    if not layout.decoupled_image_attention and any(_is_joint(module) for module in (*modules, *inner.modules())):
        raise ValueError(_joint_attention_message(denoiser, subject, layout))
    if not modules:
        raise ValueError(f"{subject} cannot be gated: {name} has no attention layers. {ALTERNATIVES}")
    if not any(getattr(module, "is_cross_attention", True) for module in modules):
        raise ValueError(f"{subject} cannot be gated: {name} has no cross-attention layers. {ALTERNATIVES}")


def check_self_attention(denoiser: torch.nn.Module, subject: str, layout: LayerLayout, schedule: TGateSchedule) -> None:
    """Refuse to reuse self-attention where no layer has it, or has it apart from its text."""
    if max(schedule.sp_interval, schedule.fi_interval) == 1:
        return
    if layout.joint:
        why = f"which {subject} has not apart from its text, so there is nothing to keep"
    elif all(layout.is_cross_attention(name, layer) for name, layer in attention_modules(denoiser).items()):
        why = f"and no layer of {type(getattr(denoiser, '_orig_mod', denoiser)).__name__} that T-GATE can reach has it"
    else:
        return
    raise ValueError(
        f"sp_interval={schedule.sp_interval} and fi_interval={schedule.fi_interval} reuse self-attention, {why}: leave "
        "them out."
    )


def reject_dropping_momentum(subject: str, layout: GuidanceLayout, schedule: TGateSchedule) -> None:
    """Refuse to drop guidance that goes on by itself."""
    if layout.has_momentum and not schedule.predicts:
        raise ValueError(
            f'guidance="drop" is not possible: the guidance of {subject} remembers that of the steps before '
            "(momentum), so it goes on where the two halves are the same. Predict it, with "
            f'gate_step={schedule.gate_step} and guidance="predict", or leave gate_step out.'
        )


def distilled_message(denoiser: torch.nn.Module, subject: str) -> str:
    """The reason why a pipeline has no half of guidance to skip."""
    name = type(getattr(denoiser, "_orig_mod", denoiser)).__name__
    return (
        f"{subject} cannot be gated like this: it calls its {name} once in a step and its guidance is distilled into "
        "it, so there is no half to leave out. Whole steps can be forecast: apply_tgate(pipe)."
    )


def reject_unsupported_loop(subject: str, parameters: set[str]) -> None:
    """Refuse a loop that T-GATE cannot follow, by the arguments of its call."""
    for argument, reason in REFUSED_ARGUMENTS.items():
        if argument in parameters:
            raise ValueError(f"{subject} cannot be gated: {reason}. {ALTERNATIVES}")


def check_module(part: Any, attribute: str, subject: str) -> None:
    """Refuse an engine, or an exported graph, in the place of a module: there is nothing in it to hook."""
    if not isinstance(part, torch.nn.Module):
        what = "no torch module (an engine of ONNX Runtime, TensorRT or OpenVINO?)"
    elif isinstance(part, (torch.jit.ScriptModule, torch.fx.GraphModule)) or hasattr(part, "graph_signature"):
        what = "a graph that was traced or exported, and no module of diffusers"
    elif (wrapper := _parallel_wrapper(part)) is not None:
        raise ValueError(
            f"{subject} cannot be gated: its {attribute} is wrapped in {wrapper}, so T-GATE cannot reach its attention "
            f"layers, nor its batch. Give what is inside, pipe.{attribute} = pipe.{attribute}.module. To share its "
            f"weights among devices, use torch.distributed.fsdp.fully_shard(pipe.{attribute}), which wraps nothing."
        )
    else:
        return
    raise ValueError(
        f"{subject} cannot be gated: its {attribute} is of type {type(part).__name__}, which is {what}, so T-GATE "
        "cannot reach its attention layers, nor its batch. Load the module of diffusers in its place."
    )


def _parallel_wrapper(part: torch.nn.Module) -> str | None:
    """The name of what wraps a denoiser to run it on several devices, if anything does."""
    # Whoever has wrapped it has imported this.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    return type(part).__name__ if isinstance(part, (parallel, fsdp)) else None


def check_denoiser(denoiser: torch.nn.Module, subject: str) -> None:
    """Refuse a denoiser that is known not to fit."""
    name = type(denoiser).__name__
    for base in type(denoiser).__mro__:
        if base.__name__ in REFUSED_DENOISERS:
            what = "it" if subject == name else f"its {name}"
            raise ValueError(f"{subject} cannot be gated: {what} {REFUSED_DENOISERS[base.__name__]}")


def reject_class_conditioned(pipe: Any, cross_attention: bool | None) -> None:
    """Refuse to gate the cross-attention of a pipeline whose layers attend to no text."""
    if cross_attention is not False and any(
        base.__name__ in CLASS_CONDITIONED_PIPELINES for base in type(pipe).__mro__
    ):
        raise ValueError(
            f"{type(pipe).__name__} cannot be gated like this: its UNet is told the text together with the time, and "
            "attends to no text, so there is no cross-attention output to keep. apply_tgate(pipe, "
            "cross_attention=False) gates guidance alone."
        )


def reject_free_noise(pipe: Any) -> None:
    """Refuse a mode that a pipeline can be switched to at any time."""
    if getattr(pipe, "free_noise_enabled", False):
        raise ValueError(
            f"{type(pipe).__name__} cannot be gated with FreeNoise: its attention layers run once for every window of "
            "frames, so there is no one output to keep. Call pipe.disable_free_noise() or remove_tgate(pipe)."
        )


def _joint_attention_message(denoiser: torch.nn.Module, subject: str, layout: LayerLayout) -> str:
    """The reason why a denoiser with joint attention is refused, and what to do."""
    inner: Any = getattr(denoiser, "_orig_mod", denoiser)
    distilled = getattr(getattr(inner, "config", None), "guidance_embeds", False)
    what = (
        f"{type(inner).__name__} has joint attention (text and image share one softmax), so there is no "
        "cross-attention output to keep"
    )
    if layout.joint:
        guidance = "guidance by a negative prompt (true_cfg_scale above 1)" if distilled else "guidance alone"
        return f"cross_attention=True is not possible: {what}. Leave it out: apply_tgate(pipe) gates {guidance}."
    more = ", and its guidance is distilled into it, so there is no half to leave out" if distilled else ""
    return (
        f"{subject} cannot be gated: {what}{more}. You can still use diffusers' own caches, if the model has them "
        "(pipe.transformer.enable_cache(FirstBlockCacheConfig())), fewer steps, and torch.compile."
    )


def _is_joint(module: Any) -> bool:
    """Whether a layer mixes keys of text and image, or its output with the residual."""
    if getattr(module, "added_kv_proj_dim", None) is not None or getattr(module, "add_k_proj", None) is not None:
        return True
    return "Joint" in type(getattr(module, "processor", None)).__name__
