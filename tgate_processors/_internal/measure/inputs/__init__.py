"""What denoisers take, for `estimate_cost`: a row for each class, in files like those of `families`."""

from .cross_attention import CROSS_ATTENTION
from .joint import JOINT
from .shapes import InputShapes, InputSize, materialize
from .unets import UNETS

INPUTS: dict[str, InputShapes] = {**UNETS, **CROSS_ATTENTION, **JOINT}

__all__ = ["INPUTS", "InputShapes", "InputSize", "materialize"]
