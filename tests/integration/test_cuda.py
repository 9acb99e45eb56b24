"""What only a GPU can show: CUDA graphs, waiting for the device, streams, and memory as the device counts it."""

import warnings

import pytest
import torch

from tests.support.settings import apply_settings
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ["sd", "sdxl", "pixart_alpha"]
CUDA = torch.device("cuda")


@pytest.fixture(params=NAMES)
def case(request):
    return BY_NAME[request.param]


def run(case, pipe, dtype=torch.float32, **options):
    inputs = case.inputs([0], **options)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            inputs[name] = value.to(CUDA, dtype if value.is_floating_point() else value.dtype)
    return pipe(**inputs).images.float().cpu()


def close(a, b, tolerance=1e-3):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_pictures_are_the_same_and_none_compiles_anew(case, mode):
    torch._dynamo.reset()
    pipe = apply_tgate(case.build().to(CUDA), 3)
    expected = [run(case, pipe), run(case, pipe, guidance_scale=2.0)]
    getattr(pipe, case.denoiser).compile(fullgraph=True, mode=mode)
    close(run(case, pipe), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            close(run(case, pipe), expected[0])
            close(run(case, pipe, guidance_scale=2.0), expected[1])


@pytest.mark.parametrize("settings", [{}, {"sp_interval": 2, "fi_interval": 2, "warm_up": 1}], ids=["v1", "v2"])
def test_no_wait_for_the_device_is_added(case, settings):
    pipe = case.build().to(CUDA)

    def waits():
        run(case, pipe)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(case, pipe)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    plain = waits()
    apply_settings(pipe, 3, **settings)
    assert waits() <= plain


OFFLOADS = {
    "model": lambda pipe, denoiser: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe, denoiser: pipe.enable_sequential_cpu_offload(),
    "blocks": lambda pipe, denoiser: pipe.enable_group_offload(
        CUDA, offload_type="block_level", num_blocks_per_group=1
    ),
    "leaves": lambda pipe, denoiser: pipe.enable_group_offload(CUDA, offload_type="leaf_level"),
    "blocks-stream": lambda pipe, denoiser: pipe.enable_group_offload(
        CUDA, offload_type="block_level", num_blocks_per_group=1, use_stream=True
    ),
    "leaves-stream": lambda pipe, denoiser: pipe.enable_group_offload(CUDA, offload_type="leaf_level", use_stream=True),
}


@pytest.mark.parametrize("first", ["offload", "tgate"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload(case, offload, first):
    expected = run(case, apply_tgate(case.build().to(CUDA), 3))
    plain = run(case, case.build().to(CUDA))
    pipe = case.build()
    if first == "tgate":
        apply_tgate(pipe, 3)
    OFFLOADS[offload](pipe, getattr(pipe, case.denoiser))
    apply_tgate(pipe, 3)
    for _ in range(3):
        close(run(case, pipe), expected)
    close(run(case, remove_tgate(pipe)), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_peak_memory_is_the_plain_one_and_what_is_announced(case, dtype):
    pipe = case.build().to(CUDA, dtype)
    options = {"callback_on_step_end": lambda p, i, t, kwargs: kwargs} if case.has_callback else {}

    def peak():
        run(case, pipe, dtype, **options)
        torch.cuda.reset_peak_memory_stats()
        run(case, pipe, dtype, **options)
        return torch.cuda.max_memory_allocated()

    plain = peak()
    apply_tgate(pipe, 3)
    layers = len(getattr(pipe, case.denoiser).attn_processors)
    # Every block of the allocator is a multiple of 512 bytes.
    assert peak() <= plain + get_tgate_report(pipe).peak_bytes + 512 * layers
