"""The main job, end to end."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "quickstart.py"


def run(*arguments):
    # Rich and typer measure the terminal by these.
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_quickstart_draws_both_pictures_and_prints_what_they_cost(tmp_path):
    output = tmp_path / "pictures.png"
    done = run("--steps", "6", "--gate-step", "2", "--seeds", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "4 pictures, gate at step 2 of 6" in done.stdout
    plain, gated = (re.split(r"\s*[│|]\s*", line) for line in done.stdout.splitlines() if " T-GATE " in line)
    assert plain[1:2] == ["without T-GATE"]
    assert (plain[4], gated[4]) == ("6", "2 + 4 half")
    assert float(gated[2]) > 0
    assert float(gated[3]) > 0
    assert 0.5 * float(plain[5]) < float(gated[5]) < 0.75 * float(plain[5])
    picture = Image.open(output)
    assert picture.width > 300
    assert len(picture.convert("RGB").getcolors(10**6)) > 100


def test_prompts_and_a_folder_of_your_own(tmp_path):
    output = tmp_path / "pictures.png"
    model = str(ROOT / "examples" / "models" / "shapes-sd")
    prompt = "a red ring in the center on a cyan background"
    done = run(
        *("--model", model, "--prompt", prompt, "--steps", "3", "--gate-step", "0.4", "--seeds", "2"),
        *("--guidance-scale", "3", "--sp-interval", "2", "--dtype", "float32", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert "2 pictures, gate at step 1 of 3" in done.stdout
    assert output.exists()


def test_a_wrong_argument_is_an_error_message_and_no_traceback():
    done = run("--gate-step", "1.5")
    assert done.returncode == 2
    assert "gate_step=1.5 is not a share of the steps: give a number" in " ".join(
        re.sub(r"[│\s]+", " ", done.stderr).split()
    )
    assert "Traceback" not in done.stderr
