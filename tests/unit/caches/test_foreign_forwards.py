"""A `forward` that is not its class's own may be a cache: found at every call, and looked through where it is none."""

import contextlib
import functools
import types

import accelerate.hooks
import diffusers
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.counting import layers
from tests.support.settings import apply_settings
from tests.zoo import modular
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import (
    TGateAttnProcessor,
    TGateCallback,
    TGateSchedule,
    apply_tgate,
    get_tgate_report,
)

GATE = 3
FOUND = r"T-GATE found a forward that is not its class's own"


def denoiser_of(case, pipe):
    return getattr(pipe, case.denoiser)


def cached(forward):
    """What a step cache makes of a `forward`."""
    kept = []

    def again(*args, **kwargs):
        kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    return again


def wrapped(forward):
    return functools.wraps(forward)(cached(forward))


class Stands:
    def __init__(self, forward):
        self.behind = forward

    def __call__(self, *args, **kwargs):
        return self.behind(*args, **kwargs)

    def other_name(self, *args, **kwargs):
        return self.behind(*args, **kwargs)


@contextlib.contextmanager
def on_module(module, make):
    before = vars(module).get("forward")
    module.forward = make(module.forward)
    yield
    del module.forward
    if before is not None:
        module.forward = before


@contextlib.contextmanager
def on_class(module, make):
    """As TeaCache does it, `transformer.__class__.forward = ...`."""
    kind, plain = type(module), vars(type(module))["forward"]
    kind.forward = make(plain)
    try:
        yield
    finally:
        kind.forward = plain


@contextlib.contextmanager
def in_place_of_the_class(module, make):
    """A class made of functions."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": make(kind.forward)})
    yield
    module.__class__ = kind


WAYS = {
    "method": (on_module, lambda forward: types.MethodType(lambda self, *args, **kwargs: forward(*args, **kwargs), 1)),
    "function": (on_module, cached),
    "wraps": (on_module, wrapped),
    "partial": (on_module, lambda forward: functools.partial(cached(forward))),
    "handed on": (on_module, lambda forward: functools.partial(checkpoint, cached(forward), use_reentrant=False)),
    "object": (on_module, Stands),
    "its method": (on_module, lambda forward: Stands(forward).other_name),
    "behind torch": (on_module, lambda forward: torch.no_grad()(cached(forward))),
    "class": (on_class, cached),
    "class, wraps": (on_class, wrapped),
    "class, behind torch": (on_class, lambda forward: torch.no_grad()(wrapped(forward))),
    "class replaced": (in_place_of_the_class, cached),
}


def part_of(case, pipe, place):
    """The denoiser, a block of it with the attention layer in it, or that layer."""
    denoiser = denoiser_of(case, pipe)
    if place == "denoiser":
        return "", denoiser
    modules = dict(denoiser.named_modules())
    name = next(name for name, module in modules.items() if hasattr(module, "set_processor"))
    name = name if place == "attention" else name.rpartition(".")[0]
    return name, modules[name]


@pytest.mark.parametrize("first", [slow("patch"), "tgate"])
@pytest.mark.parametrize("place", ["denoiser", thorough("block"), slow("attention")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["sd", thorough("ltx"), slow("wan"), thorough("sd3")])
def test_it_is_refused_by_name_whichever_came_first_and_gone_when_it_is_taken_out(family, way, place, first):
    case = BY_NAME[family]
    pipe, (put_in, make) = case.build(), WAYS[way]
    name, module = part_of(case, pipe, place)
    subject = f"that of {f'{name} ({type(module).__name__})' if name else type(module).__name__} is"
    settings = {"gate_step": GATE, "cross_attention": None if family == "sd" else False}
    if first == "tgate":
        apply_settings(pipe, **settings)
    with put_in(module, make), pytest.raises(ValueError, match=FOUND) as refused:
        apply_settings(pipe, **settings) if first == "patch" else case.run(pipe)
    # Of a class, the first module is named.
    assert put_in is on_class or subject in str(refused.value)
    assert f" of {__name__}. " in str(refused.value)
    assert 'custom_forwards="gate"' in str(refused.value)
    if first == "tgate":
        assert torch.equal(case.run(pipe), case.gated(**settings))


def test_it_is_found_where_the_call_itself_puts_it_in():
    """As reference attention does it, which replaces blocks in the call of the pipeline."""
    case = BY_NAME["sd"]
    kind = type(case.build())

    class Patching(kind):
        @functools.wraps(kind.__call__)
        def __call__(self, *args, **kwargs):
            with on_module(self.unet.mid_block.attentions[0], cached):
                return super().__call__(*args, **kwargs)

    pipe, forwards = case.build(), []
    pipe.__class__ = Patching
    pipe.unet.conv_in.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=FOUND + r": that of mid_block\.attentions\.0 \(Transformer2DModel\) is"):
        case.run(apply_tgate(pipe, GATE))
    assert not forwards


def test_it_is_found_in_a_controlnet():
    case = BY_NAME["sd_controlnet"]
    pipe = apply_tgate(case.build(), 2)
    with on_module(pipe.controlnet, cached), pytest.raises(ValueError, match=FOUND + ": that of ControlNetModel is"):
        case.run(pipe)


@pytest.mark.skipif(not modular.IS_THERE, reason="this diffusers has no modular pipelines")
def test_it_is_found_where_guidance_is_a_guider():
    case = modular.MODULAR[0]
    pipe = apply_tgate(case.build(), GATE)
    denoiser = case.denoiser(pipe)
    with on_module(denoiser, cached):
        with pytest.raises(ValueError, match=FOUND):
            case.run(pipe)
        with pytest.raises(ValueError, match=FOUND):
            apply_tgate(pipe, GATE)
        assert case.run(apply_tgate(pipe, GATE, custom_forwards="gate")).isfinite().all()
    case.run(apply_tgate(pipe, GATE))


@pytest.mark.parametrize("custom", [None, "gate"])
def test_it_is_found_where_t_gate_is_wired_by_hand(custom):
    case = BY_NAME["sd"]
    pipe = case.build()
    callback = TGateCallback(TGateSchedule(GATE), custom_forwards=custom)
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: TGateAttnProcessor(each, callback.state) for name, each in before.items()})
    with on_module(pipe.unet, cached):
        if custom is None:
            with pytest.raises(ValueError, match=FOUND):
                case.run(pipe, callback_on_step_end=callback)
        else:
            assert torch.equal(case.run(pipe, callback_on_step_end=callback), case.gated(GATE))


@pytest.mark.parametrize("family", ["sd", slow("pixart_alpha"), slow("wan")])
def test_the_user_may_say_that_it_keeps_nothing(family):
    case = BY_NAME[family]
    pipe = case.build()
    apply_tgate(pipe, GATE, custom_forwards="gate")
    with on_module(denoiser_of(case, pipe), cached):
        assert torch.equal(case.run(pipe), case.gated(GATE))
    with pytest.raises(ValueError, match=r'`custom_forwards` must be "gate" or None, got \'leave\''):
        apply_tgate(pipe, custom_forwards="leave")


def compiled(forward):
    return torch.compile(forward, backend="eager")


def moved(module):
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def registered(module):
    hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no hook registry")
    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    for name in ("first", "second"):
        registry.register_hook(hooks.ModelHook(), name)


class Adapter(torch.nn.Module):
    """As LyCORIS and kohya's scripts put a LoRA in front of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.down = torch.nn.Linear(layer.in_features, 2)
        self.up = torch.nn.Linear(2, layer.out_features)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)
        self.behind = layer.forward

    def forward(self, *args, **kwargs):
        return self.behind(*args, **kwargs) + self.up(self.down(args[0]))


def traced(module):
    """Code that torch has generated."""
    return torch.fx.symbolic_trace(module)


def unchanged(pipe, case, way):
    """Put in what keeps nothing."""
    denoiser = denoiser_of(case, pipe)
    name, layer = list(layers(pipe, case).items())[-1]
    block = denoiser.get_submodule(name.rpartition(".")[0])
    if way == "its own, bound":
        for module in denoiser.modules():
            module.forward = module.forward
    elif way == "torch.compile":
        block.forward = compiled(block.forward)
    elif way == "a compiled block":
        layer.to_out[0] = torch.compile(layer.to_out[0], backend="eager")
    elif way == "autocast":
        block.forward = torch.autocast("cpu", enabled=False)(block.forward)
        layer.forward = torch.profiler.record_function("layer")(layer.forward)
        denoiser.forward = functools.partial(checkpoint, denoiser.forward, use_reentrant=False)
    elif way == "accelerate":
        for module in (denoiser, block, layer, layer.to_q):
            moved(module)
    elif way == "registry":
        for module in (denoiser, block, layer, layer.to_q):
            registered(module)
    elif way == "registry and accelerate":
        for module in (denoiser, block, layer):
            moved(module)
            registered(module)
            moved(module)
    elif way == "adapter":
        layer.to_q.forward = Adapter(layer.to_q).forward
    elif way == "torch.fx":
        layer.to_q = traced(torch.nn.Sequential(layer.to_q))


HARMLESS = ["its own, bound", "accelerate", "registry", "adapter", slow("torch.compile"), slow("autocast")]
HARMLESS += [slow("registry and accelerate"), slow("torch.fx"), slow("a compiled block")]


@pytest.mark.parametrize("way", HARMLESS)
@pytest.mark.parametrize("family", ["sd", slow("pixart_alpha")])
def test_what_is_known_to_keep_nothing_changes_nothing(family, way):
    case = BY_NAME[family]
    pipe = case.build()
    unchanged(pipe, case, way)
    got = case.run(apply_tgate(pipe, GATE))
    assert torch.allclose(got, case.gated(GATE), atol=1e-6)
    assert get_tgate_report(pipe).half_batch_forwards > 0


@pytest.mark.parametrize(
    "put_in", [moved, registered, lambda module: setattr(module, "forward", compiled(module.forward))]
)
@pytest.mark.parametrize("name", ["denoiser", slow("attention")])
def test_what_is_behind_it_is_found(put_in, name):
    case = BY_NAME["sd"]
    pipe = case.build()
    _, module = part_of(case, pipe, name)
    module.forward = cached(module.forward)
    put_in(module)
    with pytest.raises(
        ValueError, match=FOUND + r".*cached\.<locals>\.again of tests\.unit\.caches\.test_foreign_forwards"
    ):
        apply_tgate(pipe, GATE)


@pytest.mark.parametrize("inside", [False, True])
def test_it_is_found_on_a_denoiser_that_is_compiled(inside):
    pipe = BY_NAME["sd"].build()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    apply_tgate(pipe, GATE)
    module = pipe.unet._orig_mod.mid_block if inside else pipe.unet
    module.forward = cached(module.forward)
    name = r"mid_block \(UNetMidBlock2DCrossAttn\)" if inside else "OptimizedModule"
    with pytest.raises(ValueError, match=FOUND + rf": that of {name} is cached"):
        apply_tgate(pipe, GATE)


def test_what_was_put_behind_a_hook_later_is_found():
    """Where caches look for the `forward` that offloading has laid aside."""
    pipe = apply_tgate(BY_NAME["sd"].build(), GATE)
    moved(pipe.unet)
    pipe.unet._old_forward = cached(pipe.unet._old_forward)
    with pytest.raises(ValueError, match=FOUND + r".*cached\.<locals>\.again"):
        apply_tgate(pipe, GATE)
    accelerate.hooks.remove_hook_from_module(pipe.unet)
    del pipe.unet.forward
    registered(pipe.unet)
    behind = pipe.unet._diffusers_hook._fn_refs[0]
    behind.forward = cached(behind.forward)
    with pytest.raises(ValueError, match=FOUND + r".*cached\.<locals>\.again"):
        apply_tgate(pipe, GATE)


def test_what_is_between_hooks_of_diffusers_is_found():
    hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers has no hook registry")
    pipe = BY_NAME["sd"].build()
    registry = hooks.HookRegistry.check_if_exists_or_initialize(pipe.unet)
    registry.register_hook(hooks.ModelHook(), "first")
    pipe.unet.forward = cached(pipe.unet.forward)
    registry.register_hook(hooks.ModelHook(), "second")
    with pytest.raises(ValueError, match=FOUND + r".*cached\.<locals>\.again"):
        apply_tgate(pipe, GATE)


def decorated(forward):
    @functools.wraps(forward)
    def inside(*args, **kwargs):
        return forward(*args, **kwargs)

    return inside


class Denoiser(diffusers.UNet2DConditionModel):
    """A class of the user's."""

    @decorated
    def forward(self, sample, *args, encoder_hidden_states, **kwargs):
        self.last_rows = len(sample)
        return super().forward(sample, *args, encoder_hidden_states=encoder_hidden_states, **kwargs)


class Block(torch.nn.Module):
    """And a block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


@pytest.mark.parametrize("what", ["denoiser", "block"])
def test_classes_of_the_user_with_a_forward_of_their_own_are_gated(what):
    case = BY_NAME["sd"]
    pipe = case.build()
    if what == "denoiser":
        unet = Denoiser.from_config(pipe.unet.config).eval()
        unet.load_state_dict(pipe.unet.state_dict())
        pipe.unet = unet
    else:
        block = pipe.unet.mid_block.attentions[0].transformer_blocks
        block[0] = Block(block[0])
    assert torch.equal(case.run(apply_tgate(pipe, GATE)), case.gated(GATE))
    if what == "denoiser":
        Denoiser.forward, plain = cached(Denoiser.forward), Denoiser.forward
        try:
            with pytest.raises(ValueError, match=FOUND + r": that of Denoiser is cached"):
                case.run(pipe)
        finally:
            Denoiser.forward = plain


_KEPT = {}


class _Cache:
    kept = None


def keeper(kind, where):
    """A class that steps in for another one, with a forward of its own that keeps what it gave last."""
    closure = []

    class Keeper(kind):
        @functools.wraps(kind.forward)
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            change = output if isinstance(output, torch.Tensor) else output[0]
            if where == "closure":
                closure[:] = [change]
            elif where == "global":
                _KEPT["change"] = change
            elif where == "class":
                type(self).change = change
            elif where == "object":
                self.cache = _Cache()
                self.cache.kept = {"change": change}
            else:
                self.change = change
            return output

    return Keeper


@pytest.mark.parametrize("where", ["attribute", slow("closure"), slow("global"), slow("class"), slow("object")])
@pytest.mark.parametrize("place", ["denoiser", slow("attention")])
@pytest.mark.parametrize("family", ["sd", slow("ltx"), slow("wan")])
def test_a_class_in_the_place_of_another_that_keeps_tensors_of_the_batch_is_refused(family, place, where):
    case = BY_NAME[family]
    pipe = case.build()
    settings = {"gate_step": GATE, "cross_attention": None if family == "sd" else False}
    apply_settings(pipe, **settings)
    expected = case.gated(**settings)
    name, module = part_of(case, pipe, place)
    kind = type(module)
    module.__class__ = keeper(kind, where)
    forwards = []
    denoiser_of(case, pipe).register_forward_pre_hook(lambda *_: forwards.append(1))
    # Also where something is left from another call.
    for _ in range(2):
        forwards.clear()
        with pytest.raises(
            ValueError,
            match=rf"{name}.* \(?Keeper.*keeps a tensor of the whole batch, \w+ of shape" if name else "Keeper, which",
        ):
            case.run(pipe)
        assert len(forwards) == 1
    assert torch.equal(case.run(apply_settings(pipe, **settings, custom_forwards="gate")), expected)
    module.__class__ = kind
    assert torch.equal(case.run(apply_settings(pipe, **settings)), expected)


def test_without_guidance_nothing_is_halved_and_it_may_keep_what_it_likes():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), GATE)
    pipe.unet.__class__ = keeper(type(pipe.unet), "attribute")
    assert torch.equal(case.run(pipe, guidance_scale=1.0), case.gated(GATE, call={"guidance_scale": 1.0}))


PARA_ATTENTION = """
import functools, unittest.mock

def put_in(transformer, blocks):
    plain = transformer.forward

    @functools.wraps(type(transformer).forward)
    def new_forward(self, *args, **kwargs):
        with unittest.mock.patch.object(self, "transformer_blocks", blocks):
            return plain(*args, **kwargs)

    transformer.forward = new_forward.__get__(transformer)
    transformer._is_cached = True
"""


@pytest.mark.parametrize("first", ["cache", "tgate"])
def test_paraattention_is_named(first):
    """What it leaves on a transformer; the mark is cache-dit's too."""
    case = BY_NAME["pixart_alpha"]
    pipe = case.build()
    place = {"__name__": "para_attn.first_block_cache.diffusers_adapters.pixart"}
    exec(PARA_ATTENTION, place)
    message = FOUND + r": that of PixArtTransformer2DModel is ParaAttention \(.*Load the pipeline anew"
    if first == "cache":
        place["put_in"](pipe.transformer, pipe.transformer.transformer_blocks)
        with pytest.raises(ValueError, match=message):
            apply_tgate(pipe, GATE)
    else:
        apply_tgate(pipe, GATE)
        place["put_in"](pipe.transformer, pipe.transformer.transformer_blocks)
        with pytest.raises(ValueError, match=message):
            case.run(pipe)


@pytest.mark.slow
def test_every_class_of_diffusers_has_a_forward_of_its_own():
    from tgate_processors._internal.caches.forward_origin import foreign_of_class

    for name in dir(diffusers):
        with contextlib.suppress(ImportError, RuntimeError, AttributeError):
            getattr(diffusers, name)
    pending, kinds = [torch.nn.Module], set()
    while pending:
        found = [kind for kind in pending.pop().__subclasses__() if kind not in kinds]
        kinds.update(found)
        pending += found
    ours = [kind for kind in kinds if kind.__module__.split(".")[0] in {"diffusers", "transformers", "torch", "peft"}]
    assert len(ours) > 500
    assert not [kind for kind in ours if foreign_of_class(kind) is not None]
