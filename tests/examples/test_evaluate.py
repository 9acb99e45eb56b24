"""Quality and speed side by side: what is written, what survives a kill, what each method leaves behind."""

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from matplotlib.colors import to_rgb
from PIL import Image
from typer.testing import CliRunner

from examples.benchmarks import evaluate
from examples.benchmarks.evaluation.cutoff import cut_off
from examples.benchmarks.evaluation.drawing import Drawing, Table, denoiser_of
from examples.benchmarks.evaluation.methods import CHOICES, METHODS, Entry, Settings, entries
from examples.benchmarks.evaluation.metrics import drawn, frechet
from examples.benchmarks.evaluation.plots import LOOKS, SHEET, chosen_for_sheet, contact_sheet, front
from examples.benchmarks.evaluation.prompts import coco_captions, held_out_captions, scenes_of
from examples.benchmarks.evaluation.report import compare_with_caches, compare_with_fewer_steps
from examples.benchmarks.evaluation.store import Shelf
from examples.testbeds.shapes import learning, networks
from examples.testbeds.shapes.evaluation import call_options
from examples.testbeds.shapes.tokens import load as load_tokenizer
from examples.testbeds.shapes.tokens import make
from tests.support.paths import ROOT
from tests.support.testbeds import NEEDS_WAN, THOROUGH_WAN
from tests.zoo.core import CASES
from tgate_processors import TGateSchedule, estimate_cost

MODEL = ROOT / "examples" / "models" / "shapes-sd"
WAN = MODEL.with_name("shapes-wan")
APP = typer.Typer()
APP.command()(evaluate.main)
SCRIPT = ("-m", "examples.benchmarks.evaluate")
SHORT = ["--model", str(MODEL), "--steps", "3", "--gate-step", "10", "--tuned-gate", "10", "--batch-size", "1"]
SHORT += ["--device", "cpu", "--count", "4"]
SOME = ["--method", "baseline", "--method", "tgate", "--method", "cutoff"]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "80",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": str(ROOT),
}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SCRIPT]


def run(output, *arguments, command=(sys.executable, *SCRIPT)):
    command = [*command, *SHORT, "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def refused(output, *arguments):
    """What a run says that does not begin; in this process, as it takes no time."""
    done = CliRunner().invoke(APP, [*SHORT, "--output", str(output), *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    return " ".join(re.sub(r"[│\s]+", " ", done.output).split())


def pictures(output):
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("pictures/*.png")}


def table_of(output):
    """The results, without what a clock says."""
    rows = json.loads((output / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in ("seconds", "ratio")} for row in rows]


def start_and_kill(command, output, after, kill):
    """Start a run, and kill it when `after` pictures are there and not yet all; give its exit status."""
    while True:
        running = subprocess.Popen(
            [*command, *SHORT, *SOME, "--output", str(output)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while running.poll() is None and len(list(output.rglob("pictures/*.png"))) < after:
            time.sleep(0.005)
        if running.poll() is None:
            kill(running)
        status = running.wait()
        if len(pictures(output)) < 12:
            return status
        # On a busy machine the kill may come too late.
        shutil.rmtree(output)


def kill_last_child(running):
    """One of the processes that a launcher has started, if there is one still."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        psutil.Process(running.pid).children()[-1].kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing breaks off."""
    output = tmp_path_factory.mktemp("whole")
    arguments = [*SHORT, "--output", str(output), *SOME, "--method", "fewer-steps", "--method", "cache-dit"]
    done = CliRunner().invoke(APP, arguments, env=ENVIRONMENT)
    assert done.exit_code == 0, done.output
    return output, done.output


def test_a_run_writes_tables_and_pictures(whole):
    output, printed = whole
    results = json.loads((output / "results.json").read_text())
    rows = {row["row"]: row for row in results["rows"]}
    assert list(rows) == ["baseline", "tgate-1", "cutoff-1", "2-steps", "cache-dit"]
    assert len(list(csv.DictReader((output / "results.csv").read_text().splitlines()))) == len(rows)
    for name in ("baseline", "tgate-1", "cutoff-1", "2-steps"):
        assert rows[name]["pictures"] == 4
        assert rows[name]["seconds"] > 0
        assert 0 <= rows[name]["accuracy"] <= 1
        assert name in printed
    assert "…" not in printed
    # The page has every figure that is printed, and each is printed whole.
    page = (output / "results.md").read_text()
    figures = re.findall(r"\d+\.\d+", "".join(line for line in page.splitlines() if line.startswith("| `")))
    assert len(figures) > 20
    assert sorted(figures) == sorted(re.findall(r"(?<= )\d+\.\d+(?= )", "".join(re.findall(r"│.*│|\|.*\|", printed))))
    assert rows["baseline"]["ratio"] == 1
    assert rows["baseline"]["psnr"] is None
    assert rows["tgate-1"]["macs"] < rows["cutoff-1"]["macs"] == rows["2-steps"]["macs"] < rows["baseline"]["macs"]
    assert 5 < rows["tgate-1"]["psnr"] < 60
    for name in ("pareto.png", "sheet-0.png"):
        assert len(Image.open(output / name).convert("RGB").getcolors(10**6)) > 50
    assert len(pictures(output)) == 16


def test_what_is_missing_is_a_sentence_and_an_empty_column(whole):
    results = json.loads((whole[0] / "results.json").read_text())
    rows, notes = results["rows"], " ".join(results["notes"])
    assert rows[-1]["error"] == "works on a transformer"
    assert "cache-dit" in notes
    for column, sentence in (
        ("peak_bytes", "Peak memory was not measured"),
        ("fid_real", "FID against real pictures was not measured: pass their folder with --real"),
        ("clip_score", None),
    ):
        assert all(row[column] is None for row in rows)
        assert sentence is None or sentence in notes
    for column, name in (("fid_baseline", "FID"), ("lpips", "LPIPS")):
        missing = all(row[column] is None for row in rows)
        assert missing == (f"{name} was not measured: " in notes)


def test_the_macs_are_those_of_the_estimate(whole):
    rows = {row["row"]: row for row in table_of(whole[0])}
    pipe = load()
    cost = estimate_cost(pipe, TGateSchedule(1), 3)
    assert rows["baseline"]["macs"] == cost.without_tgate.layers
    assert rows["tgate-1"]["macs"] == cost.with_tgate.layers


# Two processes do so in CI.
@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_that_is_killed_goes_on_where_it_stopped(tmp_path, whole):
    start_and_kill([sys.executable, *SCRIPT], tmp_path, 4, subprocess.Popen.kill)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("pictures/*.png")}
    assert 4 <= len(before) < 12
    half = next(iter(before)).with_name("00003.png.1.part")
    half.write_bytes(b"\x89PNG half a pic")
    done = run(tmp_path, *SOME)
    assert done.returncode == 0, done.stderr
    assert not half.exists()
    assert all(file.stat().st_mtime_ns == changed for file, changed in before.items())
    expected = {name: content for name, content in pictures(whole[0]).items() if "-steps" not in name.split("/")[2]}
    assert pictures(tmp_path) == expected
    assert table_of(tmp_path) == [row for row in table_of(whole[0]) if row["method"] in SOME]


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_and_one_may_be_killed(tmp_path, whole):
    assert start_and_kill(LAUNCH, tmp_path, 2, kill_last_child) != 0
    assert len(pictures(tmp_path)) < 12
    done = run(tmp_path, *SOME, command=LAUNCH)
    assert done.returncode == 0, done.stderr
    # There are two, and one of them reports.
    assert json.loads((tmp_path / "results.json").read_text())["processes"] == 2
    assert done.stdout.count("Results: ") == 1
    expected = {name: content for name, content in pictures(whole[0]).items() if "-steps" not in name.split("/")[2]}
    assert pictures(tmp_path) == expected
    assert table_of(tmp_path) == [row for row in table_of(whole[0]) if row["method"] in SOME]
    blocks = [file.name.split("-")[0] for file in tmp_path.rglob("tgate-1/timings/*.json")]
    assert sorted(blocks) == ["00000", "00001", "00002", "00003"]


@pytest.mark.slow
def test_captions_of_coco_with_the_testbed_in_place_of_the_weights(tmp_path):
    captions = held_out_captions(4)
    annotations = [{"id": i, "image_id": 10 - i // 2, "caption": f" {captions[i // 2]} "} for i in range(8)]
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    assert coco_captions(json.loads(file.read_text())) == captions[::-1]
    real = tmp_path / "val2014"
    real.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(real / f"{i}.png")
    output = tmp_path / "run"
    arguments = ["--captions", str(file), "--real", str(real), "--count", "2", "--method", "tgate"]
    done = run(output, *arguments, "--method", "baseline")
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["guidance_scale"] is None
    assert [row["pictures"] for row in results["rows"]] == [2, 2]
    assert "pass their folder with --real" not in " ".join(results["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "teacache"], "method='teacache' is unknown: pass one of baseline, fewer-steps, cutoff,"),
        (["--scheduler", "heun"], "scheduler='heun' is unknown: pass one of dpm, ddim, euler"),
        (["--captions", "nowhere.json"], "captions='nowhere.json' is not a file: pass 'shapes', 'clips', COCO's"),
        (["--captions", str(MODEL / "model_index.json")], "is not in COCO's format"),
        (["--captions", "clips", "--count", "382"], "count=382, but captions='clips' has 381: pass at most as many"),
        (["--count", "2000"], "count=2000, but captions='shapes' has 1147: pass at most as many"),
        (["--output", __file__], "is a file: pass a folder"),
    ],
)
def test_wrong_arguments_are_named_with_a_remedy(tmp_path, arguments, message):
    done = refused(tmp_path / "run", *arguments)
    assert message in done
    assert "Traceback" not in done


@NEEDS_WAN
def test_a_flow_takes_schedulers_of_flows():
    assert type(evaluate.load(str(WAN), "euler", torch.device("cpu"), "float32").scheduler).__name__.startswith("Flow")
    with pytest.raises(typer.BadParameter, match=r"scheduler='ddim' does not step .* pass one of dpm, euler, unipc"):
        evaluate.load(str(WAN), "ddim", torch.device("cpu"), "float32")


def test_going_on_with_other_settings_is_refused(tmp_path, whole):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(whole[0] / "settings.json", output)
    assert "seed=7, but the run in" in refused(output, "--seed", "7")


def load():
    pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def pixart():
    """Untrained, but it reads prompts."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make("pixart", held_out_captions(20), Path(folder))
        tokenizer = load_tokenizer("pixart", Path(folder))
    parts = learning.conditioned("pixart", tokenizer)
    pipe = networks.pipeline(networks.autoencoder(), parts.text_encoder, parts.denoiser, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def wan():
    """Two calls of the denoiser in a step."""
    return evaluate.load(str(WAN), "dpm", torch.device("cpu"), "float32")


def drawing_of(pipe, folder, methods, captions):
    call = {"guidance_scale": 3.0, "output_type": "np"} | call_options(pipe)
    table = Table("model", "dpm", 6, tuple(entries(methods, 6, Settings((3,), (3,), (2,), (0.2,)))), folder)
    drawing = Drawing(table, captions, 2, 0)
    drawing.prepare(pipe, call)
    return drawing


@pytest.mark.parametrize(
    "build",
    [load, pytest.param(pixart, marks=THOROUGH_WAN), pytest.param(wan, marks=THOROUGH_WAN)],
    ids=["unet", "transformer", "two-calls"],
)
@pytest.mark.slow
def test_after_every_method_the_baseline_is_what_it_was(tmp_path, build):
    pipe = build()
    drawing = drawing_of(pipe, tmp_path, CHOICES, held_out_captions(2))
    fresh = drawing_of(build(), tmp_path / "fresh", ["baseline"], held_out_captions(2))
    baseline = fresh.draw(drawing.table.entries[0], range(2))
    denoiser = denoiser_of(pipe)
    ran = [entry for entry in drawing.table.entries if entry not in drawing.failed]
    assert {"baseline", "tgate", "tgate-v2", "cutoff", "fewer-steps", "predict", "auto"} <= {e.method for e in ran}
    probes = {entry.method: drawing.table.shelf(entry).probe for entry in ran}
    if build is wan:
        # The gate is at half of the steps, and halves what a step takes. As published, cross-attention stops as well.
        assert probes["cutoff"]["macs"] == probes["baseline"]["macs"] * 3 / 4 > probes["tgate"]["macs"]
        assert probes["baseline"]["macs"] / 2 < probes["auto"]["macs"] <= probes["baseline"]["macs"]
    else:
        assert probes["auto"]["full"] * drawing.table.steps == probes["baseline"]["macs"]
    for entry in ran:
        assert (drawing.draw(drawing.table.entries[0], range(2)) == baseline).all(), entry
        other = drawing.draw(entry, range(2))
        assert other.shape == baseline.shape
        assert entry.method != "tgate" or (other != baseline).any()
    assert (drawing.draw(drawing.table.entries[0], range(2)) == baseline).all()
    for name, module in denoiser.named_modules():
        assert module.forward.__func__ is type(module).forward, name


@pytest.mark.parametrize(
    "build", [load, pixart, pytest.param(wan, marks=THOROUGH_WAN)], ids=["unet", "transformer", "two-calls"]
)
def test_the_cutoff_of_a_batch_is_that_of_its_prompts_alone(tmp_path, build):
    pipe = build()
    captions = held_out_captions(2)
    drawing = drawing_of(pipe, tmp_path, ["baseline", "cutoff"], captions)
    baseline, cutoff = drawing.table.entries
    both = torch.from_numpy(drawing.draw(cutoff, range(2)))
    alone = torch.from_numpy(drawing.draw(cutoff, [0])), torch.from_numpy(drawing.draw(cutoff, [1]))
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)
    assert (both.numpy() != drawing.draw(baseline, range(2))).any()


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart_alpha"])
def test_the_cutoff_of_a_batch_of_every_family(name):
    (case,) = (case for case in CASES if case.name == name)
    pipe = case.build()

    def drawn(*prompts):
        with cut_off(pipe, 2) as options:
            return case.run(pipe, list(prompts), **options)

    torch.testing.assert_close(drawn(0, 1), torch.cat([drawn(0), drawn(1)]), atol=1e-4, rtol=1e-4)
    assert not torch.equal(drawn(0, 1), case.run(pipe, [0, 1]))


def test_the_cutoff_takes_the_conditional_half_and_guides_as_often_as_the_gate_says():
    pipe = load()
    batches = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    with cut_off(pipe, 2) as options:
        pipe(["a", "b"], num_inference_steps=5, guidance_scale=3.0, output_type="latent", **options)
    handle.remove()
    assert batches == [4, 4, 2, 2, 2]


def test_the_rows_of_a_table():
    settings = Settings((5, 10, 25), (10,), (3, 5), (0.2,))
    rows = entries(["fewer-steps", "tgate", "tgate-v2", "deepcache", "predict", "auto"], 25, settings, 100)
    names = "baseline 15-steps 17-steps tgate-5 tgate-10 tgate-v2-10 deepcache predict-10-3 predict-10-5 auto-0.2"
    assert [row.name for row in rows] == [*names.split(), "100-steps"]
    assert rows[-1].method == "reference"


def test_caches_have_rows_for_each_of_their_settings():
    settings = Settings((10,), (10,), (), (0.6,), (2, 3), (0.1,))
    rows = entries(["deepcache", "deepcache-auto", "taylorseer-auto", "first-block-cache", "tome"], 25, settings)
    names = "deepcache-2 deepcache-3 deepcache-auto-2-0.6 deepcache-auto-3-0.6 taylorseer-auto-2-0.6"
    assert [row.name for row in rows] == [
        "baseline",
        *names.split(),
        "taylorseer-auto-3-0.6",
        "first-block-cache-0.1",
        "tome",
    ]


def test_a_cache_with_tgate_is_compared_with_that_cache_alone():
    rows = [
        {"method": method, "macs": macs, "psnr_reference": value, "ahead_of_cache": None}
        for method, macs, value in (
            ("baseline", 10.0, 40.0),
            ("taylorseer", 4.0, 34.0),
            ("deepcache", 6.0, 39.0),
            ("taylorseer-auto", 6.0, 37.0),
            ("taylorseer-auto", 3.0, 37.0),
            ("auto", 6.0, 37.0),
        )
    ]
    compare_with_caches(rows)
    assert [row["ahead_of_cache"] for row in rows] == [None, None, None, pytest.approx(1.0), None, None]


def test_rows_are_compared_with_fewer_steps_at_their_macs():
    plain = [{"method": "fewer-steps", "macs": 10.0 * n, "psnr_reference": 20.0 + n, "ahead": None} for n in (4, 2, 8)]
    ours = [
        {"method": "auto", "macs": macs, "psnr_reference": value, "ahead": None}
        for macs, value in ((30.0, 26.0), (60.0, 25.0), (90.0, 40.0), (40.0, None))
    ]
    compare_with_fewer_steps([*plain, *ours])
    # 23 and 26 lie between; 90 is dearer than any plain run.
    assert [row["ahead"] for row in ours] == [pytest.approx(3.0), pytest.approx(-1.0), None, None]
    assert [row["ahead"] for row in plain] == [0, 0, 0]


@pytest.mark.slow
def test_a_run_with_a_reference(tmp_path):
    methods = ["--method", "auto", "--method", "forecast", "--method", "predict"]
    more = ["--steps", "5", *methods, "--tolerance", "2", "--reference-steps", "8"]
    done = run(tmp_path, *more)
    assert done.returncode == 0, done.stderr
    rows = {(row["steps"], row["row"]): row for row in table_of(tmp_path)}
    names = {
        3: ["baseline", "auto-2", "forecast-2", "predict-1-3", "8-steps"],
        5: ["baseline", "auto-2", "forecast-2", "predict-2-3", "8-steps"],
    }
    assert list(rows) == [(steps, name) for steps, each in names.items() for name in each]
    assert rows[5, "baseline"]["psnr_reference"] > rows[3, "baseline"]["psnr_reference"] > 10
    # Both tables have one.
    assert len(list(tmp_path.rglob("dpm-reference-8/pictures/*.png"))) == 4
    # The fourth step is a half one, or a forecast one.
    for method, forecast in (("auto-2", False), ("forecast-2", True)):
        cost = estimate_cost(load(), TGateSchedule("auto", forecast=forecast), 5)
        assert rows[5, method]["macs"] == cost.with_tgate.layers
    assert rows[5, "baseline"]["ahead"] == 0
    assert -20 < rows[5, "auto-2"]["ahead"] < 20
    assert len(Image.open(tmp_path / "reference.png").convert("RGB").getcolors(10**6)) > 50


def test_the_front_has_what_nothing_else_beats():
    points = [(1.0, 1.0), (1.5, 0.9), (1.4, 0.8), (2.0, 0.9), (2.5, 0.2)]
    assert front(points) == [(2.5, 0.2), (2.0, 0.9), (1.0, 1.0)]


def test_each_method_has_a_colour_and_a_marker_of_its_own_that_can_be_told_in_grey():
    assert set(LOOKS) == set(METHODS)
    assert set(SHEET) <= set(METHODS)
    markers, colours = zip(*LOOKS.values(), strict=True)
    assert len(set(markers)) == len(markers)
    assert len({to_rgb(colour) for colour in colours}) == len(colours)
    # On white, also where nobody sees colours.
    greys = [0.3 * red + 0.59 * green + 0.11 * blue for red, green, blue in map(to_rgb, colours)]
    assert max(greys) < 0.7


def test_the_sheet_frames_in_red_what_is_not_what_the_prompt_says(tmp_path):
    captions = held_out_captions(3)
    table = Table("model", "dpm", 12, tuple(entries(["fewer-steps", "tgate"], 12, Settings((4, 6, 8)))), tmp_path)
    scenes = scenes_of(captions)
    tgate = [entry for entry in table.entries if entry.method == "tgate"]
    for entry in table.entries:
        shelf = table.shelf(entry)
        shelf.make()
        # The picture of the next prompt is the wrong one.
        shown = scenes[1:] + scenes[:1] if entry in tgate else scenes
        for index, picture in enumerate(drawn(shown, 0)):
            Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(shelf.picture(index))
    contact_sheet(table, captions, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.width == 800
    red = np.argwhere((np.asarray(sheet) == (255, 0, 0)).all(-1))
    # Three columns of six: the baseline, fewer steps and T-GATE, with the middle one of three gates.
    assert [entry.name for entry in chosen_for_sheet(list(table.entries))] == ["baseline", "9-steps", "tgate-6"]
    assert 2 / 6 * 800 - 5 < red[:, 1].min() < red[:, 1].max() < 3 / 6 * 800 + 5
    assert len(red) > 3 * 4 * 100


def test_blocks_are_counted_when_their_pictures_are_whole(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.make()
    shelf.picture(0).with_name("00000.png.77.part").write_bytes(b"half")
    assert not shelf.complete(1)
    assert not shelf.done(0)
    shelf.add(0, "here", [0], [Image.new("RGB", (2, 2))], {"seconds": 1.0, "pictures": 1})
    assert shelf.complete(1)
    assert shelf.done(0)
    assert shelf.lines() == {(0, "here"): {"seconds": 1.0, "pictures": 1}}


def test_the_frechet_distance_of_two_normal_distributions():
    numbers = torch.Generator().manual_seed(0)
    one = torch.randn(20000, 3, generator=numbers)
    other = 2 * torch.randn(20000, 3, generator=numbers) + 1
    # Means differ by 1 in each of three places, deviations by 1.
    assert frechet(one, other) == pytest.approx(6.0, rel=0.05)
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-6)
    assert frechet(one[:2], one[:2]) == pytest.approx(0.0, abs=1e-6)
    assert Entry("tgate", 25, 5).name == "tgate-5"
