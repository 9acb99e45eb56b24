"""T-GATE for diffusers pipelines: reuse cross-attention, and predict guidance, once both have settled."""

from ._internal.callback import TGateCallback
from ._internal.convergence import TGateConvergence, measure_convergence
from ._internal.cost import TGateCost, estimate_cost
from ._internal.counting import MACs
from ._internal.patch import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from ._internal.processor import TGateAttnProcessor
from ._internal.report import TGateReport
from ._internal.schedule import TGateSchedule

__version__ = "0.1.0"

__all__ = [
    "MACs",
    "TGateAttnProcessor",
    "TGateCallback",
    "TGateConvergence",
    "TGateCost",
    "TGateReport",
    "TGateSchedule",
    "apply_tgate",
    "estimate_cost",
    "get_tgate_report",
    "is_tgate_applied",
    "measure_convergence",
    "remove_tgate",
]
