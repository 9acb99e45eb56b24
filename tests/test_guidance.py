"""What is halved on the way into the denoiser, and doubled on the way out."""

from dataclasses import dataclass

import pytest
import torch

from tgate_processors import TGateSchedule
from tgate_processors.guidance import DenoiserHooks
from tgate_processors.state import TGateState


@dataclass
class Output:
    sample: torch.Tensor
    note: str = "kept"


class Echo(torch.nn.Module):
    """Gives back what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, sample, timestep, **kwargs):
        self.seen = (sample, timestep, kwargs)
        return Output(sample)


@pytest.fixture
def echo():
    module = Echo()
    module.state = TGateState(TGateSchedule(gate_step=1))
    module.hooks = DenoiserHooks(module.state)
    module.hooks.install(module, "unconditional", "conditional")
    # Beyond the gate.
    module.state.begin(iterations=9, order=1, repeats=0)
    module.state.enter(guided=True)
    module.state.advance()
    module.state.enter(guided=True)
    return module


def rows(count, *shape):
    return torch.arange(count, dtype=torch.float32).reshape(-1, *[1] * len(shape)).expand(count, *shape)


@pytest.mark.parametrize(("kept", "first"), [("unconditional", 0), ("conditional", 2)])
def test_every_tensor_of_the_batch_is_halved_however_deep_it_lies(echo, kept, first):
    echo.hooks.kept = kept
    nested = {"text": rows(4, 3), "frames": rows(12, 3), "images": [rows(4, 2), (rows(4, 2), None)], "scale": 0.5}
    output = echo(rows(4, 2, 2), rows(4), added=nested)
    sample, timestep, kwargs = echo.seen
    assert sample[:, 0, 0].tolist() == timestep.tolist() == [first, first + 1]
    assert kwargs["added"]["text"].shape == (2, 3)
    assert kwargs["added"]["frames"][:, 0].tolist() == list(range(first * 3, first * 3 + 6))
    assert kwargs["added"]["images"][0].shape == kwargs["added"]["images"][1][0].shape == (2, 2)
    assert kwargs["added"]["images"][1][1] is None
    assert kwargs["added"]["scale"] == 0.5
    # The containers of the pipeline are used in the next step too.
    assert nested["text"].shape == (4, 3)
    assert nested["images"][0].shape == (4, 2)
    assert output.sample[:, 0, 0].tolist() == [first, first + 1] * 2
    assert output.note == "kept"


@pytest.mark.parametrize("table", [torch.tensor(7), torch.zeros(1), rows(1, 4), rows(3, 4), rows(6, 4), rows(2, 2)])
def test_what_is_no_batch_stays(echo, table):
    echo(rows(4, 2), table, table=table, nested=[table])
    _, timestep, kwargs = echo.seen
    assert timestep is table
    assert kwargs["table"] is table
    assert kwargs["nested"][0] is table


def test_off_nothing_happens(echo):
    echo.state.reset()
    sample = rows(4, 2)
    assert echo(sample, torch.tensor(1)).sample is sample


def test_removed_nothing_happens(echo):
    echo.hooks.remove()
    sample = rows(4, 2)
    assert echo(sample, torch.tensor(1)).sample is sample
