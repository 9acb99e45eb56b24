"""A loop that nobody vouches for is looked at: it is gated right, or refused in the first step that shows it."""

import threading

import diffusers
import pytest
import torch

from tests.support.custom_loops import NAMES, Loop, built
from tests.support.settings import apply_settings
from tests.zoo.case import quiet, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import apply_tgate, get_tgate_report, remove_tgate

GATE = 3


# Where the order of the halves matters, SDXL has what tells it, and what it matters for.
BOTH = pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMES], ids=NAMES)


@pytest.fixture(params=["sd", thorough("sdxl")])
def case(request):
    return BY_NAME[request.param]


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def refused(case, pipe, message, prompts=None, error=ValueError, **settings):
    """It is refused, and then works without T-GATE as before."""
    baseline = case.run(pipe, prompts)
    apply_settings(pipe, **{"gate_step": GATE, **settings})
    with pytest.raises(error, match=message):
        case.run(pipe, prompts)
    assert vars(pipe)["_tgate"].state.nbytes == 0
    assert torch.equal(case.run(remove_tgate(pipe), prompts), baseline)


@pytest.mark.parametrize("prompts", [[0], [0, 1]], ids=["one", "two"])
@pytest.mark.parametrize("gate", [thorough(1), GATE])
def test_a_loop_like_diffusers_own_is_gated_like_it(case, prompts, gate):
    pipe = built(case.name)
    assert close(case.run(pipe, prompts), case.plain(prompts))
    expected = case.gated(gate, prompts)
    assert close(case.run(apply_tgate(pipe, gate), prompts), expected)
    assert get_tgate_report(pipe).half_batch_forwards == 6 - gate


@pytest.mark.parametrize("gate", [1, thorough(2), GATE])
def test_several_forwards_a_step_are_refused(case, gate):
    class Tiles(Loop):
        def predict(self, i, x, t, texts, pooled, scale):
            left, right = x[..., :4], x[..., 4:]
            first = super().predict(i, left, t, [text.flip(1) for text in texts], pooled, scale)
            return torch.cat([first, super().predict(i, right, t, texts, pooled, scale)], -1)

    message = "a second time in step 1, where T-GATE expects one call in each step"
    refused(case, built(case.name, Tiles), message, gate_step=gate)


@pytest.mark.parametrize("gate", [thorough(1), GATE])
@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_what_runs_before_the_loop_is_no_step(case, gate, guided):
    class Inversion(Loop):
        tells_steps = False

        def before_loop(self, x, texts, pooled):
            for t in (1, 21):
                if guided:
                    self.denoise(torch.cat([x, x]) * 0.9, t, torch.cat(texts), pooled)
                else:
                    self.denoise(x * 0.9, t, texts[1], [None, pooled[1]])
            # Too late for whoever asks at the first forward.
            self._num_timesteps = len(self.scheduler.timesteps)

    pipe = apply_tgate(built(case.name, Inversion), gate)
    for steps in (8, 6, 8):
        expected = case.gated(gate, call={"num_inference_steps": steps})
        assert close(case.run(pipe, num_inference_steps=steps), expected)
        report = get_tgate_report(pipe)
        assert (report.num_inference_steps, report.half_batch_forwards) == (steps, steps - gate)


def test_steps_that_are_never_told_are_those_of_the_scheduler_unless_a_share_is_asked_for(case):
    class Untold(Loop):
        tells_steps = False

    pipe = built(case.name, Untold)
    assert close(case.run(apply_tgate(pipe, GATE)), case.gated(GATE))
    apply_tgate(pipe, 0.5)
    with pytest.raises(ValueError, match=r"gate_step=0.5 is a share of the steps, but the pipeline does not say"):
        case.run(pipe)


def test_a_loop_that_is_longer_than_it_says_is_refused(case):
    class Longer(Loop):
        more_steps = 3

    refused(case, built(case.name, Longer), "the loop goes on with step 6 after the 6 steps that the pipeline says")


def test_a_callback_that_does_not_come_every_step_is_refused(case):
    class Rare(Loop):
        callback_every = 2

    refused(
        case, built(case.name, Rare), "a second time in step 1.*callback_on_step_end does not come after every step"
    )


@pytest.mark.parametrize("gate", [1, GATE])
def test_a_callback_that_never_comes_leaves_the_plain_picture_and_says_so(case, gate, caplog):
    class Never(Loop):
        callback_every = 99

    pipe = built(case.name, Never)
    baseline = case.run(pipe)
    assert torch.equal(case.run(apply_tgate(pipe, gate)), baseline)
    (message,) = [record.message for record in caplog.records if record.name.startswith("tgate")]
    assert message.startswith("T-GATE: nothing was gated in this call of Never: its steps were not seen.")


def test_a_loop_that_starts_again_before_its_end_is_refused(case):
    class Again(Loop):
        def loop(self, texts, pooled, steps, scale, generator, callback):
            def half(pipe, index, timestep, tensors):
                return callback(pipe, index % 4, timestep, tensors)

            return super().loop(texts, pooled, steps, scale, generator, half if callback else None)

    refused(case, built(case.name, Again), "callback_on_step_end came with step 0 after step 3, where T-GATE expects")


def test_guidance_that_is_switched_on_after_the_gate_gets_a_full_step(case):
    """What was kept without guidance is of the conditional half alone."""

    class Switching(Loop):
        def loop(self, texts, pooled, steps, scale, generator, callback):
            return super().loop(texts, pooled, steps, 1.0, generator, callback)

        def predict(self, i, x, t, texts, pooled, scale):
            if self.do_classifier_free_guidance:
                return super().predict(i, x, t, texts, pooled, self._guidance_scale)
            return self.denoise(x, t, texts[1], [None, pooled[1]])

    def switch(pipe, index, timestep, tensors):
        pipe._guidance_scale = 5.0 if index >= 3 else 1.0
        return tensors

    pipe = apply_tgate(built(case.name, Switching), 2)
    batches = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    case.run(pipe, callback_on_step_end=switch)
    assert batches == [1, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("prompts", [[0], [0, 1]], ids=["one", "two"])
@pytest.mark.parametrize("end", [1, 2, 4], ids=["before_the_gate", "at_the_gate", "after_the_gate"])
def test_guidance_that_the_loop_ends_by_itself_is_refused(case, prompts, end):
    class Interval(Loop):
        def predict(self, i, x, t, texts, pooled, scale):
            if i < end:
                return super().predict(i, x, t, texts, pooled, scale)
            return self.denoise(x, t, texts[1], [None, pooled[1]])

    refused(case, built(case.name, Interval), "guidance of this pipeline is not two halves.*ends guidance by", prompts)


class Interleaved(Loop):
    """The batch [u0, c0, u1, c1]."""

    def predict(self, i, x, t, texts, pooled, scale):
        text = torch.stack(texts, 1).flatten(0, 1)
        pooled = [None, None if pooled[1] is None else torch.stack(pooled, 1).flatten(0, 1)]
        u, c = self.denoise(x.repeat_interleave(2, 0), t, text, pooled).unflatten(0, (-1, 2)).unbind(1)
        return u + scale * (c - u)


@pytest.mark.parametrize("gate", [thorough(1), GATE])
def test_halves_that_are_interleaved_are_refused_and_with_one_prompt_they_are_not(case, gate):
    message = "not two halves of one batch: the first and the second half of the 4 latents that Interleaved gives"
    refused(case, built(case.name, Interleaved), message, [0, 1], gate_step=gate)
    expected = case.gated(gate)
    assert close(case.run(apply_tgate(built(case.name, Interleaved), gate)), expected)


class Reversed(Loop):
    """The batch [conditional, unconditional]."""

    def predict(self, i, x, t, texts, pooled, scale):
        pooled = pooled[::-1] if pooled[1] is not None else pooled
        c, u = self.denoise(torch.cat([x, x]), t, torch.cat(texts[::-1]), pooled).chunk(2)
        return u + scale * (c - u)


@BOTH
@pytest.mark.parametrize("half", [None, "unconditional", "conditional"])
@pytest.mark.parametrize("gate", [thorough(1), GATE])
def test_halves_in_the_other_order_are_told_by_the_embeddings(case, half, gate):
    pipe = built(case.name, Reversed)
    expected = case.gated(gate, [0, 1], cfg_half=half)
    assert close(case.run(apply_tgate(pipe, gate, cfg_half=half), [0, 1]), expected)


@BOTH
@pytest.mark.parametrize("order", [Loop, Reversed])
def test_where_nobody_tells_the_order_it_is_refused_if_it_matters(case, order):
    class Silent(order):
        @torch.no_grad()
        def __call__(self, words=None, guidance_scale=5.0, callback_on_step_end=None, **kwargs):
            texts, pooled = words
            generator = torch.Generator().manual_seed(500)
            return self.loop(texts, pooled, 6, guidance_scale, generator, callback_on_step_end)

    inputs = case.inputs([0])
    texts = inputs["negative_prompt_embeds"], inputs["prompt_embeds"]
    pooled = inputs.get("negative_pooled_prompt_embeds"), inputs.get("pooled_prompt_embeds")
    pipe = built(case.name, Silent)
    baseline = pipe(words=(texts, pooled)).images
    apply_tgate(pipe, GATE)
    if case.name == "sd":
        # Nothing but the text differs between the halves, and of that the mean is kept.
        assert close(pipe(words=(texts, pooled)).images, case.gated(GATE))
        return
    with pytest.raises(ValueError, match=r"cannot tell which half .*matters for added_cond_kwargs.*encode_prompt"):
        pipe(words=(texts, pooled))
    assert torch.equal(remove_tgate(pipe)(words=(texts, pooled)).images, baseline)


class Streaming(Loop):
    """A call that is a generator, as previews are made."""

    def __call__(self, callback_on_step_end=None, **kwargs):
        yield "started"
        yield super().__call__(callback_on_step_end=callback_on_step_end, **kwargs).images
        return "ended"


def test_a_call_that_is_a_generator_is_gated(case):
    pipe = apply_tgate(built(case.name, Streaming), GATE)
    expected = case.gated(GATE)
    for _ in range(2):
        started, images = pipe(**case.inputs([0]))
        assert started == "started"
        assert close(images, expected)
    assert get_tgate_report(pipe).half_batch_forwards == 6 - GATE


def test_the_consumer_of_a_generator_may_call_another_pipeline_and_change_threads():
    case = BY_NAME["sd"]
    pipe = apply_tgate(built("sd", Streaming), GATE)
    sibling = type(case.build()).from_pipe(pipe)
    baseline = case.run(quiet(sibling))
    expected = case.gated(GATE)
    items, steps = [], pipe(**case.inputs([0]))
    for _ in range(2):
        thread = threading.Thread(target=lambda: items.append(next(steps)))
        thread.start()
        thread.join()
        assert torch.equal(case.run(sibling), baseline)
    assert close(items[1], expected)
    with pytest.raises(StopIteration, match="ended"):
        next(steps)


def test_a_generator_that_is_closed_or_broken_leaves_nothing():
    case = BY_NAME["sd"]
    pipe = apply_tgate(built("sd", Streaming), GATE)
    (_, expected) = pipe(**case.inputs([0]))
    steps = pipe(**case.inputs([0]))
    next(steps)
    with pytest.raises(RuntimeError, match="is running already"):
        next(pipe(**case.inputs([0])))
    steps.close()
    steps = pipe(**case.inputs([0]))
    next(steps)
    with pytest.raises(KeyError, match="thrown"):
        steps.throw(KeyError("thrown"))
    (_, images) = pipe(**case.inputs([0]))
    assert torch.equal(images, expected)


def test_an_asynchronous_call_is_refused():
    class Async(Loop):
        async def __call__(self, callback_on_step_end=None, **kwargs):
            return super().__call__(callback_on_step_end=callback_on_step_end, **kwargs)

    pipe = apply_tgate(built("sd", Async), GATE)
    with pytest.raises(ValueError, match="the call of Async is asynchronous"):
        pipe(**BY_NAME["sd"].inputs([0]))


class TestPixArt:
    """A pipeline without step callbacks: there the calls of the denoiser are counted."""

    case = BY_NAME["pixart_alpha"]

    def built(self, body):
        own = type("Own", (diffusers.PixArtAlphaPipeline,), body)
        return quiet(own(**self.case.build().components))

    def test_a_call_that_hands_on_is_gated(self):
        def __call__(self, *args, **kwargs):
            return diffusers.PixArtAlphaPipeline.__call__(self, *args, **kwargs)

        pipe = apply_tgate(self.built({"__call__": __call__}), GATE)
        for prompts in ([0], [0, 1]):
            assert torch.equal(self.case.run(pipe, prompts), self.case.gated(GATE, prompts))
            assert get_tgate_report(pipe).half_batch_forwards == 6 - GATE

    @pytest.mark.parametrize(
        ("parts", "message"), [(1, "batch of 1 for 1 latents"), (2, "call 0 should be for timestep .*, but is for 1.0")]
    )
    def test_calls_of_the_denoiser_that_are_no_steps_are_refused(self, parts, message):
        def __call__(self, *args, **kwargs):
            inputs = kwargs["prompt_embeds"]
            size = torch.tensor([[64.0, 64.0]]), torch.tensor([[1.0]])
            added = {"resolution": size[0], "aspect_ratio": size[1]}
            with torch.no_grad():
                sample, time = torch.zeros(parts, 4, 8, 8), torch.tensor([1] * parts)
                given = {name: value.repeat(parts, 1) for name, value in added.items()}
                self.transformer(sample, inputs.repeat(parts, 1, 1), time, added_cond_kwargs=given)
            return diffusers.PixArtAlphaPipeline.__call__(self, *args, **kwargs)

        pipe = self.built({"__call__": __call__})
        baseline = self.case.run(pipe)
        apply_tgate(pipe, GATE)
        with pytest.raises(ValueError, match=message):
            self.case.run(pipe)
        assert torch.equal(self.case.run(remove_tgate(pipe)), baseline)

    def test_without_a_word_on_guidance_it_is_refused(self):
        def __call__(self, *args, **kwargs):
            return diffusers.PixArtAlphaPipeline.__call__(self, *args, guidance_scale=4.5, **kwargs)

        pipe = apply_tgate(self.built({"__call__": __call__}), GATE)
        inputs = self.case.inputs([0])
        del inputs["guidance_scale"]
        with pytest.raises(ValueError, match="does not say whether it guides"):
            pipe(**inputs)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart_alpha"])
@pytest.mark.parametrize("official", [False, True])
def test_a_third_part_of_guidance_by_somebody_elses_hooks_is_refused(name, official):
    from diffusers.callbacks import PipelineCallback

    class Nothing(PipelineCallback):
        tensor_inputs = []  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert callback_kwargs == {}
            return callback_kwargs

    case = BY_NAME[name]

    def third(value, batch):
        if isinstance(value, dict):
            return {key: third(item, batch) for key, item in value.items()}
        whole = isinstance(value, torch.Tensor) and value.dim() and len(value) == batch
        return torch.cat([value, value[: batch // 2]]) if whole else value

    def before(module, args, kwargs):
        batch = len(args[0])
        return tuple(third(value, batch) for value in args), third(kwargs, batch)

    def after(module, args, output):
        u, c, other = output[0].chunk(3)
        return (torch.cat([u, c + 0.1 * (c - other)]),)

    pipe = case.build()
    getattr(pipe, case.denoiser).register_forward_pre_hook(before, with_kwargs=True)
    getattr(pipe, case.denoiser).register_forward_hook(after)
    given = {"callback_on_step_end": Nothing()} if official and case.has_callback else {}
    baseline = case.run(pipe, [0, 1], **given)
    with pytest.raises(ValueError, match=r"batch of 6 for 2 latents.*the guidance of this pipeline is not two halves"):
        case.run(apply_tgate(pipe, GATE), [0, 1], **given)
    assert torch.equal(case.run(remove_tgate(pipe), [0, 1], **given), baseline)


@pytest.mark.parametrize("gate", [2, 5])
def test_pictures_that_a_callback_takes_out_are_out(case, gate):
    """After the gate what is kept does not fit any more, so the next step is a full one."""

    def take_out(pipe, step, timestep, tensors):
        if step == 2:
            for name, tensor in tensors.items():
                tensors[name] = tensor[1:] if name == "latents" else tensor[1::2]
        return tensors

    names = ["latents", "prompt_embeds", *(["add_text_embeds", "add_time_ids"] if case.name == "sdxl" else [])]
    call = {"callback_on_step_end": take_out, "callback_on_step_end_tensor_inputs": names}
    pipe = case.build()
    plain = case.run(pipe, [0, 1], **call)
    assert len(plain) == 1
    batches = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    gated = case.run(apply_tgate(pipe, gate), [0, 1], **call)
    assert gated.shape == plain.shape
    assert batches == ([4, 4, 2, 2, 1, 1] if gate == 2 else [4, 4, 4, 2, 2, 1])
