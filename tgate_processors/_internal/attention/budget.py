"""Which layers keep their cross-attention within so many bytes: those that save most for each byte."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Collection, Hashable, Sequence
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar

from ..plan.validation import as_int, shown

Key = TypeVar("Key", bound=Hashable)
# What works on the tokens of the picture; all other projections work on those of the text.
_OF_PICTURE = ("to_q", "to_out", "out_layer")


def validate_max_memory(value: Any, cross_attention: bool | None) -> int | None:
    """Validate `max_memory`: bytes as an int, or a string with a unit."""
    if value is None:
        return None
    # Nobody else should wait for the import.
    from accelerate.utils import convert_file_size_to_int  # type: ignore[import-untyped]

    hint = 'give bytes as an int of at least 0, or a string with a unit such as "2GB" or "500MiB"'
    size = value if isinstance(value, str) else as_int(value)
    if size is None:
        raise TypeError(f"max_memory={shown(value)} is of type {type(value).__name__}: {hint}.")
    try:
        max_bytes: int = 0 if isinstance(size, str) and size.strip() == "0" else convert_file_size_to_int(size)
    except (ValueError, OverflowError):
        max_bytes = -1
    if not 0 <= max_bytes <= sys.maxsize:
        raise ValueError(f"max_memory={shown(value)} is not a size: {hint}.")
    if cross_attention is False:
        raise ValueError(
            f"max_memory={shown(value)} is for kept cross-attention, and cross_attention=False keeps none: leave one "
            "of them out."
        )
    return max_bytes


def gates_cross_attention(cross_attention: bool | None, max_bytes: int | None) -> bool | None:
    """Whether cross-attention is gated where so many bytes are given for it."""
    return cross_attention if max_bytes is None else max_bytes > 0


class LayerSizes(NamedTuple):
    """Shapes of what a layer was given, the text included, and of what it gave out; bytes of each number of that."""

    given: Sequence[int]
    text: Sequence[int]
    output: Sequence[int]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of what it gave out."""
        return math.prod(self.output) * self.itemsize


def sizes_of(hidden_states: Any, context: Any, output: Any) -> LayerSizes:
    """The sizes of one call of a layer with cross-attention."""
    # An IP-Adapter brings its pictures beside the text.
    text = context[0] if isinstance(context, (tuple, list)) else context
    return LayerSizes(hidden_states.shape, text.shape, output.shape, output.element_size())


def saved_macs(attn: Any, sizes: LayerSizes) -> int:
    """Multiply-accumulates of a call of a layer with cross-attention, by its projections and attention's products."""
    tokens, of_text = math.prod(sizes.given[:-1]), math.prod(sizes.text[:-1])
    taken = 0
    for name, part in attn.named_modules():
        # Quantised layers and those with LoRA have these two as well.
        if not hasattr(part, "in_features") or "lora" in name or name.endswith("base_layer"):
            continue
        of_picture = name.startswith(_OF_PICTURE)
        taken += (tokens if of_picture else of_text) * part.in_features * part.out_features
        if of_picture and not name.startswith(_OF_PICTURE[1:]):
            taken += 2 * tokens * sizes.text[-2] * part.out_features
    return taken


class MemoryBudget(Generic[Key]):
    """
    Who keeps an output within so many bytes: the best in the order of what is saved for each byte, until one of them
    does not fit. So whoever is out stays out when more is known of others, and the choice does not depend on the order
    in which they are met.

    Args:
        max_bytes (`int`): So many bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._most = max_bytes
        self._offers: dict[Key, tuple[tuple[Fraction, int], int]] = {}
        self._chosen: frozenset[Key] = frozenset()

    def __contains__(self, key: Key) -> bool:
        return key in self._chosen

    def forget(self) -> None:
        """Know of no layer."""
        self._offers.clear()
        self._chosen = frozenset()

    @property
    def known(self) -> Collection[Key]:
        """The layers that were met."""
        return self._offers.keys()

    @property
    def least(self) -> int:
        """The bytes of the best."""
        return min(self._offers.values())[1]

    def meet(self, key: Key, saved: int, nbytes: int, place: int) -> bool:
        """
        A layer is met.

        Args:
            key: It.
            saved (`int`): What it saves in a step.
            nbytes (`int`): Bytes of what it keeps.
            place (`int`): Its place among all, for those that save as much.

        Returns:
            `bool`: Whether it keeps its output, as far as is known by now.
        """
        offer = ((-Fraction(saved, max(nbytes, 1)), place), nbytes)
        if self._offers.get(key) != offer:
            if key in self._offers:
                # Other latents: what is known of the others holds no more.
                self.forget()
            self._offers[key] = offer
            self._chosen = self._choose()
        return key in self._chosen

    def _choose(self) -> frozenset[Key]:
        """The best that fit together."""
        chosen, held = set(), 0
        for key, (_, nbytes) in sorted(self._offers.items(), key=operator.itemgetter(1)):
            held += nbytes
            if held > self._most:
                break
            chosen.add(key)
        return frozenset(chosen)
