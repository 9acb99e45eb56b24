"""The ways to compile a denoiser."""

import torch
from diffusers.models.attention import BasicTransformerBlock


def compile_in_place(pipe, case, backend):
    getattr(pipe, case.denoiser).compile(fullgraph=True, backend=backend)


def exchange_for_compiled(pipe, case, backend):
    setattr(pipe, case.denoiser, torch.compile(getattr(pipe, case.denoiser), fullgraph=True, backend=backend))


def compile_blocks(pipe, case, backend):
    denoiser = getattr(pipe, case.denoiser)
    if getattr(denoiser, "_repeated_blocks", None) and hasattr(denoiser, "compile_repeated_blocks"):
        denoiser.compile_repeated_blocks(fullgraph=True, backend=backend)
        return
    # What it does; PixArt names no blocks, and the oldest diffusers has no such method.
    for module in denoiser.modules():
        if isinstance(module, BasicTransformerBlock):
            module.compile(fullgraph=True, backend=backend)
