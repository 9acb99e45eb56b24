"""A denoiser with an argument of its own that may be a batch; one of several denoisers; an engine in its place."""

import diffusers
import pytest
import torch

from tests.support.custom_loops import Loop, built
from tests.zoo.case import quiet, seeded, slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, is_tgate_applied
from tgate_processors._internal.families import resolve_pipeline
from tgate_processors._internal.install.pipeline_call import call_of

CASE = BY_NAME["sd"]
NEEDS_EXPERTS = pytest.mark.skipif(not BY_NAME["wan_experts"].is_there, reason="this diffusers has no Wan 2.2")


class Dressed(diffusers.UNet2DConditionModel):
    """Sees the features of a garment, in front of the picture's own width."""

    tables = None

    def forward(self, sample, timestep, encoder_hidden_states, garment=None, more=None, table=None, **kwargs):
        if self.tables is not None:
            self.tables.append(tuple(table.shape))
        width, garment = sample.shape[-1], garment if more is None else more["garment"]
        sample = torch.cat([garment, sample], dim=-1)
        return (super().forward(sample, timestep, encoder_hidden_states, **kwargs)[0][..., -width:],)


class TryOn(Loop):
    """A loop that gives it the features: none for the unconditional half."""

    inside = False

    def denoise(self, x, t, text, pooled):
        rows = len(x)
        features = torch.cat([seeded((1, *x.shape[1:]), 40)] * rows)
        features[: rows // 2] = 0
        given = {"more": {"garment": features}} if self.inside else {"garment": features}
        if self.unet.tables is not None:
            given["table"] = torch.zeros(2, 3)
        return self.unet(x, t, encoder_hidden_states=text, added_cond_kwargs={"table": torch.zeros(4, 3)}, **given)[0]


def dressed(inside=False):
    parts = CASE.build().components
    unet = Dressed.from_config(parts["unet"].config).eval()
    unet.load_state_dict(parts["unet"].state_dict())
    pipe = built("sd", TryOn)
    pipe.register_modules(unet=unet)
    pipe.inside = inside
    return pipe


@pytest.mark.parametrize("inside", [False, slow(True)], ids=["argument", "in_a_dict"])
def test_an_argument_of_its_own_is_refused_until_it_is_told(inside):
    name = "more" if inside else "garment"
    said = f"Dressed has an argument '{name}' of its own, here of shape"
    with pytest.raises(ValueError, match=said):
        CASE.run(apply_tgate(dressed(inside), 3))
    # Nothing is left out: nothing needs to be known.
    assert torch.equal(CASE.run(apply_tgate(dressed(inside), 1000)), CASE.run(dressed(inside)))
    told = {"batch_arguments": ["more.garment" if inside else "garment"]}
    one = CASE.run(apply_tgate(dressed(inside), 3, **told))
    two = CASE.run(apply_tgate(dressed(inside), 3, **told), [0, 1])
    assert torch.allclose(two[:1], one, atol=1e-3)
    assert not torch.equal(one, CASE.run(dressed(inside)))


def test_what_is_said_to_be_no_batch_is_handed_on_whole():
    pipe = dressed()
    pipe.unet.tables = []
    CASE.run(apply_tgate(pipe, 3, batch_arguments=("garment",)))
    assert get_tgate_report(pipe).half_batch_forwards == 3
    assert set(pipe.unet.tables) == {(2, 3)}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("garment", TypeError, "must be a tuple of names, got .* of type str"),
        (3, TypeError, "got 3 of type int"),
        ([1], TypeError, "of type list"),
        (("garment",), ValueError, "UNet2DConditionModel has no argument 'garment'. It has sample, timestep"),
    ],
)
def test_names_are_checked(value, error, message):
    pipe = CASE.build()
    with pytest.raises(error, match=message):
        apply_tgate(pipe, 3, batch_arguments=value)
    assert not is_tgate_applied(pipe)


def test_names_have_no_effect_where_guidance_is_two_calls():
    with pytest.raises(ValueError, match="has no effect: the guidance of WanPipeline is not two halves of one batch"):
        apply_tgate(BY_NAME["wan"].build(), 3, batch_arguments=("hidden_states",))


@NEEDS_EXPERTS
def test_a_second_denoiser_alone_is_gated():
    kind = BY_NAME["wan_experts"]
    parts = {**kind.build().components, "transformer": None}
    # Above every timestep, as in the second part of a run.
    pipe = quiet(diffusers.WanPipeline(**parts, boundary_ratio=1.5))
    plain = kind.run(pipe, guidance_scale_2=3.0)
    assert torch.equal(kind.run(apply_tgate(pipe, tolerance=0), guidance_scale_2=3.0), plain)
    apply_tgate(pipe, 3)
    gated = kind.run(pipe, guidance_scale_2=3.0)
    assert get_tgate_report(pipe).half_batch_forwards == 3
    assert not torch.equal(gated, plain)
    # Another scale than that of the one that is not there.
    assert call_of(resolve_pipeline(pipe), pipe, {"guidance_scale_2": 3.0}).guidance_scale() == 3.0


class Engine:
    """Can be called, and has a configuration."""

    def __init__(self, module):
        self.config, self.dtype, self.device, self._module = module.config, module.dtype, module.device, module

    def __call__(self, *args, **kwargs):
        return self._module(*args, **kwargs)


@pytest.mark.parametrize("alone", [{}, {"cross_attention": False}], ids=["all", "guidance"])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (CASE, "unet"),
        (BY_NAME["pixart_alpha"], "transformer"),
        (BY_NAME["sd3"], "transformer"),
        (BY_NAME["sd_controlnet"], "controlnet"),
        pytest.param(BY_NAME["wan_experts"], "transformer_2", marks=NEEDS_EXPERTS),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_engine_is_refused_by_name(case, name, alone):
    pipe = case.build()
    vars(pipe)[name] = Engine(getattr(pipe, name))
    with pytest.raises(ValueError, match=f"its {name} is of type Engine, which is no torch module"):
        apply_tgate(pipe, 3, **alone)
    assert not is_tgate_applied(pipe)


def unflattened(module, example):
    return torch.export.unflatten(torch.export.export(module, (example,)))


@pytest.mark.parametrize(
    "graph_of",
    [torch.jit.trace, lambda module, example: torch.fx.symbolic_trace(module), slow(unflattened)],
    ids=["jit", "fx", "export"],
)
def test_a_traced_graph_is_refused_by_name(graph_of):
    pipe = CASE.build()
    vars(pipe)["unet"] = graph_of(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="which is a graph that was traced or exported"):
        apply_tgate(pipe, 3)


@pytest.mark.parametrize("layers", [[], pytest.param([0], marks=pytest.mark.slow)], ids=["none", "one"])
def test_layers_to_skip_may_be_none(layers):
    """A further call is made for an empty list too."""
    case = BY_NAME["sd3"]
    given = {"skip_guidance_layers": layers, "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    plain = case.run(case.build(), **given)
    assert torch.equal(case.run(apply_tgate(case.build(), 1000, cross_attention=False), **given), plain)
    pipe = apply_tgate(case.build(), 3, cross_attention=False)
    assert case.run(pipe, **given).isfinite().all()
    assert get_tgate_report(pipe).half_batch_forwards == 3


@pytest.mark.parametrize("wrapper", ["DataParallel", "DistributedDataParallel"])
def test_a_denoiser_that_is_wrapped_for_several_devices_is_refused_with_what_to_do(wrapper, tmp_path):
    pipe = CASE.build()
    baseline = CASE.run(pipe)
    denoiser = pipe.unet
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        vars(pipe)["unet"] = getattr(torch.nn.parallel, wrapper)(denoiser)
        with pytest.raises(ValueError, match=rf"is wrapped in {wrapper}, .* pipe.unet = pipe.unet.module.*fully_shard"):
            apply_tgate(pipe, 3)
        vars(pipe)["unet"] = pipe.unet.module
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(CASE.run(apply_tgate(pipe, 99)), baseline)
