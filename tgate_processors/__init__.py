"""T-GATE for diffusers pipelines: reuse cross-attention, predict guidance, forecast whole steps."""

from ._internal.api import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from ._internal.attention.processor import TGateAttnProcessor
from ._internal.guidance.loop import TGateLoop
from ._internal.install.callback import TGateCallback
from ._internal.measure.calibration import calibrate_schedule
from ._internal.measure.convergence import TGateConvergence, measure_convergence
from ._internal.measure.cost import TGateCost, estimate_cost
from ._internal.measure.macs import MACs
from ._internal.plan.report import TGateReport
from ._internal.plan.schedule import TGateSchedule

__version__ = "0.1.0"

__all__ = [
    "MACs",
    "TGateAttnProcessor",
    "TGateCallback",
    "TGateConvergence",
    "TGateCost",
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
