"""The tests' own pipelines: each is a copy of one that was built, and no two share anything."""

import pytest
import torch

from tests.zoo.case import thorough
from tests.zoo.catalogue import ALL, BY_NAME
from tgate_processors import apply_tgate, is_tgate_applied


def tensors(pipe):
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {(name, key): tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    "name", ["sd_controlnet", "pixart_sigma", "svd", "pag", *map(thorough, ("sdxl_inpaint", "lora", "animatediff"))]
)
def test_every_pipeline_is_as_it_is_built_and_on_its_own(name):
    case = BY_NAME[name]
    built, first, second = case.build.__wrapped__(), case.build(), case.build()
    expected = tensors(built)
    for pipe in (first, second):
        assert type(pipe) is type(built)
        assert dict(pipe.config) == dict(built.config)
        assert list(pipe.components) == list(built.components)
        assert tensors(pipe).keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors(pipe).items())
    places = [{tensor.data_ptr() for tensor in tensors(pipe).values()} for pipe in (built, first, second)]
    assert len(set.union(*places)) == 3 * len(expected)
    picture = case.run(second)
    apply_tgate(first, 2)
    case.run(first)
    with torch.no_grad():
        for tensor in tensors(first).values():
            tensor.zero_()
    assert not is_tgate_applied(second)
    for pipe in (second, case.build()):
        assert torch.equal(case.run(pipe), picture)


def test_no_two_pipelines_have_one_name():
    assert len(BY_NAME) == len(ALL)
