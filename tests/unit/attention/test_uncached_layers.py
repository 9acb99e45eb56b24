"""A half of the batch is left out only if every cross-attention layer holds what the forward needs."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.support.counting import layers
from tests.support.settings import apply_settings
from tests.zoo.case import quiet, slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate

GATE = 3


@pytest.fixture(params=["sd", slow("sdxl"), "pixart_alpha"])
def case(request):
    return BY_NAME[request.param]


def without_processors(attn):
    """`Attention.forward` as Prompt-to-Prompt, MasaCtrl and others replace it."""

    def forward(hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            attention_mask = attention_mask.reshape(len(query), -1, context.shape[1])
        weights = attn.get_attention_scores(query, key, attention_mask)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(weights, value)))

    return forward


@pytest.mark.parametrize("which", ["all", "last"])
def test_layers_that_do_not_call_their_processors_are_named(case, which):
    pipe = case.build()
    plain = case.plain()
    patched = list(layers(pipe, case).items())[-1 if which == "last" else 0 :]
    for _, layer in patched:
        layer.forward = without_processors(layer)
    baseline = case.run(pipe)
    assert torch.allclose(baseline, plain, atol=1e-3)
    apply_tgate(pipe, GATE, custom_forwards="gate")
    with pytest.raises(
        ValueError, match=rf"{len(patched)} cross-attention layers, {patched[0][0]} among them, keep no"
    ):
        case.run(pipe)
    assert vars(pipe)["_tgate"].state.nbytes == 0
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)
    for _, layer in patched:
        del layer.forward
    assert torch.equal(case.run(apply_tgate(pipe, GATE)), case.gated(GATE))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_layer_that_stops_calling_its_processor_after_the_gate_is_named(name):
    """It holds an output, and would compute on half of the text all the same."""
    case = BY_NAME[name]
    pipe = case.build()
    layer_name, layer = list(layers(pipe, case).items())[-1]

    def patch(pipe, step, timestep, tensors):
        if step == GATE:
            layer.forward = without_processors(layer)
        return tensors

    apply_tgate(pipe, GATE)
    with pytest.raises(ValueError, match=rf"1 cross-attention layers, {layer_name} among them, did not give out what"):
        case.run(pipe, callback_on_step_end=patch)
    del layer.forward
    assert torch.equal(case.run(pipe), case.gated(GATE))


def test_without_guidance_they_leave_the_plain_picture_and_a_warning(case, caplog):
    pipe = case.build()
    for layer in layers(pipe, case).values():
        layer.forward = without_processors(layer)
    baseline = case.run(pipe, guidance_scale=1.0)
    apply_tgate(pipe, GATE, custom_forwards="gate")
    assert torch.equal(case.run(pipe, guidance_scale=1.0), baseline)
    assert get_tgate_report(pipe).cross_attention_reused == 0
    messages = [record.message for record in caplog.records if record.name.startswith("tgate")]
    (message,) = messages
    assert message == (
        f"T-GATE: nothing was gated in this call of {type(pipe).__name__}: its attention layers do not call their "
        "processors. The picture is that without T-GATE."
    )


@pytest.mark.parametrize("settings", [{"gate_step": GATE}, {"gate_step": 4, "sp_interval": 2, "warm_up": 1}], ids=str)
def test_processors_that_the_call_itself_sets_are_gated(case, settings):
    base = type(case.build())

    def __call__(self, *args, guidance_scale=case.guidance, **kwargs):
        denoiser = getattr(self, case.denoiser)
        denoiser.set_attn_processor({name: AttnProcessor2_0() for name in denoiser.attn_processors})
        return base.__call__(self, *args, guidance_scale=guidance_scale, **kwargs)

    body = {"__call__": __call__}
    if case.has_callback:
        # A loop has to take the callback to be counted by it.
        def __call__(self, *args, callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",), **kwargs):
            inputs = {"callback_on_step_end_tensor_inputs": list(callback_on_step_end_tensor_inputs)}
            return body["plain"](self, *args, callback_on_step_end=callback_on_step_end, **inputs, **kwargs)

        body = {"__call__": __call__, "plain": body["__call__"]}
    more = {"requires_safety_checker": False} if case.name == "sd" else {}
    pipe = quiet(type("Controlled", (base,), body)(**case.build().components, **more))
    baseline = case.run(pipe)
    # Self-attention that lost its gate is not reused, so only the first kind of T-GATE is the same.
    if "sp_interval" not in settings:
        assert torch.equal(case.run(apply_settings(pipe, **settings)), case.gated(**settings))
    else:
        assert case.run(apply_settings(pipe, **settings)).isfinite().all()
        assert get_tgate_report(pipe).self_attention_reused == 0
    assert get_tgate_report(pipe).half_batch_forwards == 6 - settings["gate_step"]
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)
    assert not any("TGate" in type(layer.processor).__name__ for layer in layers(pipe, case, "attn").values())


def grow(step):
    def callback(pipe, index, timestep, values):
        if index == step:
            values["latents"] = torch.nn.functional.interpolate(values["latents"], scale_factor=2)
        return values

    return callback


def rows_of_text(pipe, case):
    rows = []
    for layer in layers(pipe, case).values():
        layer.to_k.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


@pytest.mark.parametrize("settings", [{}, {"sp_interval": 2, "fi_interval": 2, "warm_up": 1}], ids=["v1", "v2"])
@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_latents_that_change_their_size_after_the_gate_get_a_full_step(name, scale, settings):
    case = BY_NAME[name]
    pipe = apply_settings(case.build(), GATE, **settings)
    rows, batches = rows_of_text(pipe, case), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latents = case.run(pipe, callback_on_step_end=grow(3), guidance_scale=scale)
    assert latents.shape[-1] == 16
    parts = 2 if scale > 1 else 1
    # Step 4 is full again, and keeps for step 5.
    assert batches == [parts, parts, parts, 1, parts, 1]
    assert set(rows) == {parts}
    assert len(rows) == 4 * len(layers(pipe, case))
    report = get_tgate_report(pipe)
    assert (report.cross_attention_computed, report.cross_attention_reused) == (4, 2)


class TestInside:
    """Blocks that change the size of what they work on at some step, as kohya's hires fix does."""

    @staticmethod
    def shrink_from(unet, step):
        block, count = unet.mid_block, []
        forward = block.forward

        def changed(hidden_states, *args, **kwargs):
            count.append(1)
            if len(count) <= step:
                return forward(hidden_states, *args, **kwargs)
            half = torch.nn.functional.avg_pool2d(hidden_states, 2)
            return torch.nn.functional.interpolate(forward(half, *args, **kwargs), scale_factor=2)

        block.forward = changed

    @pytest.mark.parametrize("name", ["sd", "sdxl"])
    def test_with_guidance_it_is_refused_and_never_computed_on_half_of_the_text(self, name):
        case = BY_NAME[name]
        pipe = case.build()
        self.shrink_from(pipe.unet, 4)
        rows = rows_of_text(pipe, case)
        apply_tgate(pipe, GATE, custom_forwards="gate")
        with pytest.raises(
            ValueError, match=r"in mid_block\..*attn2 a cross-attention layer would have to compute on ha"
        ):
            case.run(pipe)
        assert set(rows) == {2}

    @pytest.mark.parametrize("name", ["sd", "sdxl"])
    def test_without_guidance_it_is_computed_and_kept_anew(self, name):
        case = BY_NAME[name]
        pipe = apply_tgate(case.build(), GATE, custom_forwards="gate")
        self.shrink_from(pipe.unet, 4)
        rows = rows_of_text(pipe, case)
        case.run(pipe, guidance_scale=1.0)
        inner = len([name for name in layers(pipe, case) if "mid_block" in name])
        assert len(rows) == GATE * len(layers(pipe, case)) + inner


def test_a_layer_that_runs_twice_in_a_forward_is_refused(case):
    """One kept output does not serve two windows of frames, or two tiles."""
    pipe = case.build()
    name, layer = list(layers(pipe, case).items())[-1]
    forward = layer.forward

    def twice(hidden_states, *args, **kwargs):
        forward(hidden_states * 0.5, *args, **kwargs)
        return forward(hidden_states, *args, **kwargs)

    layer.forward = twice
    baseline = case.run(pipe)
    apply_tgate(pipe, GATE, custom_forwards="gate")
    with pytest.raises(ValueError, match=f"{name} ran twice in one call of the denoiser"):
        case.run(pipe)
    assert torch.equal(case.run(remove_tgate(pipe)), baseline)
