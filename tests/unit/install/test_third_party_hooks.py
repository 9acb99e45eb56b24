"""What others put on the same denoiser: hooks see whole batches, processors of their own stay, caches are found."""

import contextlib
import functools
import math

import pytest
import tomesd
import torch
from DeepCache import DeepCacheSDHelper
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.support.comparing import distance
from tests.support.counting import layers
from tests.support.settings import apply_settings
from tests.zoo.case import STEPS, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report, remove_tgate

GATE = 3


@pytest.fixture(params=["sd", thorough("sdxl"), "pixart_alpha"])
def case(request):
    return BY_NAME[request.param]


def leaves(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, torch.Tensor):
        yield tuple(value.shape)


class Watch:
    """Hooks of a user's, which take down the shapes that they see."""

    def __init__(self, denoiser, prepend=False):
        self.before, self.after = [], []
        self.handles = [
            denoiser.register_forward_pre_hook(self.pre, with_kwargs=True, prepend=prepend),
            denoiser.register_forward_hook(self.post, with_kwargs=True, prepend=prepend),
        ]

    def pre(self, module, args, kwargs):
        self.before.append([*leaves(args), *leaves(kwargs)])

    def post(self, module, args, kwargs, output):
        self.after.append([[*leaves(args), *leaves(kwargs)], [*leaves(output)]])


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize(
    ("name", "when"),
    [(name, when) for name in ("sd", "sdxl", "pixart_alpha") for when in ("before", "after")]
    # PixArt has no step callback in which to register one.
    + [("sd", "in_a_run"), ("sdxl", "in_a_run")],
)
def test_hooks_see_the_batch_that_the_pipeline_gives_and_the_output_that_it_gets(name, when, prepend):
    case = BY_NAME[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    plain = Watch(denoiser)
    case.run(pipe, [0, 1])
    for handle in plain.handles:
        handle.remove()
    gated, call = None, {}
    if when == "before":
        gated = Watch(denoiser, prepend)
    apply_tgate(pipe, GATE)
    expected = case.gated(GATE, [0, 1])
    if when == "after":
        gated = Watch(denoiser, prepend)
    if when == "in_a_run":

        def register(pipe, step, timestep, tensors):
            nonlocal gated
            if step == GATE:
                gated = Watch(denoiser, prepend)
            return tensors

        call = {"callback_on_step_end": register}
    got = case.run(pipe, [0, 1], **call)
    steps = GATE + 1 if when == "in_a_run" else 0
    assert gated.before == plain.before[steps:]
    assert gated.after == plain.after[steps:]
    if when != "in_a_run":
        assert torch.equal(got, expected)
        assert get_tgate_report(pipe).half_batch_forwards == STEPS - GATE


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("prompts", [[0], [0, 1]], ids=["one", "two"])
def test_what_hooks_do_to_both_halves_does_not_depend_on_their_order(case, when, prompts):
    def rescaled(module, args, output):
        u, c = output[0].chunk(2)
        return (torch.cat([u, u + 0.9 * (c - u)]), *output[1:])

    def noisier(module, args, kwargs):
        half = len(args[0]) // 2
        return (torch.cat([args[0][:half], args[0][half:] * 1.1]), *args[1:]), kwargs

    def run(when):
        pipe = case.build()
        if when == "after":
            apply_tgate(pipe, GATE)
        denoiser = getattr(pipe, case.denoiser)
        denoiser.register_forward_pre_hook(noisier, with_kwargs=True)
        denoiser.register_forward_hook(rescaled)
        if when == "before":
            apply_tgate(pipe, GATE)
        return case.run(pipe, prompts)

    assert torch.equal(run("before"), run("after"))


def test_the_order_of_the_users_hooks_stays(case):
    pipe, order = case.build(), []
    denoiser = getattr(pipe, case.denoiser)
    denoiser.register_forward_pre_hook(lambda *_: order.append("first"))
    denoiser.register_forward_hook(lambda *_: order.append("third"))
    apply_tgate(pipe, GATE)
    denoiser.register_forward_pre_hook(lambda *_: order.append("second"))
    denoiser.register_forward_hook(lambda *_: order.append("fourth"))
    case.run(pipe)
    assert order == ["first", "second", "third", "fourth"] * STEPS
    remove_tgate(pipe)
    assert len(denoiser._forward_pre_hooks) == len(denoiser._forward_hooks) == 2


class Shared(AttnProcessor2_0):
    """StyleAligned: self-attention looks at the first picture of either half too."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is None:
            half = len(hidden_states) // 2
            reference = hidden_states[[0] * half + [half] * (len(hidden_states) - half)]
            encoder_hidden_states = torch.cat([hidden_states, reference], 1)
            attention_mask = None
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class Counting(AttnProcessor2_0):
    """Prompt-to-Prompt: counts the calls of all layers to know the step."""

    calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        type(self).calls += 1
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.parametrize("custom", [None, "leave"])
def test_processors_that_mix_pictures_get_whole_batches_and_the_others_are_gated(case, custom, caplog):
    def build():
        pipe = case.build()
        for layer in layers(pipe, case, "attn1").values():
            layer.set_processor(Shared())
        return pipe

    pipe = build()
    denoiser = getattr(pipe, case.denoiser)
    plain = case.run(pipe, [0, 1, 2])
    batches = []
    first = next(iter(layers(pipe, case, "attn1").values()))
    first.to_q.register_forward_hook(lambda module, args, output: batches.append(len(output)))
    apply_tgate(pipe, GATE, custom_processors=custom)
    gated = case.run(pipe, [0, 1, 2])
    assert not torch.equal(gated, plain)
    assert batches == [6] * STEPS
    report = get_tgate_report(pipe)
    assert (report.cross_attention_reused, report.half_batch_forwards) == (STEPS - GATE, 0)
    # The references are those of the plain run: picture 2 follows picture 0 and not picture 1.
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen.setdefault(name, []).append(output)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers(pipe, case).items()]
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    outputs = []
    case.run(pipe, [0, 1, 2])
    for handle in handles:
        handle.remove()
    # What cross-attention gave at the gate is what it gives from there on, in every row.
    assert all(torch.equal(given[GATE - 1], given[-1]) for given in seen.values())
    messages = [record.message for record in caplog.records if record.name.startswith("tgate")]
    assert len(messages) == 1
    count = len(layers(pipe, case, "attn1"))
    assert messages[0].startswith(f"T-GATE: {count} attention layers (first: ")
    assert "guidance is kept in full" in messages[0]


def test_processors_that_count_are_called_as_often_as_without_tgate_unless_the_user_says_so(case, caplog):
    def calls(**settings):
        pipe = case.build()
        denoiser = getattr(pipe, case.denoiser)
        denoiser.set_attn_processor({name: Counting() for name in denoiser.attn_processors})
        if settings:
            apply_settings(pipe, **settings)
        Counting.calls = 0
        latents = case.run(pipe)
        return Counting.calls, latents

    count, plain = calls()
    left, latents = calls(gate_step=GATE)
    assert left == count
    assert torch.equal(latents, plain)
    assert any("T-GATE: nothing was gated in this call" in record.message for record in caplog.records)
    fewer, latents = calls(gate_step=GATE, custom_processors="gate")
    assert fewer == count - (STEPS - GATE) * len(layers(case.build(), case))
    assert torch.equal(latents, case.gated(GATE))


def test_without_guidance_nothing_is_said_of_it(caplog):
    case = BY_NAME["sd"]
    pipe = case.build()
    for layer in layers(pipe, case, "attn1").values():
        layer.set_processor(Shared())
    case.run(apply_tgate(pipe, GATE), guidance_scale=1.0)
    (message,) = [record.message for record in caplog.records if record.name.startswith("tgate")]
    assert "guidance" not in message


def test_an_unknown_word_for_them_is_refused():
    with pytest.raises(ValueError, match='`custom_processors` must be "leave" or "gate", got \'keep\''):
        apply_tgate(BY_NAME["sd"].build(), custom_processors="keep")


def take_out(denoiser):
    for module in denoiser.modules():
        registry = vars(module).get("_diffusers_hook")
        for name in list(registry.hooks) if registry else []:
            registry.remove_hook(name, recurse=False)


@pytest.mark.parametrize("first", ["cache", "tgate"])
def test_a_cache_that_is_not_known_is_refused_by_name_whichever_came_first(first):
    diffusers_hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no caches")

    class Remembers(diffusers_hooks.ModelHook):
        _is_stateful = True

    case = BY_NAME["pixart_alpha"]
    pipe = case.build()
    expected = case.gated(GATE)

    def cache():
        registry = diffusers_hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.register_hook(Remembers(), "remembers")

    message = (
        r"T-GATE cannot run together with Remembers \('remembers'\) on the same.*\(diffusers .*remove_hook\('\w+'\)"
    )
    if first == "cache":
        cache()
        with pytest.raises(ValueError, match=message):
            apply_tgate(pipe, GATE)
    else:
        apply_tgate(pipe, GATE)
        cache()
        with pytest.raises(ValueError, match=message):
            case.run(pipe)
    take_out(pipe.transformer)
    assert torch.equal(case.run(apply_tgate(pipe, GATE)), expected)


def test_hooks_that_keep_nothing_are_no_caches():
    """Offloading and casting register in the same place."""
    diffusers_hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no caches")

    class Nothing(diffusers_hooks.ModelHook):
        pass

    case = BY_NAME["pixart_alpha"]
    pipe = apply_tgate(case.build(), GATE)
    expected = case.gated(GATE)
    diffusers_hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Nothing(), "nothing")
    assert torch.equal(case.run(pipe), expected)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_merged_tokens_go_with_what_is_not_reused(name):
    case = BY_NAME[name]
    pipe = apply_tgate(case.build(), GATE)
    plain = case.gated(GATE)
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=8, use_rand=False)
    merged = case.run(pipe)
    assert not torch.equal(merged, plain)
    assert get_tgate_report(pipe).half_batch_forwards == STEPS - GATE
    remove_tgate(pipe)
    with pytest.raises(
        ValueError, match=r"T-GATE cannot reuse self-attention \(sp_interval=2, fi_interval=1\) together with"
    ):
        apply_tgate(pipe, TGateSchedule(GATE, sp_interval=2))
    apply_tgate(pipe, GATE)
    tomesd.remove_patch(pipe)
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=8, merge_crossattn=True)
    with pytest.raises(ValueError, match=r"T-GATE cannot run together with ToMe with merge_crossattn=True"):
        case.run(pipe)
    tomesd.remove_patch(pipe)
    assert torch.equal(case.run(pipe), plain)


@contextlib.contextmanager
def tiled(denoiser):
    """As HyperTile does it: `forward` of self-attention runs on tiles, whose number changes from step to step."""

    def forward_of(layer, forward):
        @functools.wraps(forward)
        def on_tiles(states, *args, **kwargs):
            down, across = [(1, 2), (2, 1), (2, 2)][len(layer._split_sizes) % 3]
            layer._split_sizes.append((down, across))
            side = math.isqrt(states.shape[1])
            cut = (len(states), down, side // down, across, side // across, -1)
            tiles = states.view(cut).transpose(2, 3)
            output = forward(tiles.flatten(3, 4).flatten(0, 2), *args, **kwargs)
            return output.view(tiles.shape).transpose(2, 3).reshape(states.shape)

        return on_tiles

    layers = [module for name, module in denoiser.named_modules() if name.endswith("attn1")]
    for layer in layers:
        layer._original_forward, layer._split_sizes = layer.forward, []
        layer.forward = forward_of(layer, layer.forward)
    yield
    for layer in layers:
        layer.forward = layer._original_forward
        del layer._original_forward, layer._split_sizes


@pytest.mark.slow
def test_tiles_go_with_what_is_not_reused():
    case = BY_NAME["sd"]
    pipe = case.build()
    with tiled(pipe.unet):
        alone = case.run(pipe)
    assert not torch.equal(alone, case.plain())
    apply_tgate(pipe, 99)
    with tiled(pipe.unet):
        assert torch.equal(case.run(pipe), alone)
        apply_tgate(pipe, GATE)
    with tiled(pipe.unet):
        together = case.run(pipe)
    report = get_tgate_report(pipe)
    assert (report.half_batch_forwards, report.cross_attention_reused) == (STEPS - GATE, STEPS - GATE)
    assert not torch.equal(together, case.gated(GATE))
    assert torch.equal(case.run(pipe), case.gated(GATE))
    singles = []
    for prompt in (0, 1):
        with tiled(pipe.unet):
            singles.append(case.run(pipe, [prompt]))
    with tiled(pipe.unet):
        assert distance(case.run(pipe, [0, 1]), torch.cat(singles)) < 1e-5
        with pytest.raises(
            ValueError, match=r"cannot reuse self-attention \(sp_interval=1, fi_interval=2\) together with Hy"
        ):
            apply_tgate(pipe, TGateSchedule(GATE, fi_interval=2))
    remove_tgate(pipe)
    with tiled(pipe.unet):
        assert torch.equal(case.run(pipe), alone)


@pytest.mark.parametrize("first", ["helper", "tgate"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_deepcache_helper_that_was_not_handed_over_is_refused(name, first):
    case = BY_NAME[name]
    pipe = case.build()
    expected = case.gated(GATE)
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    message = r"T-GATE found DeepCache enabled.*deepcache=helper"
    if first == "helper":
        helper.enable()
        with pytest.raises(ValueError, match=message):
            apply_tgate(pipe, GATE)
    else:
        apply_tgate(pipe, GATE)
        helper.enable()
        with pytest.raises(ValueError, match=message):
            case.run(pipe)
    apply_tgate(pipe, GATE, deepcache=helper)
    assert case.run(pipe).isfinite().all()
    helper.disable()
    assert torch.equal(case.run(apply_tgate(pipe, GATE)), expected)
