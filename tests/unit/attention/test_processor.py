"""A processor in front is found as the one behind."""

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as ap

from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateAttnProcessor, TGateCallback, TGateSchedule, apply_tgate, remove_tgate
from tgate_processors._internal.measure.macs import RecordingCache
from tgate_processors._internal.plan.step_plan import Action


def gate(original):
    return TGateAttnProcessor(original, TGateCallback(TGateSchedule()).state)


ORIGINALS = [
    ap.AttnProcessor,
    ap.AttnProcessor2_0,
    lambda: ap.SlicedAttnProcessor(2),
    ap.XFormersAttnProcessor,
    ap.HunyuanAttnProcessor2_0,
    lambda: ap.IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=4, num_tokens=(4,), scale=0.5),
]


@pytest.mark.parametrize("build", ORIGINALS)
def test_it_is_what_it_replaces(build):
    original = build()
    processor = gate(original)
    assert isinstance(processor, type(original))
    assert isinstance(processor, TGateAttnProcessor)
    assert type(original).__name__ in str(type(processor))
    assert inspect.signature(processor.__call__) == inspect.signature(original.__call__)
    assert processor.original is original
    if isinstance(original, torch.nn.Module):
        assert processor.state_dict().keys() == original.state_dict().keys()
        assert [*processor.parameters()] == [*original.parameters()]
        processor.scale = [0.25]
        assert original.scale == [0.25]
    processor._attention_backend = "native"
    assert original._attention_backend == "native"


def test_made_anew_without_arguments_it_is_the_type_behind():
    # As `load_ip_adapter` and `unload_ip_adapter` do.
    processor = type(gate(ap.AttnProcessor2_0()))()
    assert type(processor) is ap.AttnProcessor2_0


def test_one_in_front_of_another():
    inner = gate(ap.AttnProcessor2_0())
    outer = gate(inner)
    assert type(outer) is type(inner)
    assert outer.original is inner


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_a_copy_has_an_original_of_its_own(clone):
    processor = gate(ap.IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=4, num_tokens=(4,), scale=0.5))
    copied = clone(processor)
    assert type(copied) is type(processor)
    assert copied.original is not processor.original
    assert copied.state is not processor.state
    copied.scale = [0.1]
    assert copied.original.scale == [0.1]
    assert processor.scale == [0.5]


def test_processors_that_were_replaced_after_apply_are_found_at_the_next_call():
    case = BY_NAME["sd"]
    pipe = case.build()
    expected = case.gated(3)
    apply_tgate(pipe, 3)
    # In all layers, and in a single one.
    for replace in (
        lambda: pipe.unet.set_attn_processor(ap.AttnProcessor()),
        lambda: pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(ap.AttnProcessor()),
        lambda: pipe.enable_attention_slicing(1),
    ):
        replace()
        torch.testing.assert_close(case.run(pipe), expected, rtol=1e-4, atol=1e-4)
        assert all(isinstance(p, TGateAttnProcessor) for p in pipe.unet.attn_processors.values())
    remove_tgate(pipe)
    assert all(type(p) is ap.SlicedAttnProcessor for p in pipe.unet.attn_processors.values())


def test_a_processor_installed_after_apply_stays_after_removal():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 3)
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    mine = ap.AttnProcessor()
    attn.set_processor(mine)
    remove_tgate(pipe)
    assert attn.processor is mine


def test_an_exchanged_denoiser_is_followed():
    case = BY_NAME["sd"]
    pipe, other = case.build(), case.build()
    torch.nn.init.normal_(other.unet.conv_out.weight)
    baseline = case.run(other)
    expected = case.run(apply_tgate(other, 3))
    remove_tgate(other)
    apply_tgate(pipe, 3)
    case.run(pipe)
    first = pipe.unet
    pipe.unet = other.unet
    assert torch.equal(case.run(pipe), expected)
    assert not first._forward_pre_hooks
    assert not any(isinstance(p, TGateAttnProcessor) for p in first.attn_processors.values())
    remove_tgate(pipe)
    assert torch.equal(case.run(pipe), baseline)


def test_a_layer_with_its_residual_inside_is_always_computed():
    case = BY_NAME["sd"]
    pipe = case.build()
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(
        pipe.unet.config,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    residual = [m for m in pipe.unet.modules() if getattr(m, "residual_connection", False)]
    plain = [m for name, m in pipe.unet.named_modules() if name.endswith("attn1")]
    assert residual
    runs = {module: [] for module in (*residual, *plain)}
    for module in runs:
        module.to_k.register_forward_hook(lambda layer, args, output, module=module: runs[module].append(1))
    case.run(apply_tgate(pipe, TGateSchedule(3, sp_interval=2, fi_interval=2)))
    assert {len(runs[module]) for module in residual} == {6}
    assert {len(runs[module]) for module in plain} == {3}


def test_a_class_on_top_of_the_gated_one_stays():
    case = BY_NAME["sd"]
    pipe = case.build()
    baseline = case.run(pipe)
    apply_tgate(pipe, 3)
    top = type("Top", (type(pipe),), {})
    pipe.__class__ = top
    assert not torch.equal(case.run(pipe), baseline)
    remove_tgate(pipe)
    assert type(pipe) is top
    assert torch.equal(case.run(pipe), baseline)


def test_attending_to_itself_is_self_attention_whatever_the_argument_is_called():
    state, run = TGateCallback(TGateSchedule(2)).state, RecordingCache()
    attn = ap.Attention(query_dim=8, heads=2, dim_head=4)
    attn.set_processor(TGateAttnProcessor(attn.processor, state))
    runs = []
    attn.to_k.register_forward_hook(lambda module, args, output: runs.append(1))
    hidden_states = torch.randn(1, 3, 8)
    with state.entered(run):
        for action in (Action.STORE, Action.REUSE, Action.REUSE):
            run.actions.set(action, Action.COMPUTE)
            attn(hidden_states, encoder_hidden_states=hidden_states)
    assert len(runs) == 3
