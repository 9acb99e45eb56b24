"""The caches for transformers: cache-dit, and those of diffusers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def first_block(pipe: Any, threshold: float) -> None:
    """First Block Cache."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=threshold or 0.1))


def faster_cache(pipe: Any, setting: float) -> None:
    """FasterCache."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    clock = Clock(pipe)
    config = FasterCacheConfig(current_timestep_callback=clock.now, tensor_format="BCHW")
    apply_faster_cache(pipe.transformer, config)


def pyramid_attention_broadcast(pipe: Any, setting: float) -> None:
    """Pyramid Attention Broadcast."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=4,
        current_timestep_callback=Clock(pipe).now,
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)


def mag_cache(pipe: Any, setting: float) -> None:
    """MagCache; it asks for magnitudes measured on the model."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    apply_mag_cache(pipe.transformer, MagCacheConfig())


def taylorseer(pipe: Any, interval: float) -> None:
    """TaylorSeer; the names that it looks for by itself are not those of PixArt's blocks."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    names = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
    config = TaylorSeerCacheConfig(
        cache_interval=int(interval) or 3, taylor_factors_dtype=torch.float32, cache_identifiers=names
    )
    apply_taylorseer_cache(pipe.transformer, config)


# A cache is given its interval or threshold, 0 for the default; some have no such setting.
CACHES: dict[str, Callable[[Any, float], None]] = {
    "first-block-cache": first_block,
    "faster-cache": faster_cache,
    "pyramid-attention-broadcast": pyramid_attention_broadcast,
    "mag-cache": mag_cache,
    "taylorseer": taylorseer,
}


class Clock:
    """The timestep of the denoiser's forward: PixArt's pipelines have no `current_timestep`."""

    def __init__(self, pipe: Any):
        self.timestep = 0.0
        pipe.transformer._evaluation_clock = pipe.transformer.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Take the timestep from what the denoiser is given."""
        self.timestep = float(kwargs["timestep"].flatten()[0])

    def now(self) -> float:
        """What the caches ask for."""
        return self.timestep


def forget_hooks(denoiser: Any) -> None:
    """Take out every hook of diffusers; a denoiser that is not a `CacheMixin` has no `disable_cache`."""
    clock = denoiser.__dict__.pop("_evaluation_clock", None)
    if clock is not None:
        clock.remove()
    for module in denoiser.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)
            del module._diffusers_hook
            # What is left of the hook is the class's own method, bound; accelerate's hooks keep one of theirs.
            if not hasattr(module, "_hf_hook"):
                module.__dict__.pop("forward", None)


@contextlib.contextmanager
def diffusers_cache(pipe: Any, entry: Any) -> Iterator[dict[str, Any]]:
    """
    One of diffusers' caches for one call.

    PixArt's denoiser is not a `CacheMixin`, so the cache is hooked in by its function, and the context in which it
    keeps its state is opened here; both guidance halves are in one batch and share it. Other pipelines open theirs.
    """
    from diffusers import CacheMixin

    denoiser = pipe.transformer
    try:
        CACHES[entry.method](pipe, entry.cache)
        registry = vars(denoiser).get("_diffusers_hook")
        if hasattr(registry, "invalidate_child_registries_cache"):
            # As `enable_cache` does: an earlier call may have noted that there is no hook in the blocks.
            registry.invalidate_child_registries_cache()
        with CacheMixin.cache_context(denoiser, "both_halves"):
            yield {}
    finally:
        forget_hooks(denoiser)


@contextlib.contextmanager
def cache_dit(pipe: Any, entry: Any) -> Iterator[dict[str, Any]]:
    """cache-dit's DBCache; a small denoiser always computes fewer blocks than it would by itself."""
    import cache_dit as library

    always = min(8, max(1, len(pipe.transformer.transformer_blocks) // 4))
    threshold = {"residual_diff_threshold": entry.cache} if entry.cache else {}
    library.enable_cache(pipe, cache_config=library.DBCacheConfig(Fn_compute_blocks=always, **threshold))
    try:
        yield {}
    finally:
        library.disable_cache(pipe)
