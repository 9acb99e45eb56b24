"""T-GATE for diffusers pipelines: cross-attention and guidance stop at a gate step."""

from .callback import TGateCallback
from .convergence import TGateConvergence, measure_convergence
from .cost import TGateCost, estimate_cost
from .counting import MACs
from .patch import apply_tgate, get_tgate_report, is_tgate_applied, remove_tgate
from .processor import TGateAttnProcessor
from .report import TGateReport
from .schedule import TGateSchedule

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
