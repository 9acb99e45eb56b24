"""T-GATE in a loop of one's own, around a bare denoiser: bit for bit what `apply_tgate` computes of guidance."""

import copy
import io
import math
import pickle
import re
import threading

import numpy as np
import pytest
import torch

from tests.support.settings import apply_settings
from tests.zoo.case import seeded, slow, thorough
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import with_scheduler
from tgate_processors import TGateLoop, TGateSchedule, get_tgate_report

STEPS = 12
PLAN = "FF-FH--FH-HF"
# Those of attention layers are left out: nothing of them is seen here.
FIELDS = (
    "num_inference_steps",
    "gate_step",
    "full_batch_forwards",
    "half_batch_forwards",
    "forecast_forwards",
    "levels",
    "full_steps",
    "prediction_errors",
    "forecast_errors",
    "peak_bytes",
)


def told(report):
    return {name: getattr(report, name) for name in FIELDS}


class Request:
    """A request to a server of one's own: its latents, its scheduler and its clock. The denoiser is everyone's."""

    def __init__(self, pipe, case, prompt=0, scale=None, steps=STEPS, **settings):
        inputs = case.inputs([prompt])
        self.pipe, self.scheduler, self.done = pipe, copy.deepcopy(pipe.scheduler), 0
        self.scale = inputs["guidance_scale"] if scale is None else scale
        self.text, self.negative = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
        self.scheduler.set_timesteps(steps)
        self.latents = self.noise(inputs) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.loop = TGateLoop(steps, self.scale, **settings)
        # How many halves were computed in each step.
        self.computed = []

    def run(self, steps=None):
        with torch.no_grad():
            for t in self.scheduler.timesteps[self.done :][:steps]:
                self.before_step(t)
                noise = self.guided(t, *self.loop.end_step(*self.compute(t, self.loop.begin_step())))
                self.latents = self.scheduler.step(noise, t, self.latents, return_dict=False)[0]
                self.done += 1
        return self

    def before_step(self, t):
        pass

    def guided(self, t, cond, uncond):
        return uncond + self.scale * (cond - uncond)


class Batched(Request):
    """Stable Diffusion: both halves in one batch, the unconditional one first."""

    def noise(self, inputs):
        return torch.randn((1, 4, 8, 8), generator=inputs["generator"][0])

    def compute(self, t, level):
        if level == "-":
            self.computed.append(0)
            return None, None
        both = level == "F" and self.scale > 1
        self.computed.append(1 + both)
        latents = self.scheduler.scale_model_input(torch.cat([self.latents] * (1 + both)), t)
        text = torch.cat([self.negative, self.text]) if both else self.text
        output = self.pipe.unet(latents, t, encoder_hidden_states=text).sample
        return output.chunk(2)[::-1] if both else (output, None)


class TwoCalls(Request):
    """Wan: two calls, the conditional one first."""

    def noise(self, inputs):
        return torch.randn((1, 4, 2, 4, 4), generator=inputs["generator"][0])

    def denoiser(self, t):
        return self.pipe.transformer

    def compute(self, t, level):
        texts = [self.text, self.negative][: {"F": 1 + (self.scale > 1), "H": 1, "-": 0}[level]]
        self.computed.append(len(texts))
        given = {"hidden_states": self.latents, "timestep": t.expand(1)}
        halves = [self.denoiser(t)(**given, encoder_hidden_states=text).sample for text in texts]
        return (*halves, None, None)[:2]


class Experts(TwoCalls):
    """Wan 2.2: another denoiser takes over, with another scale."""

    def denoiser(self, t):
        early = t >= self.pipe.config.boundary_ratio * self.scheduler.config.num_train_timesteps
        return self.pipe.transformer if early else self.pipe.transformer_2

    def before_step(self, t):
        if self.done and self.denoiser(t) is not self.denoiser(self.scheduler.timesteps[self.done - 1]):
            self.loop.forget()
            self.scale = self.loop.guidance_scale = 3.0


def sd(scheduler="DPMSolverMultistepScheduler"):
    return with_scheduler(BY_NAME["sd"].build(), scheduler)


# Tiny pipelines with random weights predict badly. With these tolerances there are steps of every level.
SERVERS = {
    "sd": (Batched, sd, 1.5),
    "sd_ddim": (Batched, lambda: sd("DDIMScheduler"), 1.5),
    "wan": (TwoCalls, lambda: BY_NAME["wan"].build(), 0.3),
}


@pytest.fixture(params=[slow("sd"), thorough("sd_ddim"), "wan"])
def server(request):
    """A kind of request, the case of its pipeline, the pipeline, and a tolerance for it."""
    kind, build, tolerance = SERVERS[request.param]
    return kind, BY_NAME[request.param.removesuffix("_ddim")], build(), tolerance


def gated(pipe, case, prompt=0, scale=None, steps=STEPS, **settings):
    """The latents of a pipeline with T-GATE, and its report."""
    pipe = apply_settings(copy.deepcopy(pipe), cross_attention=False, **settings)
    more = {} if scale is None else {"guidance_scale": scale}
    return case.run(pipe, [prompt], num_inference_steps=steps, **more), told(get_tgate_report(pipe))


def test_requests_at_once_equal_the_pipeline_bit_for_bit(server):
    kind, case, pipe, tolerance = server
    requests = [
        kind(pipe, case, 0, tolerance=tolerance),
        kind(pipe, case, 1, tolerance=tolerance / 2),
        kind(pipe, case, 2, levels=PLAN),
    ]
    for step in range(STEPS):
        for request in requests[step % 2 :] + requests[: step % 2]:
            request.run(1)
    settings = [{"tolerance": tolerance}, {"tolerance": tolerance / 2}, {"levels": PLAN}]
    for prompt, (request, given) in enumerate(zip(requests, settings, strict=True)):
        latents, report = gated(pipe, case, prompt, **given)
        assert told(request.loop.report) == report
        assert torch.equal(request.latents, latents)
        assert request.computed == [{"F": 2, "H": 1, "-": 0}[level] for level in report["levels"]]
    assert set(requests[0].loop.report.levels) == set("FH-")
    assert len({request.loop.report.levels for request in requests}) == 3


@pytest.mark.parametrize("settings", [{"levels": PLAN}, {"tolerance": 0.9}], ids=["plan", "auto"])
def test_without_guidance_it_equals_the_pipeline_too(server, settings):
    kind, case, pipe, _ = server
    request = kind(pipe, case, scale=1.0, **settings).run()
    latents, report = gated(pipe, case, scale=1.0, **settings)
    assert told(request.loop.report) == report
    assert torch.equal(request.latents, latents)
    assert set(report["levels"]) == set("F-")
    assert request.computed == [{"F": 1, "-": 0}[level] for level in report["levels"]]


@pytest.mark.parametrize("settings", [{"tolerance": 0.2, "forecast": False}, slow({"tolerance": 0}), slow({})], ids=str)
def test_the_other_settings_mean_the_same(settings):
    case, pipe = BY_NAME["wan"], BY_NAME["wan"].build()
    request = TwoCalls(pipe, case, **settings).run()
    latents, report = gated(pipe, case, **settings)
    assert told(request.loop.report) == report
    assert torch.equal(request.latents, latents)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"levels": PLAN}, {"tolerance": 0.5}], ids=["plan", "auto"])
def test_another_denoiser_takes_over(settings):
    case = BY_NAME["wan_experts"]
    pipe = case.build()
    request = Experts(pipe, case, **settings).run()
    latents, report = gated(pipe, case, **settings)
    assert told(request.loop.report) == report
    assert torch.equal(request.latents, latents)


@pytest.mark.parametrize("name", [slow("sd"), "wan"])
@pytest.mark.parametrize("at", [slow(0), 4, slow(9), slow(STEPS)])
def test_a_saved_state_goes_on_elsewhere(name, at):
    kind, build, tolerance = SERVERS[name]
    pipe, case = build(), BY_NAME[name]
    settings = {"tolerance": tolerance} if at != 4 else {"levels": PLAN}
    whole = kind(pipe, case, **settings).run()
    request = kind(pipe, case, **settings).run(at)
    torch.save(request.loop.state_dict(), file := io.BytesIO())
    file.seek(0)
    request.loop = TGateLoop(STEPS, **settings)
    request.loop.load_state_dict(torch.load(file, weights_only=True))
    # The scale comes with the state.
    assert request.loop.guidance_scale == request.scale
    request.run(1)
    # An object can be pickled whole, too.
    request.loop = pickle.loads(pickle.dumps(request.loop))
    request.run()
    assert request.loop.report == whole.loop.report
    assert torch.equal(request.latents, whole.latents)


def halves(step, size=4):
    return seeded((2, size), 2 * step), seeded((2, size), 2 * step + 1)


def ran(loop, steps, first=None, size=4):
    """Run steps of a loop, and give what they returned; `first` numbers what is passed."""
    given = []
    for step in range(len(loop.report.levels) if first is None else first, STEPS)[:steps]:
        asked = {"F": 2 if loop.guidance_scale is not None else 1, "H": 1, "-": 0}[loop.begin_step()]
        given.append(loop.end_step(*halves(step, size)[:asked]))
    return given


def test_what_was_computed_is_returned_as_it_is():
    loop = TGateLoop(3, 2.0, levels="FH-")
    assert loop.begin_step() == "F"
    cond, uncond = halves(0)
    first = loop.end_step(cond, uncond)
    assert first[0] is cond
    assert first[1] is uncond
    assert loop.begin_step() == "H"
    cond, _ = halves(1)
    assert loop.end_step(cond)[0] is cond
    assert loop.begin_step() == "-"
    assert all(isinstance(half, torch.Tensor) for half in loop.end_step())


def test_without_guidance_both_halves_are_one():
    for scale in (None, 1, 0.0, np.float32(0.5)):
        loop = TGateLoop(3, scale, levels="FH-")
        for level in "FF-":
            assert loop.begin_step() == level
            cond, uncond = loop.end_step(*halves(0)[: level == "F"])
            assert cond is uncond


def test_guidance_off_and_on_again_begins_with_full_steps():
    loop = TGateLoop(10, 5.0, levels="FFHHHHHHHH")
    ran(loop, 4)
    loop.guidance_scale = None
    ran(loop, 2)
    loop.guidance_scale = torch.tensor(5.0)
    ran(loop, 4)
    assert loop.report.levels == "FFHHFFFFHH"


@pytest.mark.parametrize("settings", [{"tolerance": math.inf}, {"levels": "FFF-FFH-"}], ids=["auto", "plan"])
def test_after_forgetting_a_loop_is_a_new_one(settings):
    loop = TGateLoop(8, 5.0, **settings)
    ran(loop, 3)
    loop.forget()
    # Of another size from here on.
    found = ran(loop, 5, first=0, size=6)
    new = TGateLoop(5, 5.0, **({"levels": "FFFH-"} if "levels" in settings else settings))
    expected = ran(new, 5, first=0, size=6)
    assert loop.report.levels == "FFF" + new.report.levels
    assert {*new.report.levels} >= {"F", "-"}
    for name in ("prediction_errors", "forecast_errors"):
        later = [(step - 3, error) for step, error in getattr(loop.report, name) if step >= 3]
        assert later == [*getattr(new.report, name)]
    for one, two in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, two))


def test_a_long_loop_has_longer_gaps():
    loop = TGateLoop(40, 5.0, tolerance=math.inf)
    for step in range(40):
        ran(loop, 1, first=step % STEPS)
    assert loop.report.levels == "".join(step.level.value for step in TGateSchedule().plan(40))
    assert "-----" in loop.report.levels


@pytest.mark.parametrize("later", [0, 2])
def test_a_state_saved_after_forgetting_knows_as_little(later):
    loop, other = (TGateLoop(10, 5.0, tolerance=math.inf) for _ in range(2))
    for steps in (3, 2):
        ran(loop, steps)
        loop.forget()
    ran(loop, later)
    other.load_state_dict(loop.state_dict())
    expected, found = ran(loop, 5 - later), ran(other, 5 - later)
    assert loop.report == other.report
    assert loop.report.levels == "FFF" + "FF" + "FFF-H"
    for one, two in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, two))


def test_nothing_is_held_at_the_end_and_no_graph_before():
    loop, weight = TGateLoop(4, 5.0, levels="FFH-"), torch.ones(1, requires_grad=True)
    for step in range(4):
        asked = {"F": 2, "H": 1, "-": 0}[loop.begin_step()]
        loop.end_step(*[half * weight for half in halves(step)[:asked]])
        state = loop.state_dict()
        held = [*state["differences"], *state["outputs"]]
        assert not any(each.requires_grad for each in held)
        assert bool(held) is (step < 3)
    assert loop.report.peak_bytes > 0


@pytest.mark.parametrize("levels", ["F--HF-", "FFFH--"])
def test_what_a_step_gives_out_may_be_changed_in_place(levels):
    loop, other = (TGateLoop(6, 5.0, levels=levels) for _ in range(2))
    for _ in range(6):
        (cond, uncond), (same, again) = ran(loop, 1)[0], ran(other, 1)[0]
        assert torch.equal(cond, same)
        assert torch.equal(uncond, again)
        for half in (cond, uncond):
            half.zero_()


def raised(message, call, *args, error=ValueError):
    with pytest.raises(error, match=re.escape(message)):
        call(*args)


def test_wrong_calls_are_refused_and_change_nothing():
    loop, other = (TGateLoop(4, 5.0, levels="FFH-") for _ in range(2))
    raised("end_step was called without begin_step. Call begin_step once before it", loop.end_step, *halves(0))
    assert loop.begin_step() == "F"
    raised("begin_step was called twice in step 0. Call end_step once in every step", loop.begin_step)
    raised("state_dict was called within step 0. Call it after end_step", loop.state_dict)
    raised("forget was called within step 0. Call it after end_step", loop.forget)
    cond, uncond = halves(0)
    raised('step 0 has level "F" with guidance on: end_step takes cond and uncond, got only cond', loop.end_step, cond)
    raised("got nothing. Compute both halves", loop.end_step)
    raised("got only uncond. Compute both halves", loop.end_step, None, uncond)
    raised("uncond has the shape (2, 3), and cond has (2, 4)", loop.end_step, cond, uncond[:, :3])
    raised("cond must be a torch.Tensor, got ndarray.", loop.end_step, cond.numpy(), uncond, error=TypeError)
    loop.end_step(cond, uncond)
    raised("end_step was called without begin_step", loop.end_step, cond, uncond)
    loop.begin_step()
    wrong = halves(1, size=6)
    raised("cond has the shape (2, 6), and the halves before had (2, 4). Pass halves", loop.end_step, *wrong)
    loop.end_step(*halves(1))
    assert loop.begin_step() == "H"
    raised("takes only cond, got cond and uncond. Compute only the conditional half", loop.end_step, *halves(2))
    raised("cond has the shape (2, 6), and the halves before had (2, 4)", loop.end_step, halves(2, size=6)[0])
    loop.end_step(halves(2)[0])
    assert loop.begin_step() == "-"
    raised("end_step takes nothing, got only cond. Do not call the denoiser", loop.end_step, cond)
    last = loop.end_step()
    raised("begin_step was called after the last of 4 steps. Make one TGateLoop for each request", loop.begin_step)
    assert all(map(torch.equal, last, ran(other, 4)[-1]))
    assert loop.report == other.report


def test_a_second_half_without_guidance_is_refused():
    loop = TGateLoop(4)
    loop.begin_step()
    raised("guidance off: end_step takes only cond, got cond and uncond", loop.end_step, *halves(0))
    loop.end_step(halves(0)[0])


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (
            TypeError,
            "`num_inference_steps` must be an int of at least 1, got 2.5 of type float",
            {"num_inference_steps": 2.5},
        ),
        (ValueError, "`num_inference_steps` must be an int of at least 1, got 0", {"num_inference_steps": 0}),
        (
            TypeError,
            "`guidance_scale` must be a number, a tensor or None for no guidance, got '7' of type str",
            {"guidance_scale": "7"},
        ),
        (TypeError, "got True of type bool", {"guidance_scale": True}),
        (ValueError, "a number, a tensor or None for no guidance, got nan", {"guidance_scale": float("nan")}),
        (ValueError, "or math.inf to accept any, got -1.", {"tolerance": -1}),
        (ValueError, "`levels` must be a letter for each step such as \"FFFF-F--FH\", got 'FX'", {"levels": "FX"}),
        (ValueError, "each of the 4 steps that run, got 2: 'FF'", {"levels": "FF"}),
        (ValueError, "`tolerance` must be left out", {"levels": "FFFF", "tolerance": 0.1}),
    ],
)
def test_wrong_settings_are_refused(error, message, settings):
    with pytest.raises(error, match=re.escape(message)):
        TGateLoop(**{"num_inference_steps": 4, **settings})


def test_a_state_of_other_settings_is_refused():
    state = TGateLoop(4, 5.0, tolerance=0.3).state_dict()
    raised("state_dict is of tolerance=0.3, and this TGateLoop has tolerance=0.2", TGateLoop(4).load_state_dict, state)
    raised("num_inference_steps=4, and", TGateLoop(5, tolerance=0.3).load_state_dict, state)
    del state["outputs"]
    raised("lacks or adds ['outputs']", TGateLoop(4, tolerance=0.3).load_state_dict, state)


@pytest.mark.slow
def test_threads_have_a_loop_each():
    case, pipe = BY_NAME["wan"], BY_NAME["wan"].build()
    requests = [TwoCalls(pipe, case, prompt, tolerance=0.3) for prompt in range(4)]
    threads = [threading.Thread(target=request.run) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, request in enumerate(requests):
        assert torch.equal(request.latents, TwoCalls(pipe, case, prompt, tolerance=0.3).run().latents)
