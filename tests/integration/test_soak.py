"""Requests of every kind at the same time around one denoiser: each gets its own picture, and nothing is left."""

import copy
import itertools
import sys
import threading

import pytest
import torch

from tests.support.settings import apply_settings
from tests.support.states import state_of
from tests.zoo.case import quiet
from tests.zoo.catalogue import BY_NAME
from tgate_processors import get_tgate_report, remove_tgate

STEPS = {"num_inference_steps": 4}
PREDICTED = {"gate_step": 2, "guidance": "predict", "cfg_interval": 2}
DROPPED = {"gate_step": 2, "guidance": "drop"}
# With so many requests: those of a UNet take five times as long.
CASES = [
    (BY_NAME["sd"], {}, 90),
    (BY_NAME["sd3"], {"cross_attention": False}, 300),
    (BY_NAME["wan"], {"cross_attention": True}, 300),
]


class Cancelled(Exception):
    pass


def cancel(pipe, step, timestep, tensors):
    if step == 1:
        raise Cancelled
    return tensors


class Server:
    """One denoiser, and requests of every kind around it."""

    def __init__(self, case, more):
        self.case = case
        self.base = case.build()
        # diffusers notes things on a denoiser that is called for the first time.
        case.run(self.base, **STEPS)
        self.more = more
        self.right = {kind: self.alone(settings) for kind, settings in self.kinds.items()}
        self.before = state_of(self.base, case)
        self.gated = apply_settings(self.around(), **PREDICTED, **more)

    @property
    def kinds(self):
        return {"plain": None, "predicted": PREDICTED, "dropped": DROPPED}

    def around(self):
        """A pipeline of the shared parts."""
        parts = {**self.base.components, "scheduler": copy.deepcopy(self.base.scheduler)}
        more = {"requires_safety_checker": False} if "requires_safety_checker" in self.base.config else {}
        return quiet(type(self.base)(**parts, **more))

    def alone(self, settings):
        pipe = self.case.build()
        return self.case.run(pipe if settings is None else apply_settings(pipe, **settings, **self.more), **STEPS)

    def serve(self, number):
        """A request; gives what was wrong with it."""
        kind = ["plain", "predicted", "dropped", "copy", "cancelled", "failed"][number % 6]
        if kind == "copy":
            pipe = copy.copy(self.gated)
            pipe.scheduler = copy.deepcopy(self.gated.scheduler)
        else:
            pipe = self.around()
            if kind != "plain":
                apply_settings(pipe, **(PREDICTED if kind == "predicted" else DROPPED), **self.more)
        if kind == "cancelled":
            with pytest.raises(Cancelled):
                self.case.run(pipe, **STEPS, callback_on_step_end=cancel)
        elif kind == "failed":
            with pytest.raises(ValueError, match="divisible"):
                self.case.run(pipe, **{**STEPS, "height": 63})
        # Whoever was cancelled tries again.
        picture = self.case.run(pipe, **STEPS)
        right = self.right["predicted" if kind == "copy" else "dropped" if kind in ("cancelled", "failed") else kind]
        wrong = [] if torch.allclose(picture, right, atol=1e-4) else ["another picture"]
        if kind != "plain" and get_tgate_report(pipe).half_batch_forwards != (
            1 if kind in ("predicted", "copy") else 2
        ):
            wrong.append(f"report: {get_tgate_report(pipe)}")
        remove_tgate(pipe)
        return [f"request {number}, {kind}: {each}" for each in wrong]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "more", "requests"), CASES, ids=[case.name for case, *_ in CASES])
def test_requests_in_threads_get_their_own_pictures(case, more, requests):
    server, numbers, wrong = Server(case, more), itertools.count(), []

    def work():
        while (number := next(numbers)) < requests:
            try:
                wrong.extend(server.serve(number))
            except BaseException as error:
                wrong.append(f"request {number}: {type(error).__name__}: {error}")

    switched = sys.getswitchinterval()
    # Often, as races are of a few bytecodes.
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switched)
    assert not wrong, wrong[:5]
    remove_tgate(server.gated)
    assert state_of(server.base, case) == server.before
    assert torch.equal(case.run(server.base, **STEPS), server.right["plain"])
