"""T-GATE together with DeepCache's own helper."""

import math

import pytest
import torch
from DeepCache import DeepCacheSDHelper

from tests.support.comparing import distance
from tests.support.settings import apply_settings
from tests.support.states import assert_same, snapshot
from tests.zoo.case import slow
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, get_tgate_report, remove_tgate

NAMES = ["sd", "sdxl", slow("sd_img2img"), "lcm_sdxl"]


def helper_of(pipe, interval=3, branch=0):
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    return helper


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("enabled", [False, True])
def test_enabled_or_not_the_picture_is_the_same_and_the_helper_is_given_back(name, enabled):
    case = BY_NAME[name]
    pipe = case.build()
    baseline, alone = case.run(pipe), case.gated(4)
    other = case.build()
    expected = case.run(apply_tgate(other, 4, deepcache=helper_of(other)))
    assert not torch.equal(expected, alone)
    helper = helper_of(pipe)
    if enabled:
        helper.enable()
    before, given = snapshot(pipe, case), dict(vars(helper))
    apply_tgate(pipe, 4, deepcache=helper)
    assert torch.equal(case.run(pipe), expected)
    assert torch.equal(case.run(pipe), expected)
    assert not getattr(helper, "cached_output", {})
    remove_tgate(pipe)
    assert_same(before, snapshot(pipe, case))
    assert vars(helper).keys() == given.keys()
    assert helper.params == given["params"]
    if enabled:
        assert helper.function_dict is given["function_dict"]
        helper.disable()
    assert torch.equal(case.run(pipe), baseline)


@pytest.mark.parametrize("name", NAMES)
def test_with_the_gate_beyond_the_last_step_it_is_deepcache_alone(name):
    case = BY_NAME[name]
    pipe = case.build()
    helper = helper_of(pipe)
    helper.enable()
    alone = case.run(pipe)
    helper.disable()
    assert torch.equal(case.run(apply_tgate(pipe, 99, deepcache=helper)), alone)


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_step_is_full_and_caching_starts_afresh_where_the_batch_changes(name):
    case = BY_NAME[name]
    pipe = case.build()
    apply_tgate(pipe, 3, deepcache=helper_of(pipe, interval=4))
    full = []
    pipe.unet.register_forward_pre_hook(lambda module, args: full.append(False))
    pipe.unet.mid_block.resnets[0].register_forward_hook(lambda module, args, output: full.__setitem__(-1, True))
    case.run(pipe, num_inference_steps=10)
    guided = get_tgate_report(pipe).half_batch_forwards > 0
    # Without guidance the batch stays, so what the gate step has cached goes on.
    starts = [0, 2, 3, 7] if guided else [0, 2, 6]
    assert full == [step in starts for step in range(len(full))]


PREDICTED = {
    "fixed": {"gate_step": 3, "guidance": "predict", "cfg_interval": 4},
    "auto": {"gate_step": "auto", "tolerance": math.inf},
}


@pytest.mark.parametrize("name", ["sd", slow("sdxl")])
@pytest.mark.parametrize("way", PREDICTED)
def test_where_guidance_is_predicted_what_is_cached_goes_on_at_half(name, way):
    case = BY_NAME[name]
    pipe = case.build()
    apply_settings(pipe, **PREDICTED[way], deepcache=helper_of(pipe, interval=4))
    computed = []
    pipe.unet.register_forward_pre_hook(lambda module, args: computed.append(0))
    pipe.unet.mid_block.resnets[0].register_forward_hook(
        lambda module, args, output: computed.__setitem__(-1, len(output))
    )
    pictures = case.run(pipe, num_inference_steps=12)
    # At the gate DeepCache goes on; a full step after half steps starts it afresh.
    expected = [2, 0, 0, 0, 1, 0, 2, 0, 0, 0, 2, 0] if way == "fixed" else [2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]
    assert computed == expected
    assert torch.equal(case.run(pipe, num_inference_steps=12), pictures)
    singles = torch.cat([case.run(pipe, [0], num_inference_steps=12), case.run(pipe, [1], num_inference_steps=12)])
    assert distance(case.run(pipe, [0, 1], num_inference_steps=12), singles) < 1e-5


def test_a_run_that_decides_is_full_only_where_deepcache_computes():
    case = BY_NAME["sd"]
    pipe = case.build()
    apply_settings(pipe, **PREDICTED["auto"], deepcache=helper_of(pipe, interval=2))
    computed = []
    pipe.unet.register_forward_pre_hook(lambda module, args: computed.append(0))
    pipe.unet.mid_block.resnets[0].register_forward_hook(
        lambda module, args, output: computed.__setitem__(-1, len(output))
    )
    case.run(pipe, num_inference_steps=16)
    assert {1, 2} <= set(computed)
    assert [step for step, rows in enumerate(computed) if rows] == list(range(0, 16, 2))
    assert all(computed[step] == 2 for step, _ in get_tgate_report(pipe).prediction_errors)


def test_two_prompts_equal_two_singles():
    case = BY_NAME["sdxl"]
    pipe = case.build()
    apply_tgate(pipe, TGateSchedule(3, sp_interval=2, warm_up=1), deepcache=helper_of(pipe))
    assert distance(case.run(pipe, [0, 1]), torch.cat([case.run(pipe, [0]), case.run(pipe, [1])])) < 1e-5


@pytest.mark.parametrize("enabled", [False, True])
def test_a_run_that_breaks_leaves_nothing(enabled):
    case = BY_NAME["sd"]
    pipe = case.build()
    baseline = case.plain()
    helper = helper_of(pipe)
    if enabled:
        helper.enable()
    expected = case.run(apply_tgate(pipe, 3, deepcache=helper))

    def stop(pipe, step_index, timestep, callback_kwargs):
        if step_index == 4:
            raise KeyboardInterrupt
        return callback_kwargs

    with pytest.raises(KeyboardInterrupt):
        case.run(pipe, callback_on_step_end=stop)
    assert not getattr(helper, "cached_output", {})
    assert torch.equal(case.run(pipe), expected)
    remove_tgate(pipe)
    if enabled:
        helper.disable()
    assert torch.equal(case.run(pipe), baseline)


def test_a_helper_that_does_not_fit_is_refused():
    pipe, other = BY_NAME["sd"].build(), BY_NAME["sd"].build()
    with pytest.raises(ValueError, match=r"helper of another pipeline: pass a DeepCacheSDHelper made with"):
        apply_tgate(pipe, deepcache=helper_of(other))
    with pytest.raises(ValueError, match=r"has no parameters: call its set_params"):
        apply_tgate(pipe, deepcache=DeepCacheSDHelper(pipe))
    with pytest.raises(TypeError, match=r"must be a DeepCacheSDHelper\(pipe\) .* of type type"):
        apply_tgate(pipe, deepcache=DeepCacheSDHelper)
    transformer = BY_NAME["pixart_alpha"].build()
    with pytest.raises(ValueError, match="PixArtAlphaPipeline has no UNet"):
        apply_tgate(transformer, deepcache=helper_of(transformer))
