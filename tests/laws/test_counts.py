"""How often attention really runs, and on how much, against the schedule written out once more."""

import pytest
import torch

from tests.support.counting import count
from tests.support.settings import SETTINGS, computed
from tests.zoo.core import GUIDED, STEPS, Case, rows
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate


@pytest.mark.parametrize(
    ("settings", "prompts"),
    # Two prompts are dearer, and the schedule does not see them.
    [(settings, [0, 1] if name == "v2" else [0]) for name, settings in SETTINGS.items()],
    ids=SETTINGS,
)
def test_to_k_runs_exactly_as_the_schedule_says(case: Case, settings, prompts):
    pipe = apply_tgate(case.build(), **settings)
    seen = count(pipe, case)
    case.run(pipe, prompts)
    report = get_tgate_report(pipe)
    steps = report.num_inference_steps
    assert steps in (STEPS, STEPS - 1)
    gate = round(settings["gate_step"] * steps + 1e-9) if settings["gate_step"] == 0.5 else settings["gate_step"]
    halves = 2 if case in GUIDED else 1
    plan = [computed(step, steps, **settings) for step in range(steps)]
    share = [1 if step < gate else halves for step in range(steps)]
    full = seen.pop("denoiser")
    assert full == [full[0] // part for part in share]
    assert len(seen) > 2
    for name, batches in seen.items():
        kind = 0 if name.endswith("attn2") else 1
        assert batches == [batches[0] // part for part, ran in zip(share, plan, strict=True) if ran[kind]], name
    assert report.gate_step == gate
    assert report.cross_attention_computed == gate
    assert report.cross_attention_reused == steps - gate
    assert report.self_attention_computed == sum(own for _, own in plan)
    assert report.self_attention_reused == steps - report.self_attention_computed
    assert report.half_batch_forwards == (steps - gate if halves == 2 else 0)
    assert report.full_batch_forwards == steps - report.half_batch_forwards


@pytest.mark.parametrize("case", rows(GUIDED))
@pytest.mark.parametrize(
    ("half", "prompts"), [(None, [0]), ("unconditional", [0, 1]), ("conditional", [0, 1])], ids=lambda value: str(value)
)
def test_after_the_gate_the_denoiser_gives_what_it_gives_with_the_mean_in_the_place_of_cross_attention(
    case: Case, half, prompts
):
    gate = 2
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    calls, means = [], {}
    layers = {name: module for name, module in denoiser.named_modules() if name.endswith("attn2")}

    def keep_mean(name):
        def hook(module, args, output):
            if len(calls) == gate:
                means[name] = (output.chunk(2)[0] + output.chunk(2)[1]) / 2

        return hook

    # Registered before T-GATE's hook: sees what the pipeline passes.
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    handles = [layer.register_forward_hook(keep_mean(name)) for name, layer in layers.items()]
    apply_tgate(pipe, gate, cfg_half=half)
    outputs = []
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    case.run(pipe, prompts)
    remove_tgate(pipe)
    for handle in handles:
        handle.remove()
    args, kwargs = calls[gate]
    # A ControlNet gives what belongs to the half that stays.
    for residuals in [key for key in kwargs if key.endswith(("additional_residual", "additional_residuals"))]:
        given = kwargs[residuals]
        kwargs[residuals] = torch.cat([given] * 2) if torch.is_tensor(given) else [torch.cat([r] * 2) for r in given]
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: torch.cat([means[name]] * 2))
    with torch.no_grad():
        unconditional, conditional = denoiser(*args, **kwargs)[0].chunk(2)
    kept = conditional if (half or case.kept) == "conditional" else unconditional
    torch.testing.assert_close(outputs[gate], torch.cat([kept, kept]), rtol=1e-4, atol=1e-5)
    other = unconditional if kept is conditional else conditional
    if not case.control and not torch.allclose(other, kept, rtol=1e-3):
        assert not torch.allclose(outputs[gate], torch.cat([other, other]), rtol=1e-3)


@pytest.mark.slow
def test_cfg_half_matters_where_more_than_cross_attention_is_conditioned():
    from tests.zoo.core import BY_NAME

    for name, matters in (("sdxl", True), ("svd", True), ("sd", False)):
        case = BY_NAME[name]
        first, second = (case.gated(2, cfg_half=half) for half in ("unconditional", "conditional"))
        assert torch.equal(first, second) is not matters
        assert torch.equal(case.gated(2), first if case.kept == "unconditional" else second)
