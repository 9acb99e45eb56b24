"""The page "Which setting": its lines can be pasted, and its figures are what `estimate_cost` counts."""

import functools
import json
import re

import diffusers
import pytest
import torch

from examples.benchmarks import gains
from tests.support.paths import ROOT
from tests.zoo.case import IS_OLD, TIERS
from tests.zoo.catalogue import BY_NAME
from tgate_processors import TGateSchedule, apply_tgate, estimate_cost, get_tgate_report

PAGE = (ROOT / "docs/settings.md").read_text().replace("\N{GREEK SMALL LETTER ALPHA}", "alpha")
PAGE = PAGE.replace("\N{MULTIPLICATION SIGN}", "x")
CONFIGS = {"SD-1.5": "sd15", "SDXL": "sdxl", "PixArt-alpha": "pixart_alpha", "LCM-SDXL": "lcm_sdxl"}
GUIDED = ["SD-1.5", "SDXL", "PixArt-alpha"]
# The class of a denoiser and its configuration: diffusers' defaults, and what differs from them.
DENOISERS = {
    "Stable Video Diffusion": ("UNetSpatioTemporalConditionModel", {"sample_size": 96}),
    "SD 3.5 Large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
        | {"qk_norm": "rms_norm", "pos_embed_max_size": 192},
    ),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}),
    "CogVideoX 2B": ("CogVideoXTransformer3DModel", {}),
    "LTX-2": ("LTX2VideoTransformer3DModel", {}),
}
# What the defaults of a pipeline add to each step.
FURTHER = {"LTX-2": [{"spatio_temporal_guidance_blocks": [28]}, {"isolate_modalities": True}]}
# Or by a row of gains.json.
GAINS = {
    "Wan 2.1 1.3B": "Wan 2.1 1.3B",
    "Wan 14B": "Wan 2.1 14B, 1280",
    "LTX-Video": "LTX",
    "Sana": "Sana",
    "Stable Audio": "Stable Audio",
}
# For a row, by how its first cell begins.
PIPELINES = {
    "SD-1.5": "sd",
    "SDXL": "sdxl",
    "SD 3.5": "sd3",
    "PixArt-alpha": "pixart_alpha",
    "Sana": "sana",
    "FLUX.1-dev": "flux",
    "Qwen-Image": "qwen",
    "Wan": "wan",
    "LTX-Video": "ltx",
    "LTX-2": "ltx2",
    "HunyuanVideo": "hunyuan_video",
    "CogVideoX": "cogvideox",
    "Stable Audio": "stable_audio",
    "Stable Video Diffusion": "svd",
    "AnimateDiff": "animatediff",
    "LCM-SDXL": "lcm_sdxl",
    "LCM with PixArt-alpha": "lcm_pixart",
}


def table(heading):
    """The cells of the tables of a section, by the first one."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[1]
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*$", section, re.M)]
    return {line[0]: line[1:] for line in lines if set(line[0]) != {"-"}}


BY_MODEL = {name: cells for name, cells in table("By model").items() if name != "model"}
PUBLISHED = {name: cells for name, cells in table("The published method").items() if name != "model"}
# What the testbeds took in 25 steps: UNets, transformers.
PLANS = re.findall(r"`([FH-]{25})` for", PAGE)
UNETS = ("SD-1.5", "SDXL", "Stable Video", "AnimateDiff")
# Called without guidance of two halves.
UNGUIDED = ("LCM", "FLUX.1-dev", "HunyuanVideo")
TICKS = {True: "\N{CHECK MARK}", False: "\N{EN DASH}"}


def of(rows, name):
    """What belongs to a row, by how its first cell begins."""
    return rows.get(max((begin for begin in rows if name.startswith(begin)), key=len, default=None))


def gains_of(name):
    """The row of gains.json for a model, if it has one."""
    begin = of(GAINS, name)
    return next((row for row in gains.ROWS if begin and row["model"].startswith(begin)), None)


def known(name):
    """A class of diffusers, where this version has it as the rows were counted."""
    if not hasattr(diffusers, name):
        pytest.skip("this diffusers has no such model")
    if IS_OLD and name == "HunyuanVideoTransformer3DModel":
        pytest.skip("this diffusers reads the length of the text, which needs values")
    return getattr(diffusers, name)


@functools.cache
def denoiser(name):
    """The denoiser of a row, without weights."""
    with torch.device("meta"):
        if found := of(DENOISERS, name):
            return known(found[0])(**found[1])
        if row := gains_of(name):
            return known(row["class"])(**row["config"])
        if name.startswith("AnimateDiff"):
            return diffusers.UNetMotionModel.from_unet2d(denoiser("SD-1.5"), diffusers.MotionAdapter())
        config = CONFIGS[name.removeprefix("LCM with ").split(",")[0]]
        config = json.loads((ROOT / f"examples/configs/{config}.json").read_text())
        return getattr(diffusers, config["_class_name"]).from_config(config)


def count(name, line, steps=25, **settings):
    """What a line costs, counted at the size that its row names."""
    size = re.search(r"(\d+) x (\d+)", name)
    frames = re.search(r"(\d+) frames", name)
    settings |= {"width": int(size[1]), "height": int(size[2])} if size else {}
    settings |= {"num_frames": int(frames[1])} if frames else {}
    settings = (gains_of(name) or {"size": {}})["size"] | settings
    if further := of(FURTHER, name):
        settings |= {"extra_forwards": further, "vae_scale_factor": 32}
    if name.startswith(UNGUIDED):
        settings["do_classifier_free_guidance"] = False
    schedule = eval(line, {"apply_tgate": schedule_of, "TGateSchedule": TGateSchedule, "pipe": None})
    return estimate_cost(denoiser(name), schedule, steps, dtype=torch.float16, **settings)


def schedule_of(pipe, gate_step="auto", **settings):
    """In the place of `apply_tgate`."""
    return gate_step if isinstance(gate_step, TGateSchedule) else TGateSchedule(gate_step, **settings)


def by_name(names):
    """Parameters: names of rows, most of those of the large denoisers where everything is tested."""
    tiers = {"SD-1.5": "default", "PixArt": "default", "SDXL": "slow"}
    return [
        pytest.param(
            name, marks=TIERS[next((tier for begin, tier in tiers.items() if name.startswith(begin)), "thorough")]
        )
        for name in names
    ]


def bound(cost):
    return f"{cost.speedup_bound:.2f}"


def mebibytes(cost):
    return f"{cost.report.peak_bytes / 2**20:.0f}"


def steps_of(name):
    return 4 if name.startswith("LCM") else 25


QUICK = (*GUIDED, "FLUX", "LCM", "Wan 2")
LINES = [
    pytest.param(name, line, marks=[] if name.startswith(QUICK) else pytest.mark.slow)
    for name, cells in [*BY_MODEL.items(), *PUBLISHED.items()]
    for line in cells
    if line.startswith("apply_tgate")
]


@pytest.mark.parametrize(("name", "line"), LINES)
def test_a_line_can_be_pasted(name, line):
    case = BY_NAME[of(PIPELINES, name)]
    if not case.is_there:
        pytest.skip("this diffusers has no such pipeline")
    pipe = case.build()
    eval(line, {"apply_tgate": apply_tgate, "TGateSchedule": TGateSchedule, "pipe": pipe})
    case.run(pipe, num_inference_steps=steps_of(name))
    report = get_tgate_report(pipe)
    assert report.num_inference_steps == steps_of(name)
    # Where the run decides, one with random weights may have good reason to stay full.
    assert report.cross_attention_reused or line == "apply_tgate(pipe)"


@pytest.mark.parametrize("name", by_name(BY_MODEL))
def test_figures_of_a_model(name):
    planned, ceiling, memory, guidance, cross_attention, forecast, _, line = BY_MODEL[name]
    cost = count(name, line, steps_of(name))
    assert ceiling == bound(cost)
    if line == "apply_tgate(pipe)":
        plan = PLANS[not name.startswith(UNETS)]
        assert planned == bound(count(name, f"apply_tgate(pipe, {plan!r})"))
    else:
        assert planned == ceiling
    assert memory.split(" MiB")[0] == mebibytes(cost)
    # Without guidance no forward has half the batch; what is on request takes memory in a run that asks for it.
    assert guidance == TICKS[cost.report.half_batch_forwards > 0 and not name.startswith(UNGUIDED)]
    assert forecast == TICKS["-" in cost.report.levels]
    if cross_attention == "on request":
        assert not cost.report.kept_layers
        assert count(name, line, steps_of(name), cross_attention=True).report.kept_layers
    else:
        assert cross_attention == TICKS[cost.report.kept_layers > 0]


def test_the_readme_has_rows_of_this_page():
    readme = (ROOT / "README.md").read_text().replace("\N{GREEK SMALL LETTER ALPHA}", "alpha")
    readme = readme.replace("\N{MULTIPLICATION SIGN}", "x")
    begin = readme.index("| 25 steps, `apply_tgate(pipe)` |")
    rows = [line.strip("| ").split(" | ") for line in readme[begin:].split("\n\n")[0].splitlines()[2:]]
    assert rows
    for name, *figures in rows:
        assert figures == BY_MODEL[name][:3], name


@pytest.mark.parametrize("name", by_name(PUBLISHED))
def test_ceiling_of_the_published_method(name):
    line, ceiling, _ = PUBLISHED[name]
    assert ceiling == bound(count(name, line))


@pytest.mark.parametrize("name", by_name(GUIDED))
def test_limit_and_memory_by_pictures(name):
    limits = table("How much faster it can get")
    one = count(name, "apply_tgate(pipe)")
    full, half = 2 * one.full.total, one.without_cross_attention.total
    # One step is full and one a half step: of F---H-- or of F------H-----.
    for row, steps in (("speed-up below, up to 31 steps", 7), ("48 steps or more", 13)):
        assert limits[row][GUIDED.index(name)] == f"{steps * full / (full + half):.2f}"
    (row,) = (cells for first, cells in table("How much memory it takes").items() if first.startswith(name))
    assert row == [f"{mebibytes(count(name, 'apply_tgate(pipe)', batch_size=number))} MiB" for number in (1, 4, 8)]


@pytest.mark.slow
def test_ceiling_by_steps():
    section = table("How much faster it can get")
    costs = [count("SDXL", "apply_tgate(pipe)", int(steps)) for steps in section["steps"]]
    assert section["full steps at least"] == [f"{cost.report.full_batch_forwards}" for cost in costs]
    assert section["speed-up at most"] == [bound(cost) for cost in costs]
