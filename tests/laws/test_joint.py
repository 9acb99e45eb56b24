"""Guidance alone, where text and image share one softmax: no layer is touched, and half steps compute one half."""

from dataclasses import replace

import diffusers
import pytest
import torch

from tests.support.comparing import distance
from tests.support.custom_loops import OwnLoop
from tests.support.macs import taken
from tests.support.settings import EVERY, FIXED, PATIENT, apply_settings, full_steps
from tests.zoo.case import STEPS, TIERS, Case, rows
from tests.zoo.catalogue import BY_NAME, JOINT_ATTENTION, MOST
from tests.zoo.cross_attention import TOKENS, assemble, text, together
from tests.zoo.joint import JOINT as FIRST
from tests.zoo.joint import flux, pooled, sd3
from tests.zoo.joint_images import GLM_EDIT
from tests.zoo.variants import AROUND_JOINT
from tests.zoo.z_image import EVEN
from tgate_processors import (
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    is_tgate_applied,
    remove_tgate,
)
from tgate_processors._internal.families import attention_modules
from tgate_processors._internal.guidance.prediction import CFGDifference, predict, relative_error

# Some have no row by default: their denoiser is that of others.
GATE = 3
DROP = {"gate_step": GATE}
ALONE = {"cross_attention": False}
every = pytest.mark.parametrize("kind", rows(JOINT_ATTENTION, default=MOST))
every_slow = pytest.mark.parametrize("kind", rows(JOINT_ATTENTION, default=()))
patient = pytest.param(PATIENT, marks=TIERS["thorough"])
SD3 = pytest.mark.parametrize("kind", rows([BY_NAME["sd3"]]))


def full_of(settings):
    """The full steps, as planned."""
    return tuple(range(GATE)) if settings is DROP else full_steps(STEPS, settings)


def rows_seen(module, first):
    """What the first layer is given in each forward."""
    seen = []
    first = module.get_submodule(first)
    first.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def processors(pipe):
    return [module.processor for module in attention_modules(pipe.transformer).values()]


@every
@pytest.mark.parametrize("settings", [DROP, FIXED, patient], ids=str)
def test_half_steps_compute_one_half_and_no_layer_is_touched(kind: Case, settings):
    pipe = kind.build()
    given, watch = [], pipe.transformer.register_forward_hook
    handle = watch(lambda module, args, output: given.append(tensor_of(output[0])))
    noises = watch_scheduler(pipe)
    baseline = kind.run(pipe)
    handle.remove()
    del pipe.scheduler.step
    # Of the tokens of a given picture nothing is kept.
    whole = tokens_of(given[0], noises[0], kind)
    layers = processors(pipe)
    apply_settings(pipe, **settings, **ALONE)
    gated = kind.run(pipe)
    assert gated.isfinite().all()
    assert not torch.equal(gated, baseline)
    assert all(now is then for now, then in zip(processors(pipe), layers, strict=True))
    full, report = full_of(settings), get_tgate_report(pipe)
    assert report.full_steps == full
    assert (report.full_batch_forwards, report.half_batch_forwards) == (len(full), STEPS - len(full))
    assert report.cross_attention_computed == report.cross_attention_reused == 0
    # The last two differences of a step, of as many values as the denoiser gives for one half.
    held = 2 * whole.nbytes // (3 - kind.calls) if report.half_batch_forwards and settings is not DROP else 0
    assert report.peak_bytes == held


@every
def test_the_denoiser_runs_on_both_halves_in_full_steps_and_on_one_in_half_steps(kind: Case):
    pipe = apply_settings(kind.build(), **FIXED, **ALONE)
    seen = rows_seen(pipe.transformer, kind.first)
    controlled = rows_seen(pipe.controlnet, kind.first_of_control or kind.first) if kind.control else []
    prompts = [0, 1] if kind.batches else [0]
    kind.run(pipe, prompts)
    half = len(prompts) * kind.rows
    whole = [half] * 2 if kind.calls == 2 else [2 * half]
    expected = [whole if step in full_of(FIXED) else [half] for step in range(STEPS)]
    assert seen == [each for step in expected for each in step]
    # Where guidance is two calls, the ControlNet has run before them.
    runs = [half] * STEPS if kind.calls == 2 else seen
    assert controlled == (runs if kind.control else [])


def watch_scheduler(pipe):
    """What the scheduler is given in each step."""
    noises, step = [], pipe.scheduler.step

    def stepping(noise, *args, **kwargs):
        noises.append(noise)
        return step(noise, *args, **kwargs)

    pipe.scheduler.step = stepping
    return noises


@every
@pytest.mark.parametrize("settings", [FIXED, pytest.param(DROP, marks=TIERS["thorough"]), patient], ids=str)
def test_the_scheduler_gets_the_guidance_that_is_computed_or_predicted(kind: Case, settings):
    pipe = kind.build()
    calls = []
    # Registered before T-GATE's: sees what the pipeline gives.
    note = pipe.transformer.register_forward_pre_hook
    handle = note(lambda module, args, kwargs: calls.append((tuple(args), dict(kwargs))), with_kwargs=True)
    apply_settings(pipe, **settings, **ALONE)
    noises = watch_scheduler(pipe)
    kind.run(pipe)
    report = get_tgate_report(pipe)
    remove_tgate(pipe)
    handle.remove()
    with torch.no_grad():
        given = (tensor_of(pipe.transformer(*args, **kwargs)[0]) for args, kwargs in calls)
        outputs = iter([tokens_of(output, noises[0], kind) for output in given])
    known, errors, scale = [], [], kind.guidance + kind.scale_beyond
    for step, noise in enumerate(noises):
        full = step in report.full_steps
        if kind.calls == 2:
            prompt, none = next(outputs), next(outputs) if full else None
        elif kind.control and not full:
            # After a ControlNet on one half all of it is that half.
            prompt, none = next(outputs), None
        else:
            prompt, none = next(outputs).chunk(2)[:: 1 if kind.conditional_first else -1]
        if full:
            if len(known) == 2 and settings is PATIENT:
                right = none + scale * (prompt - none)
                error = relative_error(predict(known, step), prompt - none, right, scale)
                errors.append((step, pytest.approx(error.max().item(), rel=1e-3)))
            known = [*known[-1:], CFGDifference(step, prompt - none)]
        else:
            none = prompt if settings is DROP else prompt - predict(known, step)
        noise = tokens_of(noise, noise, kind)
        torch.testing.assert_close(noise, frames_of(kind.guided(none, prompt), noise), rtol=1e-4, atol=1e-5)
    assert list(report.prediction_errors) == errors
    assert bool(errors) is (settings is PATIENT)


def tensor_of(output):
    """An output that may give its samples in a list, in one tensor."""
    return torch.stack(output) if isinstance(output, list) else output


def tokens_of(output, noise, kind):
    """The tokens of an output that the pipeline reads: not those of a given picture, which follow, or stand before."""
    if output.dim() == 6:
        # Pictures, of which the last one is drawn.
        return output[:, -1:]
    if output.dim() != 3:
        return output
    return output[:, -noise.shape[1] :] if kind.at_end else output[:, : noise.shape[1]]


def frames_of(guided, noise):
    """The frames of an output that the pipeline reads: not one that is given."""
    return guided if guided.dim() == 3 else guided[:, :, -noise.shape[2] :]


@pytest.mark.parametrize("kind", rows([BY_NAME["sd3"], BY_NAME["qwen"], EVEN[0]], default=()))
def test_a_compiled_denoiser_gives_the_same_and_counts_no_attention(kind: Case):
    pipe = kind.build()
    if kind.calls == 2:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    apply_settings(pipe, **FIXED, **ALONE)
    torch.testing.assert_close(kind.run(pipe), kind.gated(**FIXED, **ALONE))
    report = get_tgate_report(pipe)
    assert report.full_steps == full_of(FIXED)
    assert report.cross_attention_computed == report.self_attention_computed == 0


@every_slow
def test_a_call_without_guidance_is_the_plain_one_and_says_so(kind: Case, caplog):
    pipe, off = apply_settings(kind.build(), **DROP, **ALONE), kind.off
    assert torch.equal(kind.run(pipe, **off), kind.plain(**off))
    assert get_tgate_report(pipe).half_batch_forwards == 0
    (message,) = (record.message for record in caplog.records if "tgate" in record.name)
    assert message.startswith("T-GATE: guidance alone is gated, and this call of ")
    assert f"nothing is gated. It guides with {kind.scale} above 1" in message


@SD3
def test_skip_layer_guidance_stays_on_as_it_is(kind: Case):
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.8}
    pipe = kind.build()
    baseline = kind.run(pipe, **skipping)
    assert not torch.equal(baseline, kind.plain())
    for settings in EVERY:
        assert torch.equal(kind.run(apply_settings(pipe, **settings, **ALONE), **skipping), baseline)
    apply_settings(pipe, **FIXED, **ALONE)
    seen = rows_seen(pipe.transformer, kind.first)
    kind.run(pipe, **skipping)
    # It makes one more forward on one half in each step but the first and the last.
    expected = [[2 if step in full_of(FIXED) else 1, *([1] if 0 < step < STEPS - 1 else [])] for step in range(STEPS)]
    assert seen == [each for step in expected for each in step]


@pytest.mark.parametrize("kind", rows([kind for kind in AROUND_JOINT if kind.name == "framepack"], default=()))
def test_every_section_of_a_video_has_a_gate_of_its_own(kind: Case):
    pipe, two = kind.build(), {"num_frames": 10}
    plain = kind.run(pipe, **two)
    for settings in EVERY:
        assert torch.equal(kind.run(apply_settings(pipe, **settings, **ALONE), **two), plain)
    apply_settings(pipe, **FIXED, **ALONE)
    seen = rows_seen(pipe.transformer, kind.first)
    kind.run(pipe, **two)
    full = full_of(FIXED)
    assert get_tgate_report(pipe).full_steps == (*full, *(STEPS + step for step in full))
    assert len(seen) == 2 * (STEPS + len(full))


@pytest.mark.parametrize("kind", rows([GLM_EDIT]))
def test_calls_before_the_loop_run_as_without_tgate(kind: Case):
    pipe, baseline = kind.build(), kind.plain()
    for settings in EVERY:
        assert torch.equal(kind.run(apply_settings(pipe, **settings, **ALONE)), baseline)
    apply_settings(pipe, **FIXED, **ALONE)
    seen = rows_seen(pipe.transformer, kind.first)
    assert not torch.equal(kind.run(pipe), baseline)
    full = full_of(FIXED)
    assert get_tgate_report(pipe).full_steps == full
    assert len(seen) == 1 + STEPS + len(full)


# These read values of their inputs.
UNCOUNTED = {"lumina2", "mochi", "framepack", "hidream", "qwen21", "glm", "fibo2", "nucleus"}
ALSO = {"flux2", "krea2", "ovis", "bria", "easy_animate", "longcat_image", "fibo"}
MORE = [kind for kind in AROUND_JOINT if kind.name in ALSO]
COUNTED = [kind for kind in [*FIRST, *MORE, *EVEN] if kind.name not in UNCOUNTED and kind.batches]
COUNTED = [kind for kind in COUNTED if "sd3_" not in kind.name]
# It takes one prompt and one picture.
COUNTED += [kind for kind in AROUND_JOINT if kind.name == "joy"]


@pytest.mark.parametrize("kind", rows(COUNTED, default=()))
@pytest.mark.parametrize("settings", [DROP, FIXED], ids=str)
def test_the_estimate_is_what_a_run_takes(kind: Case, settings):
    if kind.name == "sd3":
        # Tokens of CLIP stand before those of T5.
        kind = replace(kind, conditioning=together(text(8, masked=False, tokens=77 + TOKENS), pooled(8)))
    pipe = kind.build()
    prompts = [0, 1] if kind.batches else [0]
    given = {
        "max_sequence_length": TOKENS,
        "batch_size": len(prompts),
        "do_classifier_free_guidance": True,
        **kind.size,
        **ALONE,
    }
    cost = estimate_cost(pipe, TGateSchedule(**settings), STEPS, **given)
    assert cost.without_tgate.total == taken(pipe, kind, prompts, linear=True).total
    gated = taken(apply_settings(pipe, **settings, **ALONE), kind, prompts, linear=True)
    assert cost.with_tgate.total == gated.total
    assert cost.report == get_tgate_report(pipe)


@pytest.mark.parametrize("kind", rows([kind for kind in JOINT_ATTENTION if kind.name in UNCOUNTED], default=()))
def test_what_reads_its_inputs_is_not_counted(kind: Case):
    with pytest.raises(ValueError, match="reads values of its inputs"):
        estimate_cost(kind.build(), TGateSchedule(**DROP), STEPS, **kind.size, **ALONE)


@pytest.mark.parametrize("kind", rows([BY_NAME["qwen"]]))
def test_a_scale_without_a_negative_prompt_does_not_guide(kind: Case, caplog):
    pipe = apply_settings(kind.build(), **DROP, **ALONE)
    absent = {"negative_prompt_embeds": None, "negative_prompt_embeds_mask": None}
    assert torch.equal(kind.run(pipe, **absent), kind.plain(**absent))
    assert "It guides with true_cfg_scale above 1 and a negative prompt." in caplog.text


@pytest.mark.parametrize("kind", rows([BY_NAME["lumina2"], EVEN[0]]))
def test_guidance_that_ends_by_itself_is_refused(kind: Case):
    pipe = apply_settings(kind.build(), **DROP, **ALONE)
    name = "cfg_trunc_ratio" if kind.name == "lumina2" else "cfg_truncation"
    with pytest.raises(ValueError, match=rf"{name}=0\.25 ends the guidance of {kind.pipeline} by itself"):
        kind.run(pipe, **{name: 0.25})
    # Without guidance there is none to end.
    assert torch.equal(kind.run(pipe, **kind.off, **{name: 0.25}), kind.plain(**kind.off))


@pytest.mark.parametrize("kind", rows([EVEN[0]]))
def test_the_unconditional_half_of_a_list_may_stay(kind: Case):
    pipe, calls = kind.build(), []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(args))
    apply_settings(pipe, **DROP, **ALONE, cfg_half="unconditional")
    noises = watch_scheduler(pipe)
    kind.run(pipe)
    remove_tgate(pipe)
    handle.remove()
    with torch.no_grad():
        _, none = tensor_of(pipe.transformer(*calls[-1])[0]).chunk(2)
    torch.testing.assert_close(noises[-1], -none.squeeze(2))


@pytest.mark.parametrize("kind", rows([EVEN[0]]))
def test_the_user_finds_a_list_and_may_ask_for_several_pictures(kind: Case):
    pipe = apply_settings(kind.build(), **FIXED, **ALONE)
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append((args, output[0])))
    one = kind.inputs([0, 1])
    two = kind.inputs([0]) | {"num_images_per_prompt": 2, "generator": one["generator"]}
    pictures = pipe(**two).images
    handle.remove()
    assert all(type(part) is list and len(part) == 4 for args, output in seen for part in (args[0], args[2], output))
    assert distance(pictures[:1], kind.run(pipe)) < 1e-4
    own = type("OwnLoop", (OwnLoop, type(pipe)), {"__module__": __name__})(**pipe.components)
    with pytest.raises(ValueError, match="which half of its batch is the unconditional one cannot be told"):
        apply_tgate(own, **ALONE)


@pytest.mark.parametrize("kind", rows([BY_NAME["cogvideox"]]))
def test_a_scale_that_changes_in_every_step_needs_a_number(kind: Case):
    pipe, dynamic = kind.build(), {"use_dynamic_cfg": True}
    baseline = kind.run(pipe, **dynamic)
    apply_settings(pipe, **EVERY[0], **ALONE)
    assert torch.equal(kind.run(pipe, **dynamic), baseline)
    kind.run(apply_settings(pipe, **FIXED, **ALONE), **dynamic)
    assert get_tgate_report(pipe).full_steps == full_of(FIXED)
    with pytest.raises(ValueError, match="use_dynamic_cfg=True changes the guidance scale of CogVideoXPipeline"):
        kind.run(apply_tgate(pipe, **ALONE), **dynamic)


class SkipsLayers(diffusers.DiffusionPipeline):
    """Community code: a third part of the batch skips layers, and the pipeline does not tell that it guides."""

    num_timesteps = 0

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, prompt=None, guidance_scale=6.0, stg_scale=0.0, callback_on_step_end=None):
        raise NotImplementedError


@pytest.mark.parametrize("alone", [{}, ALONE], ids=["all", "alone"])
def test_a_loop_of_someone_else_that_does_not_tell_its_guidance_is_not_called_distilled(alone):
    whole = BY_NAME["cogvideox"].build()
    pipe = SkipsLayers(whole.transformer, whole.scheduler)
    with pytest.raises(
        ValueError, match="it has no do_classifier_free_guidance, so its steps and its guidance are not"
    ):
        apply_tgate(pipe, GATE, **ALONE)


@pytest.mark.parametrize("alone", [{}, ALONE], ids=["all", "alone"])
def test_distilled_guidance_has_no_half_to_leave_out_but_whole_steps(alone):
    pipe = flux()
    fill = assemble("FluxFillPipeline", transformer=pipe.transformer, scheduler=pipe.scheduler, vae=pipe.vae)
    for settings in ({"forecast": False}, {"gate_step": GATE}, {"levels": "FFH"}):
        with pytest.raises(ValueError, match=r"so there is no half to leave out. Whole steps .*: apply_tgate\(pipe\)"):
            apply_settings(fill, **settings, **alone)
    perturbed = sd3("StableDiffusion3PAGPipeline")
    with pytest.raises(
        ValueError, match=r"attention is joint, guidance alone .* is not two halves, .* You can still use"
    ):
        apply_tgate(perturbed, GATE, **alone)
    for whole in (fill, perturbed):
        assert is_tgate_applied(apply_tgate(whole, **alone))


@SD3
def test_what_is_joint_is_refused_with_what_to_do(kind: Case):
    pipe = kind.build()
    with pytest.raises(
        ValueError,
        match=r"cross_attention=True is not possible: SD3Transformer2DModel has joint .*: apply_tgate\(pipe\)",
    ):
        apply_tgate(pipe, cross_attention=True)
    with pytest.raises(ValueError, match=r"fi_interval=2 reuse self-attention, .* leave them out"):
        apply_tgate(pipe, TGateSchedule(GATE, fi_interval=2), **ALONE)
    assert not is_tgate_applied(pipe)


class Mixing:
    """A processor of somebody's own around one of diffusers'."""

    def __init__(self, behind):
        self.behind = behind

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.behind(attn, hidden_states, encoder_hidden_states, attention_mask)


@SD3
def test_processors_of_ones_own_leave_guidance_whole(kind: Case, caplog):
    pipe = kind.build()
    pipe.transformer.set_attn_processor({name: Mixing(p) for name, p in pipe.transformer.attn_processors.items()})
    assert torch.equal(kind.run(apply_settings(pipe, **FIXED, **ALONE)), kind.plain())
    assert "so guidance is kept in full" in caplog.text
    apply_settings(pipe, **FIXED, **ALONE, custom_processors="gate")
    assert torch.equal(kind.run(pipe), kind.gated(**FIXED, **ALONE))


@pytest.mark.parametrize("kind", rows(JOINT_ATTENTION, default={"sd3", "qwen"}))
def test_what_the_model_has_is_gated_by_default(kind: Case):
    pipe = apply_settings(kind.build(), **FIXED)
    gated = kind.run(pipe)
    report = get_tgate_report(pipe)
    assert report.half_batch_forwards > 0
    assert report.peak_bytes > 0 == report.kept_layers
    assert torch.equal(gated, kind.run(apply_settings(pipe, **FIXED, **ALONE)))
