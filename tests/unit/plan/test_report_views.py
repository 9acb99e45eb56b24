"""A report as people read it: lines, a table, a figure."""

import pickle

import pytest
from matplotlib.figure import Figure

from tgate_processors import TGateReport

RUN = TGateReport(
    num_inference_steps=8,
    full_batch_forwards=4,
    half_batch_forwards=1,
    forecast_forwards=3,
    cross_attention_reused=1,
    levels="FFF--F-H",
    prediction_errors=((2, 0.5), (5, 0.25)),
    forecast_errors=((2, 0.125), (5, 0.0625), (7, 1.75)),
    peak_bytes=3 * 2**19,
    kept_layers=5,
    cross_attention_layers=16,
    tolerance=0.2,
)
TOLERANCE = "; tolerance 0.2"


def test_a_run_that_decided_is_four_lines():
    assert str(RUN).splitlines() == [
        "T-GATE: 8 steps, FFF--F-H",
        "  denoiser: 4 full, 1 half and 3 forecast of 8 forwards, about 1.8x less work",
        "  errors: forecasts median 0.12, largest 1.8 (step 7); guidance median 0.38, largest 0.5 (step 2)" + TOLERANCE,
        "  memory: 1.5 MiB stored at most, cross-attention of 5 of 16 layers",
    ]


def test_what_a_run_does_not_have_is_left_out():
    plain = TGateReport(num_inference_steps=2, full_batch_forwards=2, cross_attention_reused=1, levels="FF")
    assert str(plain).splitlines() == [
        "T-GATE: 2 steps, FF",
        "  denoiser: 2 full, 0 half and 0 forecast of 2 forwards, 1 with reused cross-attention",
        "  memory: 0.0 MiB stored at most",
    ]
    unkept = TGateReport(num_inference_steps=1, levels="F", cross_attention_bytes=2**21)
    assert str(unkept).endswith("; cross_attention=True would store 2.0 MiB more")


def test_a_notebook_shows_the_lines_as_a_table():
    table = RUN._repr_html_()
    assert table.count("<tr>") == 4
    assert all(line.split(": ", 1)[1] in table for line in str(RUN).splitlines())
    assert TGateReport()._repr_html_() == "<p>T-GATE: no run yet.</p>"


def test_the_figure_has_a_bar_for_each_step_and_the_errors_with_the_tolerance():
    above, below = RUN.plot().axes
    colours = {letter: bars[0].get_facecolor() for letter, bars in zip("FH-", below.containers, strict=True)}
    assert len(set(colours.values())) == 3
    bars = sorted((bar for bars in below.containers for bar in bars), key=lambda bar: bar.get_x())
    assert [bar.get_facecolor() for bar in bars] == [colours[letter] for letter in RUN.levels]
    forecasts, guidance, tolerance = above.lines
    assert tuple(zip(*forecasts.get_data(), strict=True)) == RUN.forecast_errors
    assert tuple(zip(*guidance.get_data(), strict=True)) == RUN.prediction_errors
    assert set(tolerance.get_ydata()) == {0.2}


def test_the_figure_of_a_fixed_plan_has_bars_only(tmp_path):
    figure = TGateReport(num_inference_steps=3, levels="FFH").plot()
    assert not figure.axes[0].lines
    figure.savefig(tmp_path / "plan.png")
    with pytest.raises(ValueError, match=r"of a run, got one without steps\. Call the pipeline first"):
        TGateReport().plot()


@pytest.mark.parametrize("inline", [False, True], ids=["fresh", "%matplotlib inline"])
def test_a_notebook_shows_the_figure_as_a_picture(inline):
    formatters = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    if inline:
        # What the magic registers: it goes before the figure's own way.
        formatters.formatters["image/png"].for_type(Figure, lambda figure: b"inline")
    figure = pickle.loads(pickle.dumps(RUN.plot()))
    shown = formatters.format(figure)[0]["image/png"]
    assert shown == b"inline" if inline else shown.startswith(b"\x89PNG")
