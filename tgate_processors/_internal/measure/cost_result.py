"""What a schedule costs, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.report import TGateReport
from ..plan.report_views import rows_of
from .macs import MACs

_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class TGateCost:
    r"""
    What a schedule costs, in multiply-accumulates of the denoiser. With `gate_step="auto"` this is the minimum cost,
    with every prediction accepted; `without_tgate` is the maximum.

    Args:
        full (`MACs`): One forward of one picture without guidance, all attention computed.
        without_cross_attention (`MACs`): The same with cross-attention reused.
        without_self_attention (`MACs`): The same with self-attention reused.
        without_attention (`MACs`): The same with both reused.
        without_tgate (`MACs`): The whole run without T-GATE.
        with_tgate (`MACs`): The whole run with T-GATE.
        parameters (`int`): Parameters of the denoiser.
        parameters_after_gate (`int`): Those of the modules that still run when cross-attention is reused.
        report (`TGateReport`):
            What [`get_tgate_report`] says after the run: forwards of each kind, most bytes held in stored outputs.
    """

    full: MACs
    without_cross_attention: MACs
    without_self_attention: MACs
    without_attention: MACs
    without_tgate: MACs
    with_tgate: MACs
    parameters: int
    parameters_after_gate: int
    report: TGateReport

    def __str__(self) -> str:
        rows = rows_of(self.report)
        bound = f"{self.speedup_bound:.2f}x less{' at most' if self.report.tolerance else ''}"
        macs = (
            f"{_rounded(self.with_tgate.total)}MACs, {_rounded(self.without_tgate.total)}MACs without T-GATE ({bound})"
        )
        others = f"  denoiser: {rows['Denoiser'].partition(', about')[0]}\n  cost: {macs}\n  memory: {rows['Memory']}"
        return f"T-GATE: {rows['Plan']}\n{others}"

    @property
    def speedup_bound(self) -> float:
        """The speed-up of the denoiser if its time were in proportion to its MACs, attention's products included."""
        return self.without_tgate.total / self.with_tgate.total


def _rounded(number: int) -> str:
    """A number of three digits, with the prefix of its unit."""
    power = min((len(str(number)) - 1) // 3, len(_PREFIXES) - 1)
    return f"{number / 1000**power:.3g} {_PREFIXES[power]}"
