"""The ways to place a pipeline."""

import accelerate
import diffusers
import pytest
import torch

CPU = torch.device("cpu")


def model_offload(pipe, case, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe, case, folder):
    # What `enable_sequential_cpu_offload` does, which does not take the CPU for an accelerator.
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)


def group_offload_by_blocks(pipe, case, folder):
    getattr(pipe, case.denoiser).enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)


def group_offload_by_leaves(pipe, case, folder):
    getattr(pipe, case.denoiser).enable_group_offload(CPU, offload_type="leaf_level")


def group_offload_to_disk(pipe, case, folder):
    getattr(pipe, case.denoiser).enable_group_offload(
        CPU, offload_type="leaf_level", offload_to_disk_path=str(folder / "groups")
    )


def layerwise_casting(pipe, case, folder):
    getattr(pipe, case.denoiser).enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def device_map(pipe, case, folder):
    denoiser = getattr(pipe, case.denoiser)
    places = {name: "cpu" for name, _ in denoiser.named_children()}
    places |= {name: "cpu" for name, _ in denoiser.named_parameters(recurse=False)}
    places["conv_out" if case.denoiser == "unet" else "proj_out"] = "disk"
    accelerate.dispatch_model(denoiser, places, main_device="cpu", offload_dir=str(folder / "weights"))


def skip_if_missing(way):
    if way.__name__.startswith("group") and not hasattr(diffusers.ModelMixin, "enable_group_offload"):
        pytest.skip("this diffusers has no group offload")
    if way is layerwise_casting and not hasattr(diffusers.ModelMixin, "enable_layerwise_casting"):
        pytest.skip("this diffusers has no layerwise casting")
