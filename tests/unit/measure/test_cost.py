"""The estimate against what real runs take, what others count, and what is published."""

import csv
import functools
import json
import os
import re
import subprocess
import sys

import diffusers
import pytest
import torch
import typer
from calflops import calculate_flops
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from examples.benchmarks import cost_table, gains
from tests.support.macs import sizes, taken
from tests.support.paths import ROOT
from tests.support.settings import SETTINGS, apply_settings
from tests.zoo.addons import FRAMES
from tests.zoo.case import SIZE, STEPS, slow
from tests.zoo.catalogue import BY_NAME
from tests.zoo.core import GUIDED
from tgate_processors import MACs, TGateSchedule, apply_tgate, estimate_cost, get_tgate_report

DEAR = {"sd_img2img", "lcm_sdxl"}
FAMILY_CASES = ["sd", "sd_img2img", "sdxl", "lcm", "lcm_sdxl", "pixart_alpha", "pixart_sigma", "lcm_pixart", "svd"]


@functools.cache
def taken_without_tgate(name, prompts, call):
    case = BY_NAME[name]
    return taken(case.build(), case, list(prompts), **dict(call))


def check(pipe, case, settings, prompts, guidance, **call):
    """The estimate is what the run takes, to the last MAC and the last byte."""
    steps = call.get("num_inference_steps", STEPS)
    schedule = TGateSchedule(**settings)
    cost = estimate_cost(
        pipe, schedule, steps, do_classifier_free_guidance=guidance, batch_size=len(prompts), **sizes(case)
    )
    if type(pipe.scheduler) is type(case.build().scheduler):
        assert cost.without_tgate == taken_without_tgate(case.name, tuple(prompts), tuple(call.items()))
    else:
        assert cost.without_tgate == taken(pipe, case, prompts, **call)
    assert cost.with_tgate == taken(apply_settings(pipe, **settings), case, prompts, **call)
    assert cost.report == get_tgate_report(pipe)
    assert cost.report.peak_bytes > 0
    assert cost.without_tgate.total > cost.with_tgate.total
    return cost


@pytest.mark.parametrize(
    ("name", "settings", "prompts"),
    [
        *(row(name, "v2", [0, 1]) for name in FAMILY_CASES for row in [slow if name in DEAR else pytest.param]),
        *(row(name, "v1", [0]) for name, row in (("sd", pytest.param), ("sdxl", slow), ("pixart_alpha", pytest.param))),
    ],
)
def test_the_estimate_is_what_a_run_takes(name, settings, prompts):
    case = BY_NAME[name]
    # A denoiser that embeds the guidance scale is never guided: nothing needs to be said.
    guidance = None if name == "lcm" else case in GUIDED
    check(case.build(), case, SETTINGS[settings], prompts, guidance)


@pytest.mark.slow
def test_the_estimate_of_animatediff():
    host = BY_NAME["animatediff"]
    pipe, settings = host.build(), SETTINGS["v2"]
    size = {"height": SIZE // 2, "width": SIZE // 2}
    given = {"num_frames": FRAMES, "max_sequence_length": 7, "batch_size": 2}
    cost = estimate_cost(pipe, TGateSchedule(**settings), STEPS, **size, **given)
    assert cost.without_tgate == taken(pipe, host, [0, 1], **size)
    assert cost.with_tgate == taken(apply_settings(pipe, **settings), host, [0, 1], **size)
    assert cost.report == get_tgate_report(pipe)


def test_guidance_of_other_parts_is_up_to_the_caller():
    host = BY_NAME["pix2pix"]
    pipe = host.build()
    with pytest.raises(
        ValueError, match="pass its denoiser, do_classifier_free_guidance=False, and the pictures times the parts"
    ):
        estimate_cost(pipe, TGateSchedule(2), STEPS)
    size = {
        "height": SIZE,
        "width": SIZE,
        "max_sequence_length": 7,
        "do_classifier_free_guidance": False,
        "batch_size": 3,
    }
    cost = estimate_cost(pipe.unet, TGateSchedule(2), STEPS, **size)
    assert cost.without_tgate == taken(pipe, host, [0])
    assert cost.with_tgate == taken(apply_tgate(pipe, 2), host, [0])
    assert cost.report == get_tgate_report(pipe)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [("gate_1", 5.0), ("share", 1.0), ("v2_late", 5.0), slow("gate_1", 1.0), slow("share", 5.0), slow("v2_late", 1.0)],
)
def test_any_schedule_with_and_without_guidance(settings, scale):
    case = BY_NAME["sd"]
    check(case.build(), case, SETTINGS[settings], [0, 1], scale > 1, guidance_scale=scale)


@pytest.mark.parametrize(
    ("scheduler", "forwards"),
    [("HeunDiscreteScheduler", 15), slow("KDPM2DiscreteScheduler", 15), slow("PNDMScheduler", 17)],
)
@pytest.mark.parametrize("settings", [pytest.param("v1", marks=pytest.mark.slow), "v2"])
def test_the_scheduler_says_how_many_forwards_the_steps_are(scheduler, forwards, settings):
    case = BY_NAME["sd"]
    pipe = case.build()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    cost = check(pipe, case, SETTINGS[settings], [0], True, num_inference_steps=8)
    assert cost.report.full_batch_forwards + cost.report.half_batch_forwards == forwards


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart_alpha", "svd"])
def test_what_a_forward_lacks_is_what_these_layers_take(name):
    case = BY_NAME[name]
    pipe = case.build()
    denoiser = getattr(pipe, case.denoiser)
    cost = estimate_cost(pipe, TGateSchedule(2), STEPS, **sizes(case))
    with FlopCounterMode(display=False) as counter:
        case.run(pipe, num_inference_steps=2)
    counts = counter.get_flop_counts()
    # Two forwards of two halves, and two operations for a MAC.
    own, cross = (
        sum(sum(flops.values()) for module, flops in counts.items() if module.endswith(kind)) // 8
        for kind in (".attn1", ".attn2")
    )
    assert min(own, cross) > 0
    full = cost.full.layers
    assert cost.without_cross_attention.layers == full - cross
    assert cost.without_self_attention.layers == full - own
    assert cost.without_attention == MACs(full - cross - own, 0)
    parts = cost.without_cross_attention.attention, cost.without_self_attention.attention
    assert sum(parts) == cost.full.attention
    assert min(parts) > 0
    # Parameters of what still runs.
    layers = [module for key, module in denoiser.named_modules() if key.endswith("attn2")]
    assert cost.parameters == sum(parameter.numel() for parameter in denoiser.parameters())
    dropped = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    assert cost.parameters_after_gate == cost.parameters - dropped


def test_calflops_counts_the_same():
    case = BY_NAME["sd"]
    pipe = case.build()
    cost = estimate_cost(pipe, TGateSchedule(2), STEPS, **sizes(case))
    side = SIZE // pipe.vae_scale_factor
    inputs = {
        "sample": torch.ones(1, pipe.unet.config.in_channels, side, side),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": case.conditioning([0], False)["prompt_embeds"],
    }
    _, macs, params = calculate_flops(pipe.unet, kwargs=inputs, print_results=False, output_as_string=False)
    assert (macs, params) == (cost.full.layers, cost.parameters)


def test_the_denoiser_alone_without_weights_too_costs_what_it_costs_in_its_pipeline():
    case = BY_NAME["sdxl"]
    pipe = case.build()
    schedule = TGateSchedule(2, sp_interval=2)
    expected = estimate_cost(pipe, schedule, STEPS, **sizes(case))
    with torch.device("meta"):
        bare = type(pipe.unet).from_config(pipe.unet.config)
    for denoiser in (pipe.unet, bare, torch.compile(pipe.unet)):
        given = {**sizes(case), "vae_scale_factor": pipe.vae_scale_factor}
        assert estimate_cost(denoiser, schedule, STEPS, **given) == expected
    pipe.unet = torch.compile(pipe.unet)
    assert estimate_cost(pipe, schedule, STEPS, **sizes(case)) == expected


def test_the_pipeline_stays_as_it_is_and_may_have_tgate():
    case = BY_NAME["sd"]
    pipe = apply_tgate(case.build(), 2)
    unet = pipe.unet
    before = (dict(vars(unet)), unet.attn_processors, dict(vars(pipe.scheduler)), get_tgate_report(pipe))
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in unet.modules()]
    tensors = [(tensor.data_ptr(), tensor.device) for tensor in unet.parameters()]
    cost = estimate_cost(pipe, TGateSchedule(3), STEPS, **sizes(case))
    assert before == (dict(vars(unet)), unet.attn_processors, dict(vars(pipe.scheduler)), get_tgate_report(pipe))
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in unet.modules()]
    assert tensors == [(tensor.data_ptr(), tensor.device) for tensor in unet.parameters()]
    assert cost == estimate_cost(case.build(), TGateSchedule(3), STEPS, **sizes(case))


def test_sizes_default_to_those_of_the_pipeline():
    pipe = diffusers.DiffusionPipeline.from_pretrained(ROOT / "examples/models/shapes-sd", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    apply_tgate(pipe, 2)
    with FlopCounterMode(display=False) as counter:
        pipe("a circle", num_inference_steps=4, output_type="latent")
    flops = sum(counter.get_flop_counts()[type(pipe.unet).__name__].values())
    cost = estimate_cost(pipe, TGateSchedule(2), 4)
    assert cost.with_tgate.layers == flops // 2
    assert cost.report == get_tgate_report(pipe)


def test_bytes_are_counted_in_the_given_type():
    case = BY_NAME["sd"]
    pipe = case.build()
    held = [
        estimate_cost(pipe, TGateSchedule(2), STEPS, dtype=dtype, **sizes(case)).report.peak_bytes
        for dtype in (None, torch.float32, torch.float16)
    ]
    assert held[0] == held[1] == 2 * held[2]
    pipe.unet.half()
    assert estimate_cost(pipe, TGateSchedule(2), STEPS, **sizes(case)).report.peak_bytes == held[2]


def _other_conditions(**config):
    unet = BY_NAME["sd"].build().unet
    unet.register_to_config(**config)
    return unet


def _with_another_layer():
    unet = BY_NAME["sd"].build().unet
    unet.conv_in.lora_A = torch.nn.Linear(2, 2)
    return unet


@pytest.mark.parametrize(
    ("given", "arguments", "error", "message"),
    [
        (
            lambda: "a pipeline",
            {},
            TypeError,
            "pipe_or_denoiser is of type str: pass a diffusers pipeline, or its denoiser",
        ),
        (lambda: torch.nn.Linear(2, 2), {}, ValueError, "Linear cannot be gated: T-GATE does not know how it does"),
        (
            lambda: type("UniDiffuserModel", (torch.nn.Module,), {})(),
            {},
            ValueError,
            "UniDiffuserModel cannot be gated: it has text and picture in one sequence",
        ),
        (lambda: diffusers.UNet2DModel, {}, TypeError, "pipe_or_denoiser is of type type"),
        (None, {"schedule": [10]}, TypeError, r"`schedule` must be .*TGateSchedule.*, got \[10\] of type list"),
        (
            None,
            {"num_inference_steps": 2.5},
            TypeError,
            "`num_inference_steps` must be an int of at least 1, got 2.5 of type float",
        ),
        (None, {"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be an int of at least 1, got 0"),
        (None, {"batch_size": 0}, ValueError, "`batch_size` must be an int of at least 1, got 0"),
        (
            None,
            {"do_classifier_free_guidance": 7.5},
            TypeError,
            "do_classifier_free_guidance=7.5 is of type float: pass True or False",
        ),
        (None, {"height": 63}, ValueError, "height=63 is not a multiple of 8: pass one"),
        (None, {"width": 0}, ValueError, "`width` must be an int of at least 8, got 0"),
        (None, {"vae_scale_factor": 0}, ValueError, "`vae_scale_factor` must be an int of at least 1, got 0"),
        (None, {"max_sequence_length": 0}, ValueError, "`max_sequence_length` must be an int of at least 1, got 0"),
        (None, {"num_frames": 3}, ValueError, "num_frames=3 means nothing for a UNet2DConditionModel: leave it out"),
        (None, {"extra_forwards": [{"a": 1}]}, ValueError, "means nothing for a UNet2DConditionModel: leave it out"),
        (None, {"dtype": "float16"}, TypeError, "dtype='float16' is of type str: pass a torch.dtype"),
        (None, {"dtype": torch.int8}, ValueError, "dtype=torch.int8 is not a floating-point type"),
        (lambda: BY_NAME["svd"].build(), {"max_sequence_length": 3}, ValueError, "max_sequence_length=3 means nothing"),
        (
            lambda: BY_NAME["lcm"].build(),
            {"do_classifier_free_guidance": True},
            ValueError,
            "do_classifier_free_guidance=True, but this UNet2D",
        ),
        (lambda: _other_conditions(attention_type="gated"), {}, ValueError, "config.attention_type='gated', and"),
        (lambda: _other_conditions(sample_size=None), {}, ValueError, "no config.sample_size: pass `height`"),
        (
            lambda: _other_conditions(encoder_hid_dim_type="ip_image_proj"),
            {},
            ValueError,
            r"config.encoder_hid_dim_type='ip_image_proj', .* pipe.unload_ip_adapter\(\) first",
        ),
        (
            _with_another_layer,
            {},
            ValueError,
            r"2 parameters differ, such as conv_in.lora_A.bias. Fuse and",
        ),
    ],
)
def test_what_cannot_be_estimated_says_why(given, arguments, error, message):
    given = BY_NAME["sd"].build() if given is None else given()
    call = {"schedule": TGateSchedule(2), "num_inference_steps": STEPS, **arguments}
    with pytest.raises(error, match=message):
        estimate_cost(given, **call)


@pytest.mark.slow
def test_the_command_prints_the_published_table(tmp_path):
    command = [sys.executable, "-m", "examples.benchmarks.cost_table", "--json", str(tmp_path / "rows.json")]
    command += ["--output", str(tmp_path / "table.md")]
    # In a pipe; its width is that of a terminal with 80 columns.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("*")) <= 80
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 16
    rows = json.loads((tmp_path / "rows.json").read_text())
    known = json.loads((ROOT / "examples" / "benchmarks" / "published.json").read_text())["rows"]
    assert [row["row"] for row in rows] == [row["row"] for row in known]
    assert len(rows) == 14
    page = (ROOT / "docs" / "cost.md").read_text()
    data = (ROOT / "docs" / "data" / "published-table.csv").read_text().splitlines()
    for row in rows:
        assert abs(row["macs_deviation"]) < 0.001, row
        assert row["note"] or abs(row["params_deviation"]) < 0.001, row
        name = re.escape(row["row"])
        lines = [line for line in done.stdout.splitlines() if re.match(rf"\W {name} \** *[│|]", line)]
        figures = [f"{row[name] / 1e12:.3f}" for name in ("macs", "published_macs")]
        figures += [f"{row[name] / 1e6:.3f}" for name in ("params", "published_params") if row[name]]
        figures += [
            f"{row[name] * 100:+.3f}" for name in ("macs_deviation", "params_deviation") if row[name] is not None
        ]
        shown = re.split(r"[│|\s]+", " ".join(lines))
        assert not set(figures) - set(shown), row
        assert all(("*" in line) is (row["note"] is not None) for line in lines)
        (written,) = (line for line in table if re.match(rf"\| {name} \** *\|", line))
        assert not set(figures) - set(written.split())
        # The page shows what is printed.
        (shown,) = (line for line in page.splitlines() if re.match(rf"\| {name} (\\\*)* *\|", line))
        assert f"| {row['forwards']} | {row['macs'] / 1e12:.3f} |" in shown
        (kept,) = (line for line in data if re.match(rf"{name}( \*+)?,", line))
        assert not set(figures) - set(kept.split(","))
    assert {row["model"] for row in rows if row["note"]} == {"sd21", "sdxl", "lcm_sdxl"}


def invoke(*arguments):
    app = typer.Typer()
    app.command()(cost_table.main)
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, arguments)


def test_the_command_computes_any_other_row(tmp_path):
    config = ROOT / "examples/models/shapes-sd/unet/config.json"
    done = invoke(
        *("--model", str(config), "--steps", "12", "--gate-step", "0.5", "--sp-interval", "2", "--fi-interval", "3"),
        *("--warm-up", "1", "--no-guidance", "--batch-size", "2", "--json", str(tmp_path / "row.json")),
        *("--output", str(tmp_path / "row.csv")),
    )
    assert done.exit_code == 0, done.output
    assert "…" not in done.output
    (row,) = json.loads((tmp_path / "row.json").read_text())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(json.loads(config.read_text()))
    schedule = TGateSchedule(0.5, sp_interval=2, fi_interval=3, warm_up=1)
    cost = estimate_cost(unet, schedule, 12, do_classifier_free_guidance=False, batch_size=2, dtype=torch.float16)
    assert (row["gate_step"], row["peak_bytes"]) == (6, cost.report.peak_bytes)
    assert row["with_tgate_macs"] == cost.with_tgate.layers
    assert row["with_tgate_total_macs"] == cost.with_tgate.total
    assert row["speedup_bound"] == cost.speedup_bound
    assert " ".join(done.output.split()).count("12 forwards, 0 at half batch") == 1
    with (tmp_path / "row.csv").open(newline="") as stream:
        written = list(csv.reader(stream))
    assert written[2][:2] == ["with T-GATE", f"{cost.with_tgate.layers / 1e12:.3f}"]
    assert all(figure in done.output for line in written[1:] for figure in line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "sd99"), "'sd99' is neither one of lcm_sdxl, pixart_alpha, sd15, sd21, sdxl, nor"),
        (("--model", "sd15", "--gate-step", "1.5"), "got 1.5"),
        (("--model", "sd15", "--dtype", "float15"), "has no attribute 'float15'"),
        (("--output", "table.xlsx"), "output='table.xlsx' is neither CSV nor Markdown"),
    ],
)
def test_a_wrong_argument_of_the_command_says_what_is_wrong(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(re.sub(r"[│\s]+", " ", done.output).split())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Sana", "Stable Audio", pytest.param("Hunyuan", marks=pytest.mark.thorough)])
def test_the_table_of_large_models_is_what_the_script_counts(model):
    (row,) = (row for row in gains.ROWS if model in row["model"])
    with (ROOT / "docs" / "data" / "large-models.csv").open() as file:
        kept = {line[0]: line for line in csv.reader(file)}
    name, *figures = gains.line(row, 0.4)
    assert kept[name.replace("\N{MULTIPLICATION SIGN}", "x")][1:] == figures


def test_a_model_that_the_script_does_not_have_is_named():
    app = typer.Typer()
    app.command()(gains.main)
    result = CliRunner().invoke(app, ["--model", "Flux"])
    assert result.exit_code == 2
    assert "model='Flux' is in none of" in " ".join(result.output.replace("│", " ").split())


def test_an_estimate_without_guidance_says_whose_it_is(caplog):
    pipe = BY_NAME["sd"].build()
    estimate_cost(pipe, TGateSchedule(forecast=False), 6, do_classifier_free_guidance=False)
    assert "this call of the denoiser has no guidance" in caplog.text
    caplog.clear()
    assert estimate_cost(pipe, TGateSchedule(), 6, do_classifier_free_guidance=False).report.forecast_forwards == 2
    for schedule, choice in ((TGateSchedule(), {}), (TGateSchedule(3), {"cross_attention": False})):
        assert estimate_cost(pipe, schedule, 6, **choice).report.half_batch_forwards > 0
    assert not caplog.records


def test_a_cost_is_four_lines():
    cost = estimate_cost(BY_NAME["sd"].build(), 2, STEPS, height=64, width=64)
    plan, denoiser, macs, memory = str(cost).splitlines()
    assert (plan, denoiser) == ("T-GATE: 6 steps, FFHHHH", "  denoiser: 2 full, 4 half and 0 forecast of 6 forwards")
    found = re.fullmatch(r"  cost: ([\d.]+) MMACs, ([\d.]+) MMACs without T-GATE \(([\d.]+)x less\)", macs)
    with_tgate, without, bound = map(float, found.groups())
    assert (with_tgate, without) == pytest.approx(
        (cost.with_tgate.total / 1e6, cost.without_tgate.total / 1e6), rel=0.01
    )
    assert bound == pytest.approx(cost.speedup_bound, abs=0.01)
    assert memory.endswith("MiB stored at most")
    assert (
        str(estimate_cost(BY_NAME["sd"].build(), "auto", STEPS, height=64, width=64))
        .splitlines()[2]
        .endswith("at most)")
    )
