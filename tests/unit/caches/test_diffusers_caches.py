"""T-GATE together with the caches in diffusers' hook registry."""

import contextlib
import logging
import math
from typing import ClassVar

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from tests.support.comparing import distance
from tests.support.paths import ROOT
from tests.support.settings import apply_settings
from tests.zoo.case import STEPS, slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.sequential import TWO_CALLS
from tgate_processors import (
    TGateAttnProcessor,
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    get_tgate_report,
    remove_tgate,
)
from tgate_processors._internal.caches.cache_dit import DBCacheAdapter
from tgate_processors._internal.caches.taylorseer import TaylorSeerAdapter

hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no caches")
GATE = 3
# What applies a cache, its configuration, and whether it decides for every picture by itself.
CACHES = {
    "taylorseer": ("apply_taylorseer_cache", "TaylorSeerCacheConfig", True),
    "first_block": ("apply_first_block_cache", "FirstBlockCacheConfig", False),
    "mag": ("apply_mag_cache", "MagCacheConfig", True),
    "pab": ("apply_pyramid_attention_broadcast", "PyramidAttentionBroadcastConfig", True),
    "sea": ("apply_sea_cache", "SeaCacheConfig", False),
    "faster": ("apply_faster_cache", "FasterCacheConfig", True),
    "cache_dit": ("enable_cache", "DBCacheConfig", False),
}
SETTINGS = {
    "taylorseer": {
        "cache_interval": 2,
        "disable_cache_before_step": 1,
        "taylor_factors_dtype": torch.float32,
        "cache_identifiers": [r".*blocks\.\d+\.(attn1|attn2|ff|ffn)"],
    },
    "first_block": {"threshold": 0.1},
    "mag": {"mag_ratios": [1.0] * STEPS, "num_inference_steps": STEPS, "max_skip_steps": 1},
    "pab": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_block_identifiers": ("transformer_blocks",),
        "cross_attention_block_skip_range": 3,
        "cross_attention_block_identifiers": ("transformer_blocks",),
        "current_timestep_callback": lambda: 500,
    },
    "sea": {"threshold": 0.9, "max_consecutive_cached": 1},
    "faster": {
        "tensor_format": "BCHW",
        "spatial_attention_block_identifiers": ("transformer_blocks",),
        "unconditional_batch_skip_range": 2,
        "attention_weight_callback": lambda _: 0.5,
        "current_timestep_callback": lambda: 500,
    },
    "cache_dit": {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "max_continuous_cached_steps": 1,
        "residual_diff_threshold": 0.5,
    },
}
WAYS = {
    "drop": {"gate_step": GATE},
    "predict": {"gate_step": GATE, "guidance": "predict", "cfg_interval": 2},
    "auto": {"gate_step": "auto", "tolerance": math.inf},
}
PAIRS = [("pixart_alpha", cache) for cache in ("taylorseer", "first_block")]
DEARER = [("pixart_alpha", "pab"), ("pixart_alpha", "mag"), ("ltx", "taylorseer"), ("ltx", "pab"), ("sd", "taylorseer")]
DEARER += [("wan", "taylorseer"), ("wan", "first_block")]
EXPERTS = [("wan_experts", cache) for cache in ("taylorseer", "first_block", "cache_dit")]
DEARER += [*EXPERTS, ("wan", "sea"), ("wan", "cache_dit")]
DEARER += [("pixart_alpha", "cache_dit"), ("pixart_alpha", "cache_dit_taylor")]


class Pair:
    """A pipeline and a cache, and what is given to every call."""

    def __init__(self, name, cache, **call):
        self.call = call
        self.case = BY_NAME[name]
        self.cache = cache
        self.pipe = self.case.build()

    @property
    def denoiser(self):
        return getattr(self.pipe, self.case.denoiser)

    @classmethod
    def of(cls, name, cache, **call):
        """The pair; cache-dit is no hook."""
        return (DitPair if cache.startswith("cache_dit") else cls)(name, cache, **call)

    @property
    def denoisers(self):
        return [each for each in (self.denoiser, getattr(self.pipe, "transformer_2", None)) if each is not None]

    @property
    def always_runs(self):
        """What computes in every step in which anything does."""
        return self.denoiser

    def put_in(self):
        function, config, _ = CACHES[self.cache]
        if not hasattr(hooks, function):
            pytest.skip(f"this diffusers has no {function}")
        for denoiser in self.denoisers:
            getattr(hooks, function)(denoiser, getattr(hooks, config)(**SETTINGS[self.cache]))
        return self

    def take_out(self):
        for registry in self.registries():
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)

    def registries(self):
        modules = [module for denoiser in self.denoisers for module in denoiser.modules()]
        found = [vars(module).get("_diffusers_hook") for module in modules]
        return [registry for registry in found if registry is not None]

    def run(self, prompts=None, **call):
        """A call in the context of a cache, which pipelines of a `CacheMixin` open themselves."""
        with contextlib.ExitStack() as stack:
            if not hasattr(self.denoiser, "enable_cache") and hasattr(hooks.hooks, "_set_cache_context"):
                from diffusers import CacheMixin

                stack.enter_context(CacheMixin.cache_context(self.denoiser, "both"))
            return self.case.run(self.pipe, prompts, **self.call, **call)

    def kept(self):
        """What the cache has from earlier forwards."""
        found = [hook for registry in self.registries() for hook in registry.hooks.values()]
        managers = [value for hook in found for value in vars(hook).values() if hasattr(value, "_state_cache")]
        own = [hook.state.cache for hook in found if hasattr(getattr(hook, "state", None), "cache")]
        return [manager._state_cache for manager in managers if manager._state_cache] + [
            cache for cache in own if cache is not None
        ]

    def counted(self):
        """All numbers that the cache has, of hooks and of their states."""
        found = [hook for registry in self.registries() for hook in registry.hooks.values()]
        own = [hook.state for hook in found if getattr(hook, "state", None) is not None]
        return [numbers(each) for each in found + own]


def numbers(value):
    """The numbers in an object, by name, and how much is in its containers."""
    found = {name: each for name, each in vars(value).items() if isinstance(each, (bool, int, float))}
    return found | {name: len(each) for name, each in vars(value).items() if isinstance(each, (dict, list, set))}


class DitPair(Pair):
    """A pipeline and cache-dit, which wraps the call of the pipeline's class and the forward of the denoiser."""

    there: ClassVar[list["DitPair"]] = []

    @property
    def always_runs(self):
        return next(module for module in self.denoiser.children() if isinstance(module, torch.nn.ModuleList))[0]

    def put_in(self, kind="DBCacheConfig", **settings):
        cache_dit = pytest.importorskip("cache_dit", reason="cache-dit wants newer versions than the oldest")
        config = getattr(cache_dit, kind)(**{**SETTINGS["cache_dit"], **settings})
        calibrator = cache_dit.TaylorSeerCalibratorConfig() if self.cache.endswith("taylor") else None
        logging.disable(logging.CRITICAL)
        try:
            cache_dit.enable_cache(self.pipe, cache_config=config, calibrator_config=calibrator)
        finally:
            logging.disable(logging.NOTSET)
        self.there.append(self)
        return self

    def take_out(self):
        import cache_dit

        self.there.remove(self)
        cache_dit.disable_cache(self.pipe)

    def counted(self):
        return [numbers(each) for each in self.denoiser._context_manager._cached_context_manager.values()]

    def kept(self):
        contexts = self.denoiser._context_manager._cached_context_manager.values()
        calibrators = [each for context in contexts for each in context.get_calibrators() if each is not None]
        return [context.buffers for context in contexts if context.buffers] + [
            each.states for each in calibrators if each.states
        ]


@pytest.fixture(autouse=True)
def _classes_as_they_were():
    yield
    while DitPair.there:
        DitPair.there[-1].take_out()


# CI has other rows of the same cache.
THOROUGH = {("ltx", "pab"), ("sd", "taylorseer"), ("ltx", "taylorseer"), ("wan", "taylorseer")}
THOROUGH |= {*EXPERTS, ("pixart_alpha", "cache_dit_taylor")}


@pytest.fixture(
    params=[pytest.param(pair, id="-".join(pair)) for pair in PAIRS]
    + [
        pytest.param(pair, id="-".join(pair), marks=[pytest.mark.slow, *[pytest.mark.thorough] * (pair in THOROUGH)])
        for pair in DEARER
    ]
)
def pair(request):
    return Pair.of(*request.param)


def both(pair, order, **settings):
    """A pair with both, put in in either order."""
    if order == "cache first":
        apply_settings(pair.put_in().pipe, **settings)
    else:
        apply_settings(pair.pipe, **settings)
        pair.put_in()
    return pair


@pytest.mark.parametrize("order", ["cache first", "T-GATE first"])
def test_a_gate_beyond_the_last_step_is_the_cache_alone_in_every_call(pair, order):
    alone = pair.put_in().run()
    pair.take_out()
    assert not torch.equal(alone, pair.case.plain())
    both(pair, order, gate_step=99)
    assert torch.equal(pair.run(), alone)
    # PixArt and UNets are no `CacheMixin`: without T-GATE, nobody clears what the last call has left.
    assert torch.equal(pair.run(), alone)
    assert not pair.kept()


@pytest.mark.parametrize("way", WAYS)
def test_both_orders_and_two_calls_agree_and_each_can_be_taken_out(pair, way):
    settings = WAYS[way]
    # A run that decides needs two computed steps before the first one that is judged.
    pair.call = {"num_inference_steps": 12 * len(pair.denoisers)} if way == "auto" else {}
    first = both(pair, "cache first", **settings).run()
    report = get_tgate_report(pair.pipe)
    assert report.half_batch_forwards > 0
    assert first.isfinite().all()
    assert torch.equal(pair.run(), first)
    pair.take_out()
    gated = pair.run()
    assert torch.equal(gated, pair.case.gated(**settings, call=pair.call))
    assert not torch.equal(first, gated)
    pair.put_in()
    assert torch.equal(pair.run(), first)
    before = [(registry, dict(registry.hooks)) for registry in pair.registries()]
    remove_tgate(pair.pipe)
    after = [(registry, dict(registry.hooks)) for registry in pair.registries()]
    assert before == after
    alone = pair.run()
    pair.take_out()
    fresh = Pair.of(pair.case.name, pair.cache, **pair.call).put_in().run()
    assert torch.equal(alone, fresh)


@pytest.mark.parametrize("way", [*WAYS][1:])
def test_after_a_run_that_leaves_out_calls_every_counter_is_where_it_starts(pair, way):
    pair.call = {"num_inference_steps": 12 * len(pair.denoisers)} if way == "auto" else {}
    apply_tgate(pair.put_in().pipe, 99)
    pair.run()
    fresh = pair.counted()
    assert fresh
    apply_settings(pair.pipe, **WAYS[way])
    pair.run()
    assert get_tgate_report(pair.pipe).half_batch_forwards > 0
    assert pair.counted() == fresh
    remove_tgate(pair.pipe)
    assert pair.counted() == fresh
    # And where the next one goes on to.
    alone, counted = pair.run(), pair.counted()
    pair.take_out()
    other = Pair.of(pair.case.name, pair.cache, **pair.call).put_in()
    assert torch.equal(other.run(), alone)
    assert other.counted() == counted


@pytest.mark.slow
def test_the_second_call_of_a_step_keeps_nothing_beside_a_cache_that_may_skip_the_gate():
    pair = Pair("wan", "first_block")
    gated = both(pair, "cache first", gate_step=GATE, cross_attention=True)
    pair.run()
    held = get_tgate_report(gated.pipe).peak_bytes
    pair.take_out()
    pair.run()
    assert held == get_tgate_report(gated.pipe).peak_bytes > 0


@pytest.mark.parametrize("way", WAYS)
def test_two_prompts_equal_two_singles(pair, way):
    # A cache that decides for a whole batch does as for one if all of it is alike.
    prompts = [0, 1] if CACHES.get(pair.cache, (0, 0, 0))[2] else [0, 0]
    both(pair, "cache first", **WAYS[way])
    pair.call = {"num_inference_steps": 12} if way == "auto" else {}
    singles = torch.cat([pair.run([prompt]) for prompt in prompts])
    assert distance(pair.run(prompts), singles) < 1e-4


@pytest.mark.parametrize("way", ["drop", "predict"])
def test_a_run_that_breaks_leaves_both_fresh(pair, way):
    both(pair, "cache first", **WAYS[way])
    expected = pair.run()
    calls = []

    def breaks(module, args):
        calls.append(1)
        # In a half step, and in the full step after it, in which a cache is told to compute.
        if len(calls) == (GATE + 1 if way == "drop" else GATE + 2):
            raise KeyboardInterrupt

    inner = list(pair.always_runs.modules())[-1]
    intervals = [vars(hook).get("cache_interval") for each in pair.registries() for hook in each.hooks.values()]
    handle = inner.register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        pair.run()
    handle.remove()
    assert not pair.kept()
    left = [vars(hook).get("cache_interval") for each in pair.registries() for hook in each.hooks.values()]
    assert left == intervals
    assert torch.equal(pair.run(), expected)


@pytest.mark.parametrize("way", [{"gate_step": 99}, WAYS["predict"], WAYS["auto"]], ids=["full", "predict", "auto"])
@pytest.mark.parametrize("cache", ["taylorseer", slow("pab")])
def test_guidance_that_is_switched_off_in_a_run_starts_the_cache_afresh(cache, way):
    pair = Pair("sd", cache).put_in()
    rows = []
    pair.denoiser.down_blocks[0].register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    apply_settings(pair.pipe, **way)
    call = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_index=4, cutoff_step_ratio=None)}
    first = pair.run(num_inference_steps=8, **call)
    assert set(rows[5:]) == {1}
    assert torch.equal(pair.run(num_inference_steps=8, **call), first)
    assert first.isfinite().all()


def test_full_steps_are_those_that_the_cache_computes():
    pair = Pair("pixart_alpha", "taylorseer")
    computed = []
    both(pair, "cache first", gate_step="auto", tolerance=math.inf)
    pair.denoiser.register_forward_pre_hook(lambda *_: computed.append(0))
    pair.denoiser.transformer_blocks[0].attn1.to_q.register_forward_hook(
        lambda module, args, output: computed.__setitem__(-1, len(output))
    )
    pair.run(num_inference_steps=16)
    # What is repeated goes on with the rows that it has; what is computed on two rows is a full step.
    assert 1 in computed
    assert [step for step, rows in enumerate(computed) if rows] == [0, *range(2, 16, 2)]
    report = get_tgate_report(pair.pipe)
    assert {step for step, rows in enumerate(computed) if rows == 2} <= set(report.full_steps)
    measured = [step for step, _ in report.prediction_errors]
    assert measured
    assert all(computed[step] == 2 for step in measured)


def test_where_they_do_not_go_together_it_is_said():
    pair = Pair("pixart_alpha", "taylorseer").put_in()
    with pytest.raises(
        ValueError, match=r"cannot reuse self-attention \(sp_interval=2, fi_interval=1\) together with Taylor"
    ):
        apply_tgate(pair.pipe, TGateSchedule(GATE, sp_interval=2))
    clock, sd = TGateCallback(TGateSchedule(GATE)), Pair("sd", "taylorseer").put_in()
    before = sd.pipe.unet.attn_processors
    sd.pipe.unet.set_attn_processor({name: TGateAttnProcessor(each, clock.state) for name, each in before.items()})
    with pytest.raises(ValueError, match=r"TaylorSeerCacheHook .* a callback alone cannot tell it where the batch"):
        sd.run(callback_on_step_end=clock)
    with pytest.raises(ValueError, match=r"cannot run together with MagCacheHeadHook .* two calls of the denoiser"):
        apply_tgate(Pair("wan", "mag").put_in().pipe, GATE)
    ltx = Pair("ltx", "sea").put_in().pipe
    with pytest.raises(
        ValueError, match=r"cannot run together with SeaCacheRootHook .* in one batch, and what that cache"
    ):
        apply_tgate(ltx, GATE)


@pytest.mark.parametrize("name", ["sd_controlnet", slow("sdxl_controlnet")])
def test_a_cache_on_a_controlnet_is_refused(name):
    case = BY_NAME[name]
    pipe = apply_tgate(case.build(), 2)
    hooks.apply_taylorseer_cache(
        pipe.controlnet, hooks.TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r".*attn1"])
    )
    with pytest.raises(
        ValueError, match="cannot run together with TaylorSeerCacheHook on ControlNetModel: it keeps tensors"
    ):
        case.run(pipe)
    for module in pipe.controlnet.modules():
        if "_diffusers_hook" in vars(module):
            for hook in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(hook, recurse=False)
    assert torch.equal(case.run(pipe), case.gated(2))


@pytest.mark.parametrize("wrapped", [lambda module: module, slow(torch.compile)], ids=["eager", "compiled"])
def test_cache_dit_on_a_controlnet_is_refused(wrapped):
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit wants newer versions than the oldest")
    pipe = BY_NAME["sd3_controlnet"].build()
    net, pattern = pipe.controlnet, cache_dit.ForwardPattern.Pattern_1
    adapter = cache_dit.BlockAdapter(transformer=net, blocks=net.transformer_blocks, forward_pattern=pattern)
    logging.disable(logging.CRITICAL)
    try:
        cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(**SETTINGS["cache_dit"]))
    finally:
        logging.disable(logging.NOTSET)
    pipe.controlnet = wrapped(net)
    with pytest.raises(ValueError, match="cannot run together with cache-dit on SD3ControlNetModel: it keeps tensors"):
        apply_tgate(pipe, GATE, cross_attention=False)
    cache_dit.disable_cache(net)
    apply_tgate(pipe, GATE, cross_attention=False)


@pytest.mark.parametrize("gate", [2, GATE])
def test_beside_fastercache_cross_attention_alone_is_gated_and_what_is_kept_fits_the_half_that_it_runs(gate, caplog):
    pair = Pair("pixart_sigma", "faster")
    both(pair, "cache first", gate_step=gate)
    rows = []
    pair.denoiser.register_forward_pre_hook(lambda *_: rows.append(0))
    layer = pair.denoiser.transformer_blocks[1].attn2
    layer.to_q.register_forward_hook(lambda module, args, output: rows.__setitem__(-1, len(output)))
    given = []
    layer.register_forward_hook(lambda module, args, output: given.append(output))
    expected = pair.run()
    # The gate lies in a step with both halves, or in one of one half, after which both are computed once more.
    assert rows == [2, 1, 2, 0, 0, 0]
    assert [len(each) for each in given] == [2, 1, 2, 1, 2, 1]
    assert all(torch.equal(each, given[2][-len(each) :]) for each in given[3:])
    report = get_tgate_report(pair.pipe)
    assert (report.half_batch_forwards, report.full_batch_forwards) == (0, STEPS)
    (message,) = [record.message for record in caplog.records if record.name.startswith("tgate")]
    assert "only cross-attention is reused" in message
    assert torch.equal(pair.run(), expected)
    assert not pair.kept()


@pytest.mark.slow
def test_the_laws_of_fastercache():
    pair = Pair("pixart_sigma", "faster")
    alone = pair.put_in().run()
    pair.take_out()
    both(pair, "cache first", gate_step=99)
    assert torch.equal(pair.run(), alone)
    assert torch.equal(pair.run(), alone)
    first = both(Pair("pixart_sigma", "faster"), "T-GATE first", gate_step=GATE).run()
    apply_tgate(pair.pipe, GATE)
    assert torch.equal(pair.run(), first)
    singles = torch.cat([pair.run([0]), pair.run([1])])
    assert distance(pair.run([0, 1]), singles) < 1e-4

    def stop(*_):
        raise KeyboardInterrupt

    handle = pair.denoiser.transformer_blocks[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pair.run()
    handle.remove()
    assert not pair.kept()
    assert torch.equal(pair.run(), first)
    pair.take_out()
    assert torch.equal(pair.run(), pair.case.gated(GATE))
    pair.put_in()
    remove_tgate(pair.pipe)
    assert torch.equal(pair.run(), alone)


def test_beside_fastercache_what_is_about_guidance_is_refused():
    pipe = Pair("pixart_sigma", "faster").put_in().pipe
    for settings, what in (
        ({}, 'gate_step="auto"'),
        ({"gate_step": GATE, "guidance": "predict"}, 'guidance="predict"'),
        ({"gate_step": GATE, "cfg_half": "conditional"}, "cfg_half='conditional'"),
    ):
        with pytest.raises(
            ValueError, match=rf"cannot run together with FasterCache.* so {what} has no effect. Give a number"
        ):
            apply_settings(pipe, **settings)
    with pytest.raises(ValueError, match="nothing but guidance would be gated here"):
        apply_tgate(pipe, GATE, cross_attention=False)


# The rows of the page whose law is one of those above, and the tests that prove the others.
PAGE = {
    "diffusers' TaylorSeer": "taylorseer",
    "diffusers' First Block Cache": "first_block",
    "diffusers' MagCache": "mag",
    "diffusers' Pyramid Attention Broadcast": "pab",
    "diffusers' SeaCache": "sea",
    "cache-dit's DBCache": "cache_dit",
}
ELSEWHERE = {
    "DeepCache": "test_deepcache.py::test_where_guidance_is_predicted_what_is_cached_goes_on_at_half",
    "diffusers' FasterCache": "test_diffusers_caches.py::test_beside_fastercache_cross_attention_alone_is_gated",
    "everything else": "test_third_party_hooks.py::test_a_cache_that_is_not_known_is_refused_by_name",
    "HyperTile": "test_third_party_hooks.py::test_tiles_go_with_what_is_not_reused",
    "TeaCache and others": "test_foreign_forwards.py::test_it_is_refused_by_name_whichever_came_first",
    "ToMe (`tomesd`)": "test_third_party_hooks.py::test_merged_tokens_go_with_what_is_not_reused",
}


def test_every_row_of_the_page_has_its_law():
    page = (ROOT / "docs/together.md").read_text().split("## Other caches")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    said = set()
    for subject, *columns in rows[2:]:
        name = next((known for known in (*PAGE, *ELSEWHERE) if subject.startswith(known)), subject)
        if name in PAGE:
            said |= {(PAGE[name], two) for two, column in enumerate(columns) if column.startswith("works")}
            assert all(column.startswith(("works", "refused")) for column in columns)
        else:
            file, test = ELSEWHERE[name].split("::")
            (path,) = (ROOT / "tests").rglob(file)
            assert f"def {test}" in path.read_text()
    calls = {kind.name for kind in TWO_CALLS}
    assert said == {(cache, name in calls) for name, cache in PAIRS + DEARER if cache in CACHES}
    assert {*PAGE.values(), "faster"} == CACHES.keys()


class Drifts(torch.nn.Module):
    """Gives for every row what grows evenly from step to step."""

    def __init__(self):
        super().__init__()
        self.step, self.pace = 0, torch.tensor([[1.0], [3.0]])

    def forward(self, rows):
        return self.step * self.pace[rows]


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "skipped"), [("taylorseer", (1, 3, 7)), ("sea", (1, 3, 6))])
def test_both_calls_of_a_full_step_after_half_steps_are_computed(cache, skipped, caplog):
    pair = Pair("wan", cache)
    both(pair, "cache first", gate_step=3, guidance="predict", cfg_interval=3)
    computed = []
    pair.denoiser.register_forward_pre_hook(lambda *_: computed.append(False))
    layer = pair.denoiser.blocks[0].attn1.to_q
    layer.register_forward_hook(lambda module, args, output: computed.__setitem__(-1, True))
    pair.run(num_inference_steps=9)
    # Two calls in steps 0 to 2, 5 and 8, one in the others; by itself the cache computes every other step.
    calls = [2, 2, 2, 1, 1, 2, 1, 1, 2]
    steps = [[computed.pop(0) for _ in range(number)] for number in calls]
    assert steps[5] == steps[8] == [True, True]
    assert not any(flag for step in skipped for flag in steps[step])
    assert not computed
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["sea", "first_block", "taylorseer"])
def test_whether_a_step_was_repeated_is_told_by_the_calls_that_ran(cache):
    pair = Pair("wan", cache)
    both(pair, "cache first", gate_step=3, guidance="predict", cfg_interval=3)
    computed, told = [], []
    pair.denoiser.register_forward_pre_hook(lambda *_: computed.append(False))
    # First Block always computes the first one.
    layer = pair.denoiser.blocks[-1].attn1.to_q
    layer.register_forward_hook(lambda module, args, output: computed.__setitem__(-1, True))
    state, step = vars(pair.pipe)["_tgate"].state, pair.pipe.scheduler.step

    def look(*args, **kwargs):
        told.append(state.current()._caches.was_hit())
        return step(*args, **kwargs)

    pair.pipe.scheduler.step = look
    pair.run(num_inference_steps=9)
    calls = [2, 2, 2, 1, 1, 2, 1, 1, 2]
    ends = [sum(calls[: step + 1]) for step in range(9)]
    repeated = [not any(computed[end - number : end]) for end, number in zip(ends, calls, strict=True)]
    assert told == repeated
    assert True in [repeated[step] for step in (3, 4, 6, 7)]


def drifting(**settings):
    """A module with TaylorSeer, its companion, and what sets the context of a call."""
    module = Drifts()
    config = hooks.TaylorSeerCacheConfig(**settings, taylor_factors_dtype=torch.float32, cache_identifiers=[""])
    hooks.apply_taylorseer_cache(module, config)
    (hook,) = module._diffusers_hook.hooks.values()
    (manager,) = [value for value in vars(hook).values() if hasattr(value, "_state_cache")]
    make = getattr(hooks.hooks, "CacheContext", lambda name: name)
    return module, TaylorSeerAdapter(hook), lambda name: manager.set_context(make(name=name))


@contextlib.contextmanager
def running(cache):
    cache.begin_call()
    yield
    cache.end_call()


@pytest.mark.parametrize("kept", [0, 1])
def test_what_grows_evenly_is_extrapolated_rightly_after_half_steps(kept):
    module, cache, in_context = drifting(cache_interval=3, disable_cache_before_step=1)
    in_context("both")
    both, one = torch.arange(2), torch.tensor([kept])
    with running(cache):
        for step in range(12):
            module.step = step
            if step == 4:
                cache.on_half_batch(kept)
            if step == 9:
                cache.on_full_batch()
            rows = one if 4 <= step < 9 else both
            output = module(rows)
            cache.on_step_end()
            # One difference is needed before there is a slope.
            if step >= 2:
                torch.testing.assert_close(output, step * module.pace[rows])


def test_a_call_that_was_left_out_catches_up():
    module, cache, in_context = drifting(cache_interval=3, disable_cache_before_step=1)
    with running(cache):
        for step in range(14):
            module.step = step
            if step == 8:
                cache.on_resume_second_call()
            for row, name in enumerate(("cond", "uncond")):
                if name == "uncond" and 4 <= step < 8:
                    continue
                in_context(name)
                output = module(torch.tensor([row]))
                if step >= 2:
                    torch.testing.assert_close(output, step * module.pace[[row]])
            cache.on_step_end()
        states = cache.states
        assert [state.current_step for state in states] == [13, 13]
        assert len({state.last_update_step for state in states}) == 1


def test_more_states_than_calls_have_halves_are_refused():
    module, cache, in_context = drifting(cache_interval=3, disable_cache_before_step=1)
    with running(cache):
        for name in ("both", "further"):
            in_context(name)
            module(torch.arange(2))
        with pytest.raises(ValueError, match=r"TaylorSeerCacheHook keeps 2 states, where one is expected"):
            cache.on_half_batch(0)
    assert not cache.states


@pytest.mark.parametrize(
    ("first", "goes"), [("cache", "cache"), ("T-GATE", "T-GATE"), slow("cache", "T-GATE"), slow("T-GATE", "cache")]
)
def test_cache_dit_and_tgate_come_and_go_in_any_order(first, goes):
    pair = DitPair("pixart_alpha", "cache_dit")
    original, call = type(pair.pipe), type(pair.pipe).__call__
    alone = {"cache": pair.put_in().run(), "T-GATE": pair.case.gated(GATE)}
    pair.take_out()
    both(pair, "cache first" if first == "cache" else "T-GATE first", gate_step=GATE)
    together = pair.run()
    assert not any(torch.equal(together, each) for each in alone.values())
    if first == goes:
        apply_tgate(pair.pipe, GATE)
    assert torch.equal(pair.run(), together)
    assert not pair.kept()
    # Another pipeline of the class, which cache-dit alone would not keep from running either.
    assert torch.equal(pair.case.run(apply_tgate(pair.case.build(), GATE)), alone["T-GATE"])
    if goes == "cache":
        pair.take_out()
        assert type(pair.pipe).__call__ is not call
        assert torch.equal(pair.run(), alone["T-GATE"])
        remove_tgate(pair.pipe)
    else:
        assert type(remove_tgate(pair.pipe)) is original
        assert torch.equal(pair.run(), alone["cache"])
        pair.take_out()
    assert type(pair.pipe) is original
    assert original.__call__ is call
    assert not {"_original_call", "_is_cached"} & vars(original).keys()
    assert torch.equal(pair.run(), pair.case.plain())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("pixart_alpha", [2, 2, 0, 0, 0, 2, 0, 0, 2]), ("wan", None)])
def test_what_cache_dit_keeps_goes_on_at_half_and_full_steps_after_that_are_computed(name, rows):
    pair = DitPair(name, "cache_dit").put_in(residual_diff_threshold=1.0, max_continuous_cached_steps=-1)
    apply_tgate(pair.pipe, TGateSchedule(3, guidance="predict", cfg_interval=3))
    computed, counted = [], []
    blocks = next(module for module in pair.denoiser.children() if isinstance(module, torch.nn.ModuleList))

    def count(*_):
        (context,) = pair.denoiser._context_manager._cached_context_manager.values()
        counted.append((context.get_current_step(), context.is_separate_cfg_step()))

    pair.denoiser.register_forward_pre_hook(lambda *_: computed.append(0))
    pair.denoiser.register_forward_hook(count)
    blocks[1].attn1.to_q.register_forward_hook(lambda module, args, output: computed.__setitem__(-1, len(output)))
    pair.run(num_inference_steps=9)
    calls = [1] * 9 if rows else [2, 2, 2, 1, 1, 2, 1, 1, 2]
    # Two calls of a step are told apart by counting, so one that is left out has to be counted.
    assert counted == [(step, second) for step, number in enumerate(calls) for second in (False, True)[:number]]
    full = (0, 1, 5, 8)
    assert computed == (rows or [int(step in full) for step, number in enumerate(calls) for _ in range(number)])


@pytest.mark.slow
def test_a_call_that_was_left_out_does_not_tell_whether_a_step_was_repeated():
    pair = DitPair("wan", "cache_dit").put_in()
    pair.run()
    cache = DBCacheAdapter(pair.denoiser)
    (context,) = cache.contexts
    context.mark_step_begin()
    context.add_cached_step()
    cache.on_skip_second_call()
    assert cache.was_hit()
    context.mark_step_begin()
    context.add_cached_step()
    context.mark_step_begin()
    assert not cache.was_hit()
    context.add_cached_step()
    assert cache.was_hit()


@pytest.mark.slow
def test_calibrators_of_cache_dit_start_afresh_where_the_batch_changes():
    pair = DitPair("pixart_alpha", "cache_dit_taylor")
    both(pair, "cache first", gate_step=GATE)
    held = []

    def look(*_):
        (context,) = pair.denoiser._context_manager._cached_context_manager.values()
        held.append([state.state["dY_current"][0] is not None for state in context.calibrator.states.values()])

    pair.denoiser.transformer_blocks[0].register_forward_pre_hook(look)
    pair.run()
    assert held == [[], [True], [True], [False], [True], [True]]


@pytest.mark.slow
def test_cache_dit_of_a_transformer_alone_starts_afresh_at_every_call():
    pair = DitPair("pixart_alpha", "cache_dit")
    expected = both(pair, "cache first", gate_step=GATE).run()
    pair.take_out()
    import cache_dit

    config = cache_dit.DBCacheConfig(**SETTINGS["cache_dit"], num_inference_steps=STEPS)
    cache_dit.enable_cache(pair.denoiser, cache_config=config)
    assert [torch.equal(pair.run(), expected) for _ in range(2)] == [True, True]
    cache_dit.disable_cache(pair.denoiser)
    assert torch.equal(pair.run(), pair.case.gated(GATE))


@pytest.mark.slow
def test_a_pipeline_with_both_cannot_be_called_by_its_own_callback():
    pair = DitPair("ltx", "cache_dit").put_in()
    apply_tgate(pair.pipe, GATE)
    expected = pair.run()

    def again(pipe, step, timestep, tensors):
        if step == STEPS - 1:
            pair.run()
        return tensors

    with pytest.raises(RuntimeError, match="is running already"):
        pair.run(callback_on_step_end=again)
    assert torch.equal(pair.run(), expected)


def test_what_of_cache_dit_is_not_known_is_refused():
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit wants newer versions than the oldest")

    def refused(pair, **settings):
        with pytest.raises(ValueError, match="T-GATE cannot") as error:
            apply_settings(pair.pipe, GATE, **settings)
        pair.take_out()
        return str(error.value)

    pixart = DitPair("pixart_alpha", "cache_dit")
    assert "contradicts: pass DBCacheConfig(enable_separate_cfg=False)" in refused(
        pixart.put_in(enable_separate_cfg=True)
    )
    static = {"steps_computation_mask": [1, 1, 1, 0, 1, 0], "steps_computation_policy": "static"}
    assert 'full steps of T-GATE have to be computed: pass "dynamic"' in refused(pixart.put_in(**static))
    assert "cannot reuse self-attention (sp_interval=2, fi_interval=1) together with cache-dit" in refused(
        pixart.put_in(), sp_interval=2
    )
    wan = DitPair("wan", "cache_dit")
    assert "guidance of this pipeline is two calls of the denoiser, one after the other" in refused(
        wan.put_in(enable_separate_cfg=False)
    )
    pixart.put_in(kind="DBPruneConfig")
    assert f"is not known here (cache-dit {cache_dit.__version__})" in refused(pixart)
    assert torch.equal(pixart.run(), pixart.case.plain())
