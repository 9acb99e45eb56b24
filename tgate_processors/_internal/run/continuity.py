"""What stays the same from one call of a module to the next, and a ControlNet whose call is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..denoiser.batch import map_tensors
from ..denoiser.inputs import differs

# These change in every step.
_OF_THE_STEP = ("timestep", "timesteps", "timestep_r", "r_timestep", "t", "sigma", "audio_sigma")


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are no tensors, and which of the others are there at all."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _OF_THE_STEP:
            continue
        if isinstance(value, Mapping):
            found.update({f"{name}.{key}": each for key, each in settings_of(value).items()})
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(each, (bool, int, float)) for each in value):
            found[name] = tuple(value)
        else:
            found[name] = type(value)
    return found


class SkippableControlNet:
    """The calls of a ControlNet in a step: what they were given and gave, so that all of them can be left out."""

    def __init__(self) -> None:
        # Of each call of a computed step: its settings, its text, and the form of its output.
        self._seen: list[tuple[dict[str, Any], Any, Any]] = []
        self._calls = 0
        # What was done in the step that runs.
        self.was_computed = self.was_skipped = False

    def end_step(self) -> None:
        """A pass of the loop has ended."""
        self._calls, self.was_computed, self.was_skipped = 0, False, False

    def reset(self) -> None:
        """A loop has ended."""
        self.__init__()  # type: ignore[misc]

    def record(self, arguments: Mapping[str, Any], output: Any) -> None:
        """A call has given this output, of which nothing but the form is kept."""
        form = map_tensors(output, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))
        self._seen[self._calls :] = [(settings_of(arguments), arguments.get("encoder_hidden_states"), form)]
        self._calls += 1
        self.was_computed = True

    def skip(self, arguments: Mapping[str, Any]) -> Any:
        """What stands for the output of a call that is left out; `None` if it is not the call of the step before."""
        if self._calls >= len(self._seen):
            return None
        settings, text, form = self._seen[self._calls]
        if settings != settings_of(arguments) or differs(text, arguments.get("encoder_hidden_states")):
            return None
        self._calls += 1
        self.was_skipped = True
        return form
