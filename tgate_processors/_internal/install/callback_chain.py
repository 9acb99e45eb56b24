"""T-GATE's step callback, chained to the user's own, which sees and can do the same as without T-GATE."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any

from ..attention.state import TGateState
from ..denoiser.inputs import differs, write_counts
from .callback import TGateCallback

# The batch is compared with the latents; in a custom loop the embeddings tell the halves of guidance apart.
_TENSOR_INPUTS = ("latents",)
_TENSOR_INPUTS_OF_CUSTOM_LOOPS = ("latents", "negative_prompt_embeds")


def chain_callback(pipe: Any, state: TGateState, bound: inspect.BoundArguments, *, is_diffusers_loop: bool) -> None:
    """
    Chain T-GATE to the step callback of a call.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that is called.
        state (`TGateState`): The state whose run is notified of the end of a step.
        bound (`inspect.BoundArguments`): The arguments of the call, which are changed.
        is_diffusers_loop (`bool`): Whether the loop is diffusers' own.

    Raises:
        ValueError: If the callback of the call is a `TGateCallback`.
    """
    # Not at the top: it would make the import of this package load what `import diffusers` leaves for later.
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    user_callback = bound.arguments.get("callback_on_step_end")
    if any(isinstance(part, TGateCallback) for part in getattr(user_callback, "callbacks", [user_callback])):
        raise ValueError(
            "T-GATE: callback_on_step_end has a TGateCallback, but T-GATE is applied to the pipeline already: leave "
            "the callback out, or call remove_tgate(pipe) first."
        )
    possible = getattr(pipe, "_callback_tensor_inputs", None) or []
    tensor_inputs = [
        name for name in (_TENSOR_INPUTS if is_diffusers_loop else _TENSOR_INPUTS_OF_CUSTOM_LOOPS) if name in possible
    ]
    if isinstance(user_callback, (PipelineCallback, MultiPipelineCallbacks)):
        bound.arguments["callback_on_step_end"] = _chained_callback_class()(state, user_callback, tensor_inputs)
        return
    inputs = bound.signature.parameters.get("callback_on_step_end_tensor_inputs")
    given = None if inputs is None else bound.arguments.get(inputs.name, inputs.default)
    asked = list(given) if isinstance(given, (list, tuple)) else []
    extra_inputs = [name for name in tensor_inputs if name not in asked]
    unasked: dict[str, Any] = {}

    def on_step_end(pipeline: Any, step_index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any] | None:
        return _on_step_end(state, user_callback, extra_inputs, unasked, pipeline, step_index, timestep, tensors)

    bound.arguments["callback_on_step_end"] = on_step_end
    if inputs is not None:
        bound.arguments[inputs.name] = [*asked, *extra_inputs]


def suspend_in_legacy_callback(state: TGateState, bound: inspect.BoundArguments) -> None:
    """Suspend the run in the legacy callback of a call, which may write to latents and call other pipelines."""
    parameters = bound.signature.parameters.items()
    swallowing = (name for name, parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD)
    for arguments in (bound.arguments, *(bound.arguments.get(name, {}) for name in swallowing)):
        if callable(arguments.get("callback")):
            arguments["callback"] = _outside_run(state, arguments["callback"])


def _outside_run(state: TGateState, function: Any) -> Any:
    """Wrap a legacy callback, which returns nothing and comes after T-GATE's."""

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


def _on_step_end(
    state: TGateState,
    user_callback: Any,
    extra_inputs: list[str],
    unasked: dict[str, Any],
    pipeline: Any,
    step_index: int,
    timestep: Any,
    tensors: Any,
) -> dict[str, Any] | None:
    """Call the user's callback, then end the pass. What it returns without having asked for it is in `unasked`."""
    reported = dict(tensors)
    outputs = {name: value for name, value in tensors.items() if name not in extra_inputs}
    if user_callback is None:
        _end_pass(state, step_index, reported)
        return outputs
    before = {**unasked, **reported}
    writes = {name: write_counts(value) for name, value in before.items()}
    with state.suspended():
        answer: dict[str, Any] | None = user_callback(pipeline, step_index, timestep, outputs)
    # One pipeline accepts `None`.
    given = {} if answer is None else answer
    exchanged = [
        name
        for name, value in {**before, **given}.items()
        if write_counts(before.get(name)) != writes.get(name, ()) or differs(before.get(name), value)
    ]
    unasked.update((name, value) for name, value in given.items() if name not in reported)
    _end_pass(state, step_index, reported, given.get("latents"), exchanged)
    return answer


def _end_pass(
    state: TGateState, step_index: int, tensors: dict[str, Any], latents: Any = None, exchanged: Collection[str] = ()
) -> None:
    """Notify the run of this thread, if there is one, that a pass has ended."""
    run = state.current()
    if run is not None:
        run.on_step_end(step_index, latents, tensors, exchanged)


@functools.cache
def _chained_callback_class() -> type:
    """The class of a chained callback that pipelines take for one of diffusers' own, with `tensor_inputs`."""
    from diffusers.callbacks import MultiPipelineCallbacks

    class ChainedCallback(MultiPipelineCallbacks):  # type: ignore[misc]
        def __init__(self, state: TGateState, user_callback: Any, tensor_inputs: list[str]) -> None:
            super().__init__([user_callback])
            self._state = state
            self._user_callback = user_callback
            self._extra_inputs = [name for name in tensor_inputs if name not in user_callback.tensor_inputs]
            self._unasked: dict[str, Any] = {}

        @property
        def tensor_inputs(self) -> list[str]:
            return [*self._user_callback.tensor_inputs, *self._extra_inputs]

        def __call__(self, pipeline: Any, step_index: int, timestep: Any, tensors: Any) -> dict[str, Any] | None:
            # The latent consistency pipelines do not read `tensor_inputs`.
            extra_inputs = self._extra_inputs if set(tensors) == set(self.tensor_inputs) else []
            return _on_step_end(
                self._state, self._user_callback, extra_inputs, self._unasked, pipeline, step_index, timestep, tensors
            )

    return ChainedCallback
