"""What is halved on the way into the denoiser, and doubled on the way out."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from tgate_processors._internal.denoiser.batch import (
    complete_batch,
    slice_arguments,
    slice_half,
    stack_samples,
    unstack_samples,
)
from tgate_processors._internal.denoiser.inputs import get_latents
from tgate_processors._internal.denoiser.spec import DENOISER_ARGUMENTS, Layout

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    sample: torch.Tensor
    note: str = "kept"


def rows(count, *shape):
    return torch.arange(count, dtype=torch.float32).reshape(-1, *[1] * len(shape)).expand(count, *shape)


@pytest.mark.parametrize(("kept", "first"), [("unconditional", 0), ("conditional", 2)])
def test_every_tensor_of_the_batch_is_halved_however_deep_it_lies(kept, first):
    images = [rows(4, 2), (rows(4, 2), None), Pair(rows(4, 2), "right")]
    conditions = OrderedDict(text_embeds=rows(4, 3), image_embeds=images)
    given = {
        "sample": rows(4, 2, 2),
        "timestep": rows(4),
        "encoder_hidden_states": rows(12, 3),
        "added_cond_kwargs": conditions,
    }
    halved = slice_arguments(given, DENOISER_ARGUMENTS, 4, kept)
    assert halved["sample"][:, 0, 0].tolist() == halved["timestep"].tolist() == [first, first + 1]
    # Three rows for each sample.
    assert halved["encoder_hidden_states"][:, 0].tolist() == list(range(first * 3, first * 3 + 6))
    added = halved["added_cond_kwargs"]
    assert type(added) is OrderedDict
    assert added["text_embeds"].shape == (2, 3)
    plain, (in_tuple, nothing), pair = added["image_embeds"]
    assert plain.shape == in_tuple.shape == pair.left.shape == (2, 2)
    assert nothing is None
    assert pair.right == "right"
    # The containers of the pipeline are used in the next step too.
    assert conditions["text_embeds"].shape == (4, 3)
    assert images[0].shape == (4, 2)


@pytest.mark.parametrize("table", [torch.tensor(7), torch.zeros(1), rows(1, 4), rows(3, 4), rows(6, 4), rows(2, 2)])
def test_what_is_no_batch_stays(table):
    container = [table]
    halved = slice_arguments({"timestep": table, "class_labels": container}, DENOISER_ARGUMENTS, 4, "conditional")
    assert halved["timestep"] is table
    assert halved["class_labels"] is container


def test_what_is_foreign_is_handed_on_as_the_object_that_it_is():
    region, bank = rows(64, 64), [rows(4, 2)]
    options = {"region": region, "bank": bank}
    given = {"cross_attention_kwargs": options, "table": region, "sample": rows(4, 2)}
    halved = slice_arguments(given, DENOISER_ARGUMENTS, 4, "unconditional")
    assert halved["cross_attention_kwargs"] is options
    assert halved["table"] is region
    # What is known inside is halved all the same, and what is not stays.
    options["gligen"] = {"boxes": rows(4, 30, 4)}
    inner = slice_arguments(given, DENOISER_ARGUMENTS, 4, "unconditional")["cross_attention_kwargs"]
    assert inner["gligen"]["boxes"].shape == (2, 30, 4)
    assert inner["region"] is region
    assert inner["bank"] is bank
    assert options["gligen"]["boxes"].shape == (4, 30, 4)


@pytest.mark.parametrize(
    "output",
    [
        rows(2, 3),
        (rows(2, 3), "other"),
        Pair(rows(2, 3), torch.zeros(5)),
        UNet2DConditionOutput(sample=rows(2, 3)),
        Output(rows(2, 3)),
    ],
    ids=lambda output: type(output).__name__,
)
def test_an_output_of_any_kind_is_given_back_as_both_halves(output):
    doubled = complete_batch(output, 2)
    assert type(doubled) is type(output)
    sample = doubled if isinstance(doubled, torch.Tensor) else getattr(doubled, "sample", None)
    sample = doubled[0] if sample is None else sample
    assert sample[:, 0].tolist() == [0, 1, 0, 1]
    if isinstance(output, Output):
        assert doubled.note == "kept"
    if isinstance(output, Pair):
        assert doubled.right is output.right


@pytest.mark.parametrize(("kept", "half"), [("unconditional", slice(2)), ("conditional", slice(2, None))])
def test_a_batch_that_is_a_list_is_halved_by_its_entries(kept, half):
    given = {
        # Channels, which are no samples, although there are as many.
        "x": [[rows(5, 1, 4, 4), rows(4, 1, 2, 2)] for _ in range(4)],
        "cap_feats": [rows(3 + place, 8) for place in range(4)],
        "siglip_feats": [None] * 4,
        "image_noise_mask": [[place] for place in range(4)],
        "control_context": rows(4, 5),
        "conditioning": [rows(4, 5)],
    }
    names = Layout(
        list_arguments=("x", "cap_feats", "siglip_feats", "image_noise_mask", "control_context")
    ).denoiser_arguments
    halved = slice_arguments(given, names, 4, kept)
    for name in ("x", "cap_feats", "siglip_feats", "image_noise_mask"):
        assert [*map(id, halved[name])] == [*map(id, given[name][half])]
    assert halved["control_context"][:, 0].tolist() == [0, 1, 2, 3][half]
    assert halved["conditioning"] is given["conditioning"]
    # Another number of entries is no batch.
    assert slice_arguments({"x": given["x"]}, names, 3, kept)["x"] is given["x"]
    assert get_latents(given) is given["x"][0][-1]


@pytest.mark.parametrize("output", [([rows(4, 3)] * 2, "other"), UNet2DConditionOutput(sample=[rows(4, 3)] * 2)])
def test_an_output_that_is_a_list_is_given_back_as_one_of_both_halves(output):
    difference = [torch.ones(2, 4, 3)]
    doubled = unstack_samples(complete_batch(stack_samples(output), 2, difference, "unconditional"))
    assert type(doubled) is type(output)
    assert type(doubled[0]) is list
    assert [entry[0, 0].item() for entry in doubled[0]] == [0, 0, 1, 1]
    assert len(output[0]) == 2


def test_halves_are_views():
    batch = torch.randn(4, 3)
    assert slice_half(batch, 4, "conditional").data_ptr() == batch[2:].data_ptr()
