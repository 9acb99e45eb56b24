"""All that T-GATE changes of a pipeline, for tests of what is left."""

from tgate_processors._internal.attention.layers import attention_modules


def state_of(pipe, case):
    """Class, attributes, hooks and processors, object by object."""
    denoiser = getattr(pipe, case.denoiser)
    parts = [denoiser, *([pipe.controlnet] if getattr(pipe, "controlnet", None) is not None else [])]
    hooks = [list(getattr(part, name).items()) for part in parts for name in vars(part) if name.startswith("_forward_")]
    layers = [(layer.processor, id(vars(layer))) for layer in attention_modules(denoiser).values()]
    return type(pipe), sorted(vars(pipe)), hooks, layers, [sorted(vars(part)) for part in parts]
