"""T-GATE for diffusers pipelines: reuse cross-attention, predict guidance, forecast whole steps."""

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._internal.api import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from ._internal.attention.processor import TGateAttnProcessor
from ._internal.guidance.loop import TGateLoop
from ._internal.install.callback import TGateCallback
from ._internal.measure.calibration import calibrate_schedule
from ._internal.measure.convergence import TGateConvergence, measure_convergence
from ._internal.measure.cost import estimate_cost
from ._internal.measure.cost_result import TGateCost
from ._internal.measure.macs import MACs
from ._internal.plan.report import TGateReport
from ._internal.plan.schedule import TGateSchedule

if _TYPE_CHECKING:
    from ._internal.install.own_guider import TGateGuidance

__version__ = "0.1.0"

__all__ = [
    "MACs",
    "TGateAttnProcessor",
    "TGateCallback",
    "TGateConvergence",
    "TGateCost",
    "TGateGuidance",
    "TGateLoop",
    "TGateReport",
    "TGateSchedule",
    "apply_tgate",
    "calibrate_schedule",
    "estimate_cost",
    "get_tgate_report",
    "is_tgate_applied",
    "measure_convergence",
    "remove_tgate",
]

if _find_spec("diffusers.guiders") is None:
    __all__.remove("TGateGuidance")


def __getattr__(name: str) -> object:
    """Import what takes long, or needs a newer diffusers, only if it is asked for."""
    if name != "TGateGuidance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._internal.install.own_guider import TGateGuidance

    globals()[name] = TGateGuidance
    return TGateGuidance
