"""How often attention really runs, and on how much, against the schedule written out once more."""

import pytest
import torch

from tests.support.comparing import distance
from tests.support.counting import count, is_cross
from tests.support.settings import FIXED, PATIENT, SETTINGS, computed, full_steps
from tests.zoo.case import STEPS, Case, rows, thorough
from tests.zoo.catalogue import BY_NAME, CROSS_ATTENTION, MOST, SEQUENTIAL
from tests.zoo.core import CASES, GUIDED
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate

GATE = 3
# All of whose layers are gated, and found by their names.
OF_LAYERS = [*CASES, *CROSS_ATTENTION]
# One of each kind of denoiser.
FEW = {"sd", "pixart_alpha", "svd", "lcm", "sana", "wan"}
SOME = FEW | {"sd_controlnet", *(case.name for case in CROSS_ATTENTION)}
# Other settings than those of version 2 differ in the schedule alone, which the first families show.
CORE = {case.name for case in CASES}
COUNTED = [
    pytest.param(*row.values, name, marks=row.marks, id=f"{name}-{row.id}")
    for name in SETTINGS
    for row in rows(OF_LAYERS if name in ("v2", "gate_1") else CASES, default=None if name == "v2" else CORE)
]


def check_counts(case, settings, prompts, plan, share):
    """
    Every layer runs as often, and on as much, as planned.

    `plan` says of a number of steps whether cross- and self-attention run in each, `share` what part of the batch.
    """
    pipe = case.gate(case.build(), **settings)
    seen = count(pipe, case)
    case.run(pipe, prompts)
    report = get_tgate_report(pipe)
    steps = report.num_inference_steps
    # Some leave out a step that their strength has no room for.
    assert steps in (STEPS, STEPS - 1)
    plan, share = plan(steps), share(steps)
    full = seen.pop("denoiser")
    assert full == [full[0] // part for part in share]
    assert {is_cross(case, name) for name in seen} == {True, not case.own}
    for name, batches in seen.items():
        of_kind = 0 if is_cross(case, name) else 1
        assert batches == [batches[0] // part for part, ran in zip(share, plan, strict=True) if ran[of_kind]], name
    crossed, own = (sum(each) for each in zip(*plan, strict=True))
    if settings.get("cross_attention", True):
        assert (report.cross_attention_computed, report.cross_attention_reused) == (crossed, steps - crossed)
    if case.own and "cross_attention" not in settings:
        assert (report.self_attention_computed, report.self_attention_reused) == (own, steps - own)
    assert report.half_batch_forwards == share.count(2)
    assert report.full_batch_forwards == steps - share.count(2)
    return report


@pytest.mark.parametrize(("case", "name"), COUNTED)
def test_every_layer_runs_exactly_as_the_schedule_says(case: Case, name):
    # Without settings of self-attention where no layer has it.
    settings = {key: value for key, value in SETTINGS[name].items() if case.own or key == "gate_step"}
    # Two prompts are dearer, and the schedule does not see them.
    prompts = [0, 1] if name == "v2" and case.batches else [0]
    halves = 2 if case.is_guided else 1

    def plan(steps):
        return [computed(step, steps, **settings) for step in range(steps)]

    report = check_counts(
        case, settings, prompts, plan, lambda steps: [1 if cross else halves for cross, _ in plan(steps)]
    )
    assert report.gate_step == report.cross_attention_computed


@pytest.mark.parametrize("case", rows([case for case in OF_LAYERS if case.is_guided], default=MOST & SOME))
@pytest.mark.parametrize(
    "settings", [FIXED, thorough(PATIENT), thorough(FIXED | {"cross_attention": False})], ids=["fixed", "auto", "alone"]
)
def test_full_steps_compute_everything_and_half_steps_one_half(case: Case, settings):
    alone = "cross_attention" in settings

    def full(steps):
        return full_steps(steps, settings)

    report = check_counts(
        case,
        settings,
        [0, 1] if case.batches else [0],
        lambda steps: [(alone or step in full(steps), True) for step in range(steps)],
        lambda steps: [1 if step in full(steps) else 2 for step in range(steps)],
    )
    assert report.full_steps == full(report.num_inference_steps)


@pytest.mark.parametrize("case", rows([*OF_LAYERS, *SEQUENTIAL], default=FEW))
def test_without_guidance_nothing_is_averaged_or_halved(case: Case):
    pipe = case.gate(case.build(), GATE)
    prompts = [0, 1] if case.batches else [0]
    seen = count(pipe, case)
    together = case.run(pipe, prompts, **case.off)
    report = get_tgate_report(pipe)
    steps = report.num_inference_steps
    assert report.half_batch_forwards == 0
    assert report.cross_attention_reused > 0
    if len(case.denoisers(pipe)) == 1:
        assert seen.pop("denoiser") == [len(prompts) * case.rows] * steps
        for name, batches in seen.items():
            assert batches == [batches[0]] * (GATE if is_cross(case, name) else steps)
    singles = torch.cat([case.run(pipe, [prompt], **case.off) for prompt in prompts])
    assert distance(together, singles) < 5e-5


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

    for name, matters in (("sdxl", True), ("svd", True), ("sd", False)):
        case = BY_NAME[name]
        first, second = (case.gated(2, cfg_half=half) for half in ("unconditional", "conditional"))
        assert torch.equal(first, second) is not matters
        assert torch.equal(case.gated(2), first if case.kept == "unconditional" else second)
