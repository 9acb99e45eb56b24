"""Which layers cache their cross-attention within so many bytes: those that save most for each byte."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Hashable, Sequence
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar

from ..plan.validation import as_int, shown, unlike

Key = TypeVar("Key", bound=Hashable)
# The projections of the image's tokens; all others work on those of the text.
_IMAGE_PROJECTIONS = ("to_q", "to_out", "out_layer")


def validate_max_memory(value: Any, cross_attention: bool | None) -> int | None:
    """Validate `max_memory`: bytes as an int, or a string with a unit."""
    if value is None:
        return None
    # Here, so that others do not wait for the import.
    from accelerate.utils import convert_file_size_to_int  # type: ignore[import-untyped]

    wanted = 'bytes as an int of at least 0 or a size with a unit such as "2GB" or "500MiB"'
    size = value if isinstance(value, str) else as_int(value)
    if size is None:
        raise TypeError(unlike("max_memory", wanted, value, of_type=True))
    try:
        max_bytes: int = 0 if isinstance(size, str) and size.strip() == "0" else convert_file_size_to_int(size)
    except (ValueError, OverflowError):
        max_bytes = -1
    if not 0 <= max_bytes <= sys.maxsize:
        raise ValueError(unlike("max_memory", wanted, value))
    if cross_attention is False:
        raise ValueError(
            f"max_memory={shown(value)} is for kept cross-attention, and cross_attention=False keeps none: leave one "
            "of them out."
        )
    return max_bytes


def gates_cross_attention(cross_attention: bool | None, max_bytes: int | None) -> bool | None:
    """Whether cross-attention is gated, where `max_memory` may say so."""
    return cross_attention if max_bytes is None else max_bytes > 0


class LayerSizes(NamedTuple):
    """The shapes of a layer's input, text and output, and the bytes of each number of the output."""

    input_shape: Sequence[int]
    text_shape: Sequence[int]
    output_shape: Sequence[int]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return math.prod(self.output_shape) * self.itemsize


def measure_layer(hidden_states: Any, context: Any, output: Any) -> LayerSizes:
    """The sizes of one call of a layer with cross-attention."""
    # With an IP-Adapter, the images come together with the text.
    text = context[0] if isinstance(context, (tuple, list)) else context
    return LayerSizes(hidden_states.shape, text.shape, output.shape, output.element_size())


def saved_macs(attn: Any, sizes: LayerSizes) -> int:
    """Multiply-accumulates of a call of a layer with cross-attention, by its projections and attention's products."""
    tokens, text_tokens = math.prod(sizes.input_shape[:-1]), math.prod(sizes.text_shape[:-1])
    taken = 0
    for name, part in attn.named_modules():
        # Quantised layers and those with LoRA have these two as well.
        if not hasattr(part, "in_features") or "lora" in name or name.endswith("base_layer"):
            continue
        is_image = name.startswith(_IMAGE_PROJECTIONS)
        taken += (tokens if is_image else text_tokens) * part.in_features * part.out_features
        if is_image and not name.startswith(_IMAGE_PROJECTIONS[1:]):
            taken += 2 * tokens * sizes.text_shape[-2] * part.out_features
    return taken


class Offer(NamedTuple):
    """What a layer saves in a step, the bytes of its output, and its number among all layers."""

    saved: int
    nbytes: int
    number: int

    def place(self) -> tuple[Fraction, int]:
        """What offers are sorted by, the best first."""
        return -Fraction(self.saved, max(self.nbytes, 1)), self.number


class MemoryBudget(Generic[Key]):
    """
    Selects the layers whose outputs fit into so many bytes: the best by what is saved for each byte, until one of them
    does not fit. So a layer that is out stays out when others are offered, and the order of offers does not matter.

    Args:
        max_bytes (`int`): Most bytes of all outputs together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._candidates: dict[Key, Offer] = {}
        # What the selection was made by: the candidates, or what several processes know of them.
        self._offers: dict[Key, Offer] = {}
        self._selected: frozenset[Key] = frozenset()

    def __contains__(self, key: Key) -> bool:
        return key in self._selected

    def reset(self) -> None:
        """Remove all candidates."""
        self._candidates.clear()
        self._select({})

    @property
    def candidates(self) -> Collection[Key]:
        """The layers that were offered."""
        return self._candidates.keys()

    @property
    def min_bytes(self) -> int:
        """The bytes of the best layer."""
        return min(self._offers.values(), key=Offer.place).nbytes

    def offer(self, key: Key, saved: int, nbytes: int, index: int) -> bool:
        """
        Offer a layer.

        Args:
            key: The layer.
            saved (`int`): Multiply-accumulates that it saves in a step.
            nbytes (`int`): Bytes of its output.
            index (`int`): Its place among all layers, which decides between two that save as much.

        Returns:
            `bool`: Whether it is selected for now.
        """
        offer = Offer(saved, nbytes, index)
        if self._candidates.get(key) != offer:
            if key in self._candidates:
                # The size of the latents has changed: the other candidates are out of date.
                self.reset()
            self._candidates[key] = offer
            self._select(self._candidates)
        return key in self._selected

    def offered(self, key: Key) -> tuple[int, int]:
        """What a layer saves and the bytes of its output, as it was offered; zeros if it was not."""
        return self._candidates.get(key, Offer(0, 0, 0))[:2]

    def select_by(self, offers: Sequence[tuple[Key, int, int]]) -> None:
        """
        Select by what several processes know of the layers, in place of their offers.

        Args:
            offers (`Sequence` of `tuple`): In the order of the layers, each with what it saves and its bytes.
        """
        self._select({key: Offer(saved, nbytes, index) for index, (key, saved, nbytes) in enumerate(offers) if nbytes})

    def _select(self, offers: dict[Key, Offer]) -> None:
        """Select the best that fit together."""
        selected, held = set(), 0
        for key, offer in sorted(offers.items(), key=lambda item: item[1].place()):
            held += offer.nbytes
            if held > self._max_bytes:
                break
            selected.add(key)
        self._offers, self._selected = dict(offers), frozenset(selected)
