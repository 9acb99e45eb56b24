"""Ctrl-C or too little memory at any line of ours: the pipeline works, and what was put in can be taken out again."""

import collections
import contextlib
import sys
from pathlib import Path

import pytest
import torch

import tgate_processors
from tests.support.settings import apply_settings
from tests.support.states import state_of
from tests.zoo.case import slow, thorough
from tests.zoo.catalogue import BY_NAME
from tgate_processors import remove_tgate
from tgate_processors._internal.denoiser import lock

# Where interrupts come: our own lines, and those of what runs our context managers.
OURS = str(Path(tgate_processors.__file__).parent)
WATCHED = (OURS, contextlib.__file__)
DENSE = ("api", "install/pipeline", "install/inst", "install/cleanup", "denoiser/lock")
DENSE = tuple(f"{OURS}/_internal/{name}" for name in DENSE)
SPARSE = 40

SETTINGS = {
    "sd": {"gate_step": 2, "guidance": "predict", "cfg_interval": 2},
    "pixart_alpha": {"gate_step": 2, "guidance": "predict", "cfg_interval": 2},
    "sd_controlnet": {"gate_step": 2},
    "sd3": {"gate_step": "auto", "tolerance": 2.0, "cross_attention": False},
    "sd, planned": {"gate_step": "F-FH"},
    "wan": {"gate_step": 2, "guidance": "predict", "cfg_interval": 2, "cross_attention": True},
}
STEPS = {"num_inference_steps": 4}


def tracing(at_line):
    """A trace function that tells of every line of ours."""

    def trace(frame, event, arg):
        return line if frame.f_code.co_filename.startswith(WATCHED) else None

    def line(frame, event, arg):
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return line

    return trace


def traced(act, at_line):
    """Run something, and tell of every line of ours."""
    before = sys.gettrace()
    # No context manager: it would be traced too.
    sys.settrace(tracing(at_line))
    try:
        act()
    finally:
        sys.settrace(before)


def counts(act):
    """How often each line runs."""
    seen = collections.Counter()
    traced(act, lambda point: seen.update([point]))
    return seen


def interrupt(act, point, occurrence, error):
    """Run something, with an interrupt at one line, and give the error."""
    left = [occurrence]

    def at_line(now):
        if now == point:
            left[0] -= 1
            if left[0] == 0:
                raise error

    try:
        traced(act, at_line)
    except error as caught:
        return caught
    return None


def points_of(act, every, last):
    """Some of the lines that run, all of those that put in and take out, each the first time, or the last time."""
    seen = list(counts(act).items())
    dense = every < SPARSE
    chosen = [each for n, each in enumerate(seen) if n % every == 0 or (dense and each[0][0].startswith(DENSE))]
    return [(point, number if last else 1) for point, number in chosen]


class Sweep:
    """A pipeline that is interrupted again and again."""

    def __init__(self, name):
        self.case = BY_NAME[name.split(",")[0]]
        self.settings = SETTINGS[name]
        self.pipe = self.case.build()
        self.plain = self.run()
        self.before = state_of(self.pipe, self.case)
        self.right = [self.plain, self.run_gated(self.settings), self.run_gated(self.others)]

    def run(self):
        return self.case.run(self.pipe, **STEPS)

    @property
    def others(self):
        """Other settings, to apply again with."""
        return {"gate_step": 3, "cross_attention": self.settings.get("cross_attention")}

    def run_gated(self, settings):
        apply_settings(self.pipe, **settings)
        try:
            return self.run()
        finally:
            remove_tgate(self.pipe)

    def apply(self):
        apply_settings(self.pipe, **self.settings)

    def works(self):
        """The pipeline is gated or plain, and nothing between."""
        output = self.run()
        return any(torch.equal(output, right) for right in self.right)

    def restored(self):
        remove_tgate(self.pipe)
        return state_of(self.pipe, self.case) == self.before

    def bad(self, prepare, act, every, last, error):
        """The points after which something is wrong."""
        prepare()
        points, wrong = points_of(act, every, last), []
        remove_tgate(self.pipe)
        for point, occurrence in points:
            prepare()
            # Held, as an interactive session holds the last error: so nothing goes by the garbage collector.
            _caught = interrupt(act, point, occurrence, error)
            if lock._lock._is_owned():
                wrong.append((*point, "others are locked out"))
            if not self.works():
                wrong.append((*point, "another picture"))
            if not self.restored():
                wrong.append((*point, "not restored"))
        return wrong


def sweep(name, every, last=False, error=KeyboardInterrupt):
    here = Sweep(name)
    acts = [
        (lambda: None, here.apply),
        (here.apply, lambda: apply_settings(here.pipe, **here.others)),
        (here.apply, lambda: remove_tgate(here.pipe)),
        (here.apply, here.run),
    ]
    return [wrong for prepare, act in acts for wrong in here.bad(prepare, act, every, last, error)]


@pytest.mark.parametrize(
    ("name", "every", "last", "error"),
    [
        ("sd3", SPARSE, False, KeyboardInterrupt),
        slow("pixart_alpha", 24, False, KeyboardInterrupt),
        slow("wan", 12, False, KeyboardInterrupt),
        slow("sd, planned", 45, False, KeyboardInterrupt),
        slow("sd3", 18, True, MemoryError),
        *(
            thorough(name, 1, last, error)
            for name in SETTINGS
            for last, error in ((False, KeyboardInterrupt), (True, MemoryError))
        ),
    ],
)
def test_an_interrupt_at_any_line_leaves_a_pipeline_that_works_and_can_be_restored(name, every, last, error):
    assert not sweep(name, every, last, error)
