"""What a type checker says of the public functions; an error that is expected has its `type: ignore`, and needs it."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from tgate_processors import (
    TGateCallback,
    TGateReport,
    TGateSchedule,
    apply_tgate,
    estimate_cost,
    get_tgate_report,
    is_tgate_applied,
    remove_tgate,
)


class Own(DiffusionPipeline):
    """A pipeline of the user's."""


def right(pipe: Own) -> None:
    assert_type(apply_tgate(pipe, 10), Own)
    assert_type(remove_tgate(pipe), Own)
    assert_type(is_tgate_applied(pipe), bool)
    assert_type(get_tgate_report(pipe), TGateReport)
    apply_tgate(pipe, np.int64(10))
    apply_tgate(pipe, TGateSchedule(10, sp_interval=2), cross_attention=False)
    apply_tgate(pipe, "FFFF-F--FH")
    TGateCallback(np.int64(10))
    estimate_cost(pipe, "auto", 25)
    apply_tgate(pipe, np.float32(0.4))
    apply_tgate(pipe, torch.tensor(10))
    apply_tgate(pipe, "auto", tolerance=np.float64(0.1))
    apply_tgate(pipe, custom_processors="leave", custom_forwards="gate")
    apply_tgate(pipe, 10, batch_arguments=("garment", "cross_attention_kwargs.features"))


def wrong(pipe: Own, module: torch.nn.Module) -> None:
    apply_tgate("stabilityai/sdxl-turbo")  # type: ignore[type-var]
    apply_tgate(Path("sdxl-turbo"))  # type: ignore[type-var]
    apply_tgate(module)  # type: ignore[type-var]
    apply_tgate(None)  # type: ignore[type-var]
    apply_tgate(10, pipe)  # type: ignore[type-var]
    apply_tgate(pipe, [10])  # type: ignore[arg-type]
    apply_tgate(pipe, sp_interval=2)  # type: ignore[call-arg]
    apply_tgate(pipe, guidance="none")  # type: ignore[arg-type]
    apply_tgate(pipe, custom_forwards="leave")  # type: ignore[arg-type]
    apply_tgate(pipe, TGateSchedule(sp_interval="2"))  # type: ignore[arg-type]
    remove_tgate("sdxl-turbo")  # type: ignore[type-var]
    is_tgate_applied(module)  # type: ignore[arg-type]
    get_tgate_report(module)  # type: ignore[arg-type]
