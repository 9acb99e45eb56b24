"""T-GATE and its rivals against the best plain run: what is compared with what, what a run costs, what is kept."""

import json
import math

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from examples.benchmarks import yardstick
from examples.benchmarks.evaluation.cells import Cell, arguments
from examples.benchmarks.evaluation.front import at_cost, compare, contenders, front, refused, summary, table
from examples.benchmarks.evaluation.macs import counted_layers
from examples.benchmarks.evaluation.rivals import RIVALS, Alternate, Held, Interval, Reuse
from examples.benchmarks.evaluation.solvers import (
    BY_HAND,
    FLOW_SOLVERS,
    SOLVERS,
    own_spacing,
    scheduler_for,
    solvers_of,
    spacings_of,
)

APP = typer.Typer()
APP.command()(yardstick.main)
SHORT = ["--captions", "2", "--reference-steps", "8", "--plain-solver", "unipc", "--plain-steps", "3"]
SHORT += ["--plain-steps", "5", "--solver", "unipc", "--steps", "5", "--rival", "interval"]
CLIPS = ["--model", str(yardstick.MODELS / "shapes-wan"), "--prompts", "clips", "--rival", "none"]
# Schedulers with a betas' configuration and with a flow's.
SHAPES = diffusers.DDIMScheduler(timestep_spacing="trailing").config
WAN = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.5)
needs_wan = pytest.mark.skipif(not hasattr(diffusers, "WanPipeline"), reason="this diffusers has no Wan")


def run(output, *options):
    return CliRunner().invoke(APP, [*SHORT, "--output", str(output), *options], env={"COLUMNS": "200"})


def made_up(run, steps, psnr, cost=None, method="plain", setting="", right=1.0):
    """A cell of one caption."""
    solver, spacing = run.split()
    figures = {"cost": [cost or steps], "full": [1], "half": [2], "forecast": [3], "psnr": [psnr], "right": [right]}
    kind = "by hand" if spacing.startswith("ends") else "offered"
    names = {"solver": solver, "spacing": spacing, "kind": kind, "steps": steps, "method": method, "setting": setting}
    return names | figures


PLAIN = table(
    [
        made_up("dpm-2 even", 8, 30.0),
        made_up("unipc even", 8, 32.0, right=0.5),
        made_up("unipc even", 10, 40.0),
        made_up("dpm-2 even", 10, 38.0),
        # More steps that are no better.
        made_up("dpm-2 even", 12, 39.0),
        made_up("dpm-2 even", 14, 44.0),
        made_up("dpm-2 ends-1", 8, 50.0),
        made_up("dpm-2 ends-1", 14, 56.0),
        {"solver": "unipc", "spacing": "karras", "error": "AssertionError:"},
    ]
)


def test_the_front_has_the_best_of_each_kind_and_nothing_that_costs_more_in_vain():
    assert list(front(PLAIN, "offered").run + front(PLAIN, "offered").steps.map(" {}".format)) == [
        "unipc even 8",
        "unipc even 10",
        "dpm-2 even 14",
    ]
    assert list(front(PLAIN, "by hand").psnr) == [50.0, 56.0]
    assert contenders(PLAIN, 2).groupby("kind").size().to_dict() == {"offered": 6, "by hand": 2}


@pytest.mark.parametrize(
    ("cost", "expected", "name"),
    [
        (8, 32.0, "unipc even 8"),
        (8.5, 34.0, "unipc even 8"),
        (9.5, 38.0, "unipc even 10"),
        # Not by way of the run that is no better.
        (12, 42.0, "unipc even 10"),
        (13.5, 43.5, "dpm-2 even 14"),
        # Plain runs that cost more were drawn, and none was better.
        (15, 44.0, "dpm-2 even 14"),
        (7.9, math.nan, ""),
        (16.1, math.nan, ""),
    ],
)
def test_between_two_costs_the_front_is_a_straight_line_and_beyond_them_nothing(cost, expected, name):
    assert at_cost(front(PLAIN, "offered"), cost, 16) == (pytest.approx(expected, nan_ok=True), name)


def test_a_run_is_compared_at_its_cost_and_with_as_many_steps_of_its_own_solver():
    rows = table(
        [
            made_up("unipc even", 10, 39.0, 9.0, "tgate", right=0.75),
            made_up("dpm-2 even", 14, 47.0, 8.0, "tgate", right=0.75),
            made_up("dpm-2 ends-1", 14, 55.5, 11.0, "tgate"),
        ]
    )
    found = compare(rows, PLAIN)
    assert list(found["ahead of offered"]) == [3.0, 15.0, 14.5]
    assert list(found["best offered"]) == ["unipc even 8", "unipc even 8", "unipc even 10"]
    assert list(found["ahead of by hand"]) == [-12.0, -3.0, 2.5]
    assert list(found["ahead of as many"]) == [-1.0, 3.0, -0.5]
    assert list(found["right, as many"]) == [1.0, 1.0, 1.0]
    first, second = summary(found).to_dict("records")
    assert (first["method"], first["runs"], first["times fewer"]) == ("tgate", 2, (10 / 9 + 14 / 8) / 2)
    assert (first["offered, mean"], first["offered, least"], first["by hand, least"]) == (9.0, 3.0, -12.0)
    assert (first["as many, mean"], first["as many, least"], first["right lost, most"]) == (1.0, -1.0, 0.25)
    assert (second["spacing"], second["runs"], second["by hand, mean"]) == ("ends-1", 1, 2.5)


def test_what_no_run_was_possible_with_is_named():
    failed = {"error": "IndexError: 8"}
    names = [("unipc", "karras"), ("unipc", "even"), ("unipc", "even")]
    cells = [{"solver": solver, "spacing": spacing} for solver, spacing in names]
    assert refused([cells[0] | failed, cells[1] | failed, cells[2]]) == {"unipc karras": "IndexError: 8"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    captions, folder = yardstick.read_captions("shapes", 2), tmp_path_factory.mktemp("bench")
    return yardstick.load_bench(yardstick.MODELS / "shapes-sd", "cpu", captions, 7.0, 0, folder)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_takes_as_many_times_as_steps_whoever_places_them(bench, solver):
    for spacing in spacings_of(bench.config, solver):
        scheduler = scheduler_for(bench.config, solver, spacing)
        scheduler.set_timesteps(7)
        assert len(scheduler.timesteps) == 7, spacing
        if spacing in BY_HAND:
            times = scheduler.timesteps
            known = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
            assert times[0] == 999
            torch.testing.assert_close(scheduler.sigmas[:-1], known[times.long()], rtol=1e-4, atol=1e-4)
            gaps = np.diff(times.numpy().astype(int))
            # The widest gap is in the middle.
            assert gaps.max() < 0
            assert 1 < np.argmin(gaps) < 4
    assert (solver == "ddim") == (not set(spacings_of(bench.config, solver)) & set(BY_HAND))
    assert own_spacing(bench.config) == "trailing"
    assert solvers_of(bench.config) is SOLVERS


@pytest.mark.parametrize("config", [diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5).config, WAN.config])
@pytest.mark.parametrize("solver", FLOW_SOLVERS)
def test_with_a_flow_sigmas_are_shares_of_noise(config, solver):
    assert solvers_of(config) is FLOW_SOLVERS
    assert own_spacing(config) == "shift-1.5"
    ends, firsts = {}, {}
    for spacing in spacings_of(config, solver):
        scheduler = scheduler_for(config, solver, spacing)
        scheduler.set_timesteps(7)
        assert len(scheduler.timesteps) == 7, spacing
        sigmas = scheduler.sigmas
        assert (np.diff(sigmas) < 0).all(), spacing
        assert sigmas[0] == pytest.approx(1, abs=2e-3)
        assert sigmas[-1] == 0
        torch.testing.assert_close(sigmas[:-1], scheduler.timesteps.float() / 1000, rtol=0, atol=2e-3)
        firsts[spacing], ends[spacing] = float(sigmas[1]), float(sigmas[-2])
    # The larger the shift, the longer noise stays.
    assert firsts["shift-0.5"] < firsts["shift-1"] < firsts["shift-1.5"] < firsts["shift-2"] < firsts["shift-3"]
    assert firsts["ends-0.3"] < firsts["ends-0.5"] < firsts["ends-0.7"] < firsts["ends-1"]
    assert ends["ends-0.3"] > ends["ends-0.5"] > ends["ends-0.7"] > ends["ends-1"]


@pytest.mark.parametrize("solver", ["dpm-2", "euler"])
def test_times_by_hand_are_those_of_the_argument_where_there_is_one(bench, solver):
    placed, given = (scheduler_for(bench.config, solver, spacing) for spacing in ("ends-0.7", "trailing"))
    placed.set_timesteps(9)
    given.set_timesteps(timesteps=placed.timesteps.tolist())
    assert torch.equal(given.timesteps, placed.timesteps)
    assert torch.equal(given.sigmas, placed.sigmas)


@pytest.mark.parametrize(
    ("method", "setting", "left"),
    [
        ("plain", "", (6, 0, 0)),
        ("tgate", "gate_step=2", (2, 4, 0)),
        ("tgate", "gate_step=2,cross_attention=False", (2, 4, 0)),
        ("tgate", "tolerance=2", None),
        ("held", "0.4", (2, 4, 0)),
        ("alternate", "2", (3, 3, 0)),
        ("reuse", "100", (4, 0, 2)),
        ("interval", "2", (5, 0, 1)),
    ],
)
def test_the_cost_is_that_of_the_layers_that_ran(bench, method, setting, left):
    with counted_layers(bench.pipe.unet) as full:
        bench.draw(Cell("unipc", "trailing", 1), [0])
    with counted_layers(bench.pipe.unet) as total:
        _, counts = bench.draw(Cell("unipc", "trailing", 6, method, setting), [0])
    assert counts["cost"] == pytest.approx(total[0] / full[0])
    assert left in (None, (counts["full"], counts["half"], counts["forecast"]))
    assert counts["cost"] < 6 or method == "plain"
    assert "forward" not in vars(bench.pipe.unet)


@pytest.mark.parametrize("plan", ["FFF-FH", "FFFFHH"])
@pytest.mark.parametrize(
    ("model", "captions"), [("emoji-sd3", "emoji-sd/captions.txt"), pytest.param("shapes-wan", "", marks=needs_wan)]
)
def test_the_cost_of_a_flow_is_that_of_the_layers_that_ran(tmp_path, model, captions, plan):
    prompts = yardstick.read_captions(str(yardstick.MODELS / captions) if captions else "clips", 2)
    bench = yardstick.load_bench(str(yardstick.MODELS / model), "cpu", prompts, 5.0, 0, tmp_path)
    denoiser = bench.pipe.transformer
    with counted_layers(denoiser) as full:
        bench.draw(Cell("unipc", "shift-1", 1), [0])
    with counted_layers(denoiser) as total:
        images, counts = bench.draw(Cell("unipc", "shift-1", 6, "tgate", f"gate_step={plan}"), [0])
    assert counts["cost"] == pytest.approx(total[0] / full[0])
    assert counts["cost"] == plan.count("F") + plan.count("H") / 2
    assert images.shape[:2] == (1, 3)


def test_each_caption_has_its_own_seed(bench):
    images, _ = bench.draw(Cell("ddim", "trailing", 2), [1])
    numbers = torch.Generator().manual_seed(1)
    options = {"guidance_scale": 7.0, "num_inference_steps": 2, "output_type": "np"}
    expected = bench.pipe(bench.captions[1], generator=numbers, **options).images
    assert np.array_equal(images.permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize(("method", "setting"), [("held", 1), ("alternate", 1), ("reuse", 0), ("interval", 1)])
def test_a_rival_that_leaves_nothing_out_draws_the_plain_picture(bench, method, setting):
    plain, _ = bench.draw(Cell("dpm-2", "trailing", 5), [0, 1])
    images, counts = bench.draw(Cell("dpm-2", "trailing", 5, method, str(setting)), [0, 1])
    assert torch.equal(images, plain)
    assert counts["cost"] == 5


def outputs(kind, setting, steps=8):
    """What a rival gives in each step, where each half grows as its text says."""
    rival = kind(lambda given, text: (1 + text * given,), steps, setting)
    text = torch.tensor([2.0, 5.0])
    return [rival(torch.full((2,), float(step)), text=text)[0].tolist() for step in range(steps)]


def test_rivals_give_what_they_are_said_to_give():
    exact = [[1 + 2.0 * step, 1 + 5.0 * step] for step in range(8)]
    assert outputs(Interval, 3) == exact
    held = [[low, high] if step < 2 else [high - 3.0, high] for step, (low, high) in enumerate(exact)]
    assert outputs(Held, 0.25) == held
    assert outputs(Alternate, 2) == [[high if step % 2 else low, high] for step, (low, high) in enumerate(exact)]
    # What the third step's output changes by in a step, as a share of it: it is used again until the sum is above 2.5.
    share = math.dist(*exact[:2]) / math.hypot(*exact[2])
    assert outputs(Reuse, 2.5 * share)[2:] == [exact[2]] * 3 + [exact[5]] * 2 + [exact[7]]
    assert set(RIVALS) == {"interval", "held", "alternate", "reuse"}


def test_settings_are_arguments():
    assert arguments("tolerance=0.3,guidance=predict") == {"tolerance": 0.3, "guidance": "predict"}
    assert arguments("") == {}


def test_a_run_writes_tables_goes_on_where_it_was_and_takes_more_settings(tmp_path):
    done = run(tmp_path, "--tolerance", "0.2")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["method"], row["setting"]): row for row in results["comparison"]}
    assert list(rows) == [("tgate", "tolerance=0.2"), ("interval", "2"), ("interval", "3")]
    interval = rows["interval", "2"]
    assert (interval["cost"], interval["full"], interval["forecast"]) == (4, 4, 1)
    assert interval["ahead of as many"] < 0
    assert interval["best by hand"].startswith("unipc ends-")
    assert isinstance(interval["ahead of offered"], float)
    # Where two times are the same whole number, diffusers fails.
    assert all(results["impossible"].values())
    seen = {row["run"] for row in results["plain"]} | results["impossible"].keys()
    assert seen == {f"unipc {spacing}" for spacing in spacings_of(SHAPES, "unipc")}
    assert {row["kind"] for row in results["front"]} == {"offered", "by hand"}
    headings = (tmp_path / "comparison.md").read_text().splitlines()[0]
    assert headings.startswith("| row | cost | full | half | forecast | psnr | ahead of as many | ahead of offered |")
    with Image.open(tmp_path / "front.png") as picture:
        assert picture.width == 800
    summed = pd.read_csv(tmp_path / "summary.csv")
    assert list(summed.row) == ["trailing tgate tolerance=0.2", "trailing interval 2", "trailing interval 3"]
    before = {file: file.stat().st_mtime_ns for file in [tmp_path / "reference.npy", *tmp_path.glob("cells/*")]}
    assert run(tmp_path, "--tolerance", "0.5").exit_code == 0
    after = {file: file.stat().st_mtime_ns for file in [tmp_path / "reference.npy", *tmp_path.glob("cells/*")]}
    assert {file.name for file in after.keys() - before.keys()} == {"unipc-trailing-5-tgate-tolerance=0.5.json"}
    assert {file: after[file] for file in before} == before


@pytest.mark.slow
def test_what_no_scorer_reads_has_distances_all_the_same(tmp_path):
    captions = yardstick.MODELS / "emoji-sd" / "captions.txt"
    done = run(tmp_path, "--model", str(captions.parent), "--prompts", str(captions))
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["right"] for row in results["comparison"]} == {None}
    assert all(math.isfinite(row["psnr"]) for row in results["comparison"])
    assert json.loads((tmp_path / "settings.json").read_text())["prompts"] == str(captions)


@needs_wan
@pytest.mark.slow
def test_clips_are_compared_with_solvers_of_flows(tmp_path):
    short = [option for option in SHORT if option not in ("--rival", "interval")]
    options = [*short, *CLIPS, "--tgate", "gate_step=2", "--output", str(tmp_path)]
    done = CliRunner().invoke(APP, options, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["comparison"]
    # Each half step is one call of two.
    assert (row["spacing"], row["cost"], row["full"], row["half"]) == ("shift-1", 3.5, 2, 3)
    assert row["right"] is not None
    assert not results["impossible"]
    assert {each["spacing"] for each in results["plain"]} == set(spacings_of(WAN.config, "unipc")) - {"shift-1.5"}


@pytest.mark.slow
@pytest.mark.parametrize("finalists", [1, 3])
def test_few_captions_choose_the_plain_runs_that_all_are_drawn_for(tmp_path, bench, monkeypatch, finalists):
    monkeypatch.setattr(bench, "folder", tmp_path)
    monkeypatch.setattr(bench, "captions", bench.captions * 2)
    monkeypatch.setattr(bench, "scenes", bench.scenes * 2)
    bench.refer(6, 4)
    cells = yardstick.plain_cells(SHAPES, ["unipc"], [3])
    needed = [Cell("ddim", "trailing", 3)]
    plain, impossible = yardstick.measure_plain(bench, cells, needed, 2, finalists, 4)
    assert len(list(tmp_path.glob("screen/*"))) == len(cells)
    assert plain.groupby("kind").size().to_dict() == {"offered": finalists + 1, "by hand": finalists}
    assert set(plain.solver) == {"unipc", "ddim"}
    (best,) = contenders(plain[(plain.solver == "unipc") & (plain.kind == "offered")], 1).spacing
    few, everything = (
        json.loads((tmp_path / folder / f"unipc-{best}-3-plain.json").read_text()) for folder in ("screen", "cells")
    )
    assert (len(few["psnr"]), len(everything["psnr"])) == (2, 4)
    assert few["psnr"] == pytest.approx(everything["psnr"][::2], abs=1e-2)
    assert impossible.keys() <= {f"unipc {spacing}" for spacing in spacings_of(SHAPES, "unipc")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "heun"], "solver='heun' is unknown: pass one of dpm-2"),
        (["--spacing", "shift-3"], "spacing='shift-3' is unknown: pass one of even, trailing"),
        (["--rival", "teacache"], "rival='teacache' is unknown: pass one of held"),
        pytest.param([*CLIPS, "--solver", "ddim"], "solver='ddim' is unknown: pass one of dpm-2", marks=needs_wan),
        pytest.param([*CLIPS[:-2], "--rival", "held"], "guides by two calls", marks=needs_wan),
    ],
)
def test_wrong_arguments_are_named_with_a_remedy(tmp_path, options, message):
    done = run(tmp_path / "run", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
