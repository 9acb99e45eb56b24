"""All that T-GATE changes of a pipeline, for tests of what is left."""

from tgate_processors._internal.families import attention_modules


def state_of(pipe, case):
    """Class, attributes, hooks and processors, object by object."""
    denoiser = getattr(pipe, case.denoiser)
    parts = [denoiser, *([pipe.controlnet] if getattr(pipe, "controlnet", None) is not None else [])]
    hooks = [list(getattr(part, name).items()) for part in parts for name in vars(part) if name.startswith("_forward_")]
    layers = [(layer.processor, id(vars(layer))) for layer in attention_modules(denoiser).values()]
    return type(pipe), sorted(vars(pipe)), hooks, layers, [sorted(vars(part)) for part in parts]


def snapshot(pipe, case):
    """Everything that T-GATE could leave behind."""
    seen = {"class": type(pipe), "pipe": dict(vars(pipe))}
    parts = {**case.denoisers(pipe), "controlnet": getattr(pipe, "controlnet", None)}
    modules = [(f"{key}.{n}", m) for key, part in parts.items() if part is not None for n, m in part.named_modules()]
    for name, module in modules:
        seen[f"{name}/vars"] = dict(vars(module))
        for key, value in vars(module).items():
            if isinstance(value, dict):
                seen[f"{name}/{key}"] = dict(value)
    for part, denoiser in case.denoisers(pipe).items():
        for name, module in attention_modules(denoiser).items():
            seen[f"{part}.{name}/processor"] = dict(vars(module.processor))
    return seen


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, dict):
            assert list(value) == list(after[key]), key
            assert all(value[name] is after[key][name] for name in value), key
        else:
            assert value is after[key], key


def check_restored(before, after, case=None):
    """Everything is the object that it was, but for what a call of the pipeline makes anew."""
    made = ("_current_timestep", "_guidance_scale", "_attention_kwargs", "_joint_attention_kwargs", "_current_sigma")
    for made_anew in made:
        for seen in (before, after):
            seen["pipe"].pop(made_anew, None)
    for seen in (before, after):
        # Rotary tables, which some denoisers take to their device in every forward.
        seen.get("transformer.pos_embed/vars", {}).pop("freqs", None)
    if case is not None and case.row:
        # What is built around others sets more of its own.
        assert before.keys() == after.keys()
        ends = ("_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "/processor", "class")
        before, after = ({key: value for key, value in seen.items() if key.endswith(ends)} for seen in (before, after))
    assert_same(before, after)
