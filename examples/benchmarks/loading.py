"""How the scripts load a pipeline, and what they say if a device or a type is not available."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import typer
from packaging.version import Version

MODELS = Path(__file__).parents[1] / "models"
DTYPES = ("float32", "float16", "bfloat16")
OTHER_NAMES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
# Diffusers before 0.40 knows the argument under its older name only.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"


def one_of(option: str, given: list[str], known: Any) -> list[str]:
    """The given names, if all of them are known."""
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{option}={name!r} is unknown: pass one of {', '.join(known)}")
    return given


def check_dtype(dtype: str) -> str:
    """One of the types, or an error that names the one to give."""
    if dtype not in DTYPES:
        name = dtype.removeprefix("torch.").lower()
        meant = OTHER_NAMES.get(name, name if name in DTYPES else f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        raise typer.BadParameter(f"dtype={dtype!r} is unknown: pass {meant}")
    return dtype


def check_device(device: str) -> str:
    """A device that torch finds here."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise typer.BadParameter(f"device={device!r} is unknown: pass cpu, cuda or mps") from error
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(kind, False):
        name = {"cuda": "CUDA", "mps": "Metal"}[kind]
        built = "" if kind != "cuda" or torch.version.cuda else f": torch {torch.__version__} is built without it"
        raise typer.BadParameter(f"device={device!r}, but torch finds no {name} here{built}. Give --device cpu")
    return device


def load_pipeline(model: str, device: Any, dtype: str, variant: str | None = None) -> Any:
    """The pipeline from a folder or the hub, without its progress bar."""
    options = {DTYPE: getattr(torch, dtype), **({"variant": variant} if variant else {})}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **options)
    # There is no such model, or it has no such files.
    except (OSError, ValueError) as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
