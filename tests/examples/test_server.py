"""The example of a server, started as it stands and asked by many at once: each gets the picture of a run alone."""

import collections
import http.client
import io
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
import torch
from PIL import Image

from examples.benchmarks.loading import load_pipeline
from tests.support.paths import ROOT
from tests.zoo.cross_attention import SHAPES
from tgate_processors import apply_tgate, get_tgate_report

pytest.importorskip("fastapi", reason="its dependency group is `server`")

MODEL = SHAPES.with_name("shapes-sd")
SMALL = {
    '"stabilityai/stable-diffusion-xl-base-1.0"': repr(str(MODEL)),
    'torch.float16, variant="fp16"': "torch.float32",
    '"cuda"': '"cpu"',
}
PROMPTS = [
    "a large red circle at the top left, on a white background",
    "a small yellow triangle in the centre, on a black background",
]
# Steps, and the plan if it is a fixed one.
KINDS = [(8, None), (8, "FFFF-FHF"), (10, None)]
REQUESTS, THREADS = 100, 8
# More steps than there is time for: every one of them has to be stopped.
ENDLESS = 100_000


@pytest.fixture
def address(tmp_path):
    """A server in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (ROOT / "examples" / "server.py").read_text()
    for real, small in {**SMALL, "port=8000": f"port={port}"}.items():
        assert real in code
        code = code.replace(real, small)
    script = tmp_path / "server.py"
    script.write_text(code)
    # Often, as races are of a few bytecodes.
    command = [
        sys.executable,
        "-c",
        f"import runpy, sys; sys.setswitchinterval(1e-5); runpy.run_path({str(script)!r}, run_name='__main__')",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield "127.0.0.1", port
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        server.terminate()
        server.wait(timeout=60)


def ask(address, **wanted):
    """Send a request; its connection."""
    connection = http.client.HTTPConnection(*address, timeout=300)
    connection.request("GET", f"/picture?{urllib.parse.urlencode(wanted)}")
    return connection


def answer(connection):
    """The picture and the plan of an answer."""
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 200, body
    with Image.open(io.BytesIO(body)) as picture:
        return np.asarray(picture).astype(int), response.headers["T-GATE-Plan"]


def alone(pipe, prompt, seed, steps, plan):
    """The same from a pipeline that draws nothing else."""
    apply_tgate(pipe, plan or "auto")
    call = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
    return np.asarray(pipe(prompt, **call).images[0]).astype(int), get_tgate_report(pipe).levels


@pytest.mark.slow
def test_a_hundred_requests_in_eight_threads_get_the_pictures_of_single_runs(address):
    pipe = load_pipeline(str(MODEL), "cpu", "float32")
    expected = {
        (prompt, seed, *kind): alone(pipe, prompt, seed, *kind)
        for prompt in PROMPTS
        for seed in (0, 1)
        for kind in KINDS
    }
    assert len({plan for _, plan in expected.values()}) > 3
    wishes, numbers, wrong, done = list(expected), itertools.count(), [], collections.Counter()

    def serve(number):
        if number % 8 == 3:
            connection = ask(address, prompt=PROMPTS[0], steps=ENDLESS)
            time.sleep(0.3)
            connection.close()
            done["cancelled"] += 1
            return
        prompt, seed, steps, plan = wish = wishes[number % len(wishes)]
        picture, taken = answer(ask(address, prompt=prompt, seed=seed, steps=steps, plan=plan or ""))
        right, levels = expected[wish]
        if taken != levels or abs(picture - right).max() > 1:
            wrong.append((number, wish, taken, abs(picture - right).max()))
        done["answered"] += 1

    def work():
        while (number := next(numbers)) < REQUESTS:
            try:
                serve(number)
            except BaseException as error:
                wrong.append((number, repr(error)))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    assert done == {"answered": 87, "cancelled": 13}

    response = (connection := ask(address, prompt=PROMPTS[0], steps=8, plan="FFF")).getresponse()
    assert (response.status, "8" in response.read().decode()) == (422, True)
    connection.close()
