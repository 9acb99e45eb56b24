"""The clock behind the user's own callback, which sees and can do the same as without T-GATE."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any

from ..attention.state import TGateState
from ..denoiser.inputs import differs, write_counts
from .callback import TGateCallback

# What the clock compares the batch with, and what tells the halves of guidance apart in a custom loop.
_WANTED = ("latents",)
_WANTED_OF_OTHERS = ("latents", "negative_prompt_embeds")


def chain(pipe: Any, state: TGateState, bound: inspect.BoundArguments, *, is_diffusers_loop: bool) -> None:
    """
    Put the clock behind the callback of a call.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that is called.
        state (`TGateState`): The state whose run is told of the end of a step.
        bound (`inspect.BoundArguments`): The arguments of the call, which are changed.
        is_diffusers_loop (`bool`): Whether the loop is diffusers' own.

    Raises:
        ValueError: If there is a clock already.
    """
    # Not at the top: it would make the import of this package load what `import diffusers` leaves for later.
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    users = bound.arguments.get("callback_on_step_end")
    if any(isinstance(part, TGateCallback) for part in getattr(users, "callbacks", [users])):
        raise ValueError(
            "T-GATE: callback_on_step_end has a TGateCallback, but T-GATE is applied to the pipeline already: leave "
            "the callback out, or call remove_tgate(pipe) first."
        )
    possible = getattr(pipe, "_callback_tensor_inputs", None) or []
    wanted = [name for name in (_WANTED if is_diffusers_loop else _WANTED_OF_OTHERS) if name in possible]
    if isinstance(users, (PipelineCallback, MultiPipelineCallbacks)):
        bound.arguments["callback_on_step_end"] = _official_chain()(state, users, wanted)
        return
    inputs = bound.signature.parameters.get("callback_on_step_end_tensor_inputs")
    given = None if inputs is None else bound.arguments.get(inputs.name, inputs.default)
    asked = list(given) if isinstance(given, (list, tuple)) else []
    added = [name for name in wanted if name not in asked]
    unasked: dict[str, Any] = {}

    def on_step_end(pipeline: Any, step_index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any] | None:
        return _step_end(state, users, added, unasked, pipeline, step_index, timestep, tensors)

    bound.arguments["callback_on_step_end"] = on_step_end
    if inputs is not None:
        bound.arguments[inputs.name] = [*asked, *added]


def suspend_legacy(state: TGateState, bound: inspect.BoundArguments) -> None:
    """Step aside for the legacy callback of a call, which may write to latents and call other pipelines."""
    parameters = bound.signature.parameters.items()
    swallowing = (name for name, parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD)
    for arguments in (bound.arguments, *(bound.arguments.get(name, {}) for name in swallowing)):
        if callable(arguments.get("callback")):
            arguments["callback"] = _suspending(state, arguments["callback"])


def _suspending(state: TGateState, function: Any) -> Any:
    """A legacy callback: it gives nothing back, and comes after the clock."""

    @functools.wraps(function, updated=())
    def suspended(*args: Any, **kwargs: Any) -> Any:
        writes = write_counts(args)
        with state.suspended():
            result = function(*args, **kwargs)
        run = state.current()
        if run is not None and write_counts(args) != writes:
            run.invalidate(("latents",))
        return result

    return suspended


def _step_end(
    state: TGateState,
    users: Any,
    added: list[str],
    unasked: dict[str, Any],
    pipeline: Any,
    step_index: int,
    timestep: Any,
    tensors: Any,
) -> dict[str, Any] | None:
    """The user's callback, then the clock. What it gives without having asked for it is in `unasked`."""
    told = dict(tensors)
    outputs = {name: value for name, value in tensors.items() if name not in added}
    if users is None:
        _tick(state, step_index, told)
        return outputs
    before = {**unasked, **told}
    writes = {name: write_counts(value) for name, value in before.items()}
    with state.suspended():
        answer: dict[str, Any] | None = users(pipeline, step_index, timestep, outputs)
    # One pipeline takes nothing for an answer.
    given = {} if answer is None else answer
    exchanged = [
        name
        for name, value in {**before, **given}.items()
        if write_counts(before.get(name)) != writes.get(name, ()) or differs(before.get(name), value)
    ]
    unasked.update((name, value) for name, value in given.items() if name not in told)
    _tick(state, step_index, told, given.get("latents"), exchanged)
    return answer


def _tick(
    state: TGateState, step_index: int, tensors: dict[str, Any], latents: Any = None, exchanged: Collection[str] = ()
) -> None:
    """Tell the run of this thread that a pass has ended. Without a run there is nobody to tell."""
    run = state.current()
    if run is not None:
        run.on_step_end(step_index, latents, tensors, exchanged)


@functools.cache
def _official_chain() -> type:
    """The class of a chain that pipelines take for one of diffusers' own callbacks, which says what it wants."""
    from diffusers.callbacks import MultiPipelineCallbacks

    class Chain(MultiPipelineCallbacks):  # type: ignore[misc]
        def __init__(self, state: TGateState, users: Any, wanted: list[str]) -> None:
            super().__init__([users])
            self._state = state
            self._users = users
            self._added = [name for name in wanted if name not in users.tensor_inputs]
            self._unasked: dict[str, Any] = {}

        @property
        def tensor_inputs(self) -> list[str]:
            return [*self._users.tensor_inputs, *self._added]

        def __call__(self, pipeline: Any, step_index: int, timestep: Any, tensors: Any) -> dict[str, Any] | None:
            # The latent consistency pipelines do not ask what is wanted.
            added = self._added if set(tensors) == set(self.tensor_inputs) else []
            return _step_end(self._state, self._users, added, self._unasked, pipeline, step_index, timestep, tensors)

    return Chain
