"""
Train a small but complete text-to-image or text-to-video pipeline from scratch, on drawn scenes with captions.

    python -m examples.testbeds.train_shapes --model sd --output runs/shapes-sd
    python -m examples.testbeds.train_shapes --model pixart --output runs/shapes-pixart --mixed-precision bf16
    python -m examples.testbeds.train_shapes --model wan --output runs/shapes-wan --mixed-precision bf16
    accelerate launch --num-processes 2 -m examples.testbeds.train_shapes --model sd --output runs/shapes-sd

If training is interrupted, start it again with the same arguments: it resumes from its last checkpoint. At the end the
pipeline is in OUTPUT/pipeline.
"""

import contextlib
import enum
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.testbeds.shapes import data, evaluation, learning, networks, tokens
from examples.testbeds.shapes.stages import Stage, fit


class Model(enum.StrEnum):
    """What is trained."""

    sd = "sd"
    pixart = "pixart"
    wan = "wan"


class Precision(enum.StrEnum):
    """Accelerate's names."""

    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


def accelerator_for(device: str | None, precision: Precision) -> Accelerator:
    """Accelerate on the wanted device."""
    if precision is Precision.fp16 and device == "cpu":
        raise typer.BadParameter("mixed_precision='fp16' does not work on a CPU: pass 'bf16' or 'no'")
    accelerator = Accelerator(mixed_precision=precision.value, cpu=device == "cpu")
    if device not in (None, accelerator.device.type):
        raise typer.BadParameter(
            f"device={device!r} is not what accelerate finds here, {accelerator.device.type!r}: "
            "leave --device out, or install torch for that device"
        )
    return accelerator


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or refuse one that has a run with other settings: the two would be mixed."""
    file = output / "settings.json"
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"output={str(output)!r} is a file: pass a folder")
    if file.exists():
        earlier = json.loads(file.read_text())
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise typer.BadParameter(
                    f"{name}={value!r}, but the run in {str(output)!r} has {earlier.get(name)!r}: "
                    "pass the same to resume it, or another --output"
                )
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def attention(accelerator: Accelerator) -> contextlib.AbstractContextManager[None]:
    """On a CPU fused attention is slower in bfloat16 than plain products."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def checker(model: str, build: Callable[[], Any], count: int, console: Console) -> Callable[[int], None]:
    """Prints how many of `count` held-out prompts come out right, without guidance and with it."""
    scenes = evaluation.held_out(model, count // 2, count - count // 2)

    def check(step: int) -> None:
        if not count:
            return
        pipe = build()
        pipe.set_progress_bar_config(disable=True)
        for guidance in (1.0, 3.0):
            parts = evaluation.measure(pipe, scenes, guidance_scale=guidance, num_inference_steps=25)
            shares = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
            console.print(f"step {step}, guidance {guidance:g}: {shares}", soft_wrap=True)

    return check


def untrained(
    model: Model, tokenizer: Any
) -> tuple[Any, learning.Conditioned, learning.Autoencoding, Callable[[], Any]]:
    """The autoencoder, the text encoder with the denoiser, the autoencoder's loss, and what makes a pipeline."""
    if model is Model.wan:
        # Older diffusers have none.
        from examples.testbeds.shapes import wan

        vae, conditioned = wan.autoencoder(), wan.conditioned(tokenizer)
        coding, join = wan.ClipAutoencoding(vae), wan.pipeline
    else:
        vae, conditioned = networks.autoencoder(), learning.conditioned(model.value, tokenizer)
        coding, join = learning.Autoencoding(vae), networks.pipeline
    return vae, conditioned, coding, partial(join, vae, conditioned.text_encoder, conditioned.denoiser, tokenizer)


def further(vae: Any) -> Any:
    """What trains the decoder of clips alone."""
    from examples.testbeds.shapes import wan

    return wan.ClipDecoding(vae)


def main(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the pipeline.")],
    model: Annotated[Model, typer.Option(help="Stable Diffusion, PixArt (transformer) or Wan (video).")] = Model.sd,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the denoiser.")] = 2500,
    autoencoder_steps: Annotated[int, typer.Option(min=1)] = 1000,
    decoder_steps: Annotated[int, typer.Option(min=0, help="Wan: the decoder alone, after the autoencoder.")] = 1000,
    reader_steps: Annotated[int, typer.Option(min=1, help="Steps of the text encoder alone.")] = 1500,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures for each step and process.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of the denoiser and the text encoder.")] = 1e-3,
    copies: Annotated[int, typer.Option(min=1, help="Pictures drawn of each caption.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    check_prompts: Annotated[int, typer.Option(min=0, help="Held-out prompts to score at each checkpoint.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; accelerate's choice if not given.")] = None,
    mixed_precision: Annotated[Precision, typer.Option(help="While the networks train.")] = Precision.no,
    smoke: Annotated[bool, typer.Option(help="A few scenes only, to see whether it runs.")] = False,
) -> None:
    """Train a small text-to-image or text-to-video pipeline from scratch."""
    accelerator = accelerator_for(device, mixed_precision)
    settings = {"model": model.value, "seed": seed, "batch_size": batch_size, "copies": copies, "smoke": smoke}
    if accelerator.is_main_process:
        claim(output, settings)
        tokens.make(model.value, [scene.caption for scene in data.everything(model.value)], output / "tokenizer")
    accelerator.wait_for_everyone()
    tokenizer = tokens.load(model.value, output / "tokenizer")
    console = Console(quiet=not accelerator.is_main_process)

    torch.manual_seed(seed)
    vae, conditioned, coding, build = untrained(model, tokenizer)
    drawn = data.drawn(model.value, seed, copies, every=40 if smoke else 1)
    batches = data.Batches(drawn, tokenizer, batch_size)
    check = checker(model.value, build, check_prompts, console)
    reader = Stage(
        "reader",
        learning.Reading(conditioned, pictures=2 if model is Model.wan else 1),
        batches.questions,
        reader_steps,
        learning_rate,
    )
    coder = Stage("autoencoder", coding, batches.pictures, autoencoder_steps, 2e-3)
    denoiser = Stage("denoiser", conditioned, batches.noisy, steps, learning_rate, check)
    stages = [reader, coder, denoiser]
    if model is Model.wan and decoder_steps:
        stages.insert(2, Stage("decoder", further(vae), batches.encoded, decoder_steps, 2e-3))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress, attention(accelerator):
        for stage in stages:
            fit(stage, accelerator, output / f"{stage.name}.pt", seed, save_every, progress)
            if stage is coder:
                data.encode_pictures(drawn, vae)
    if accelerator.is_main_process:
        networks.save(build(), output / "pipeline", output / "tokenizer")
        by = "" if accelerator.num_processes == 1 else f", trained by {accelerator.num_processes} processes"
        console.print(f"Pipeline: {(output / 'pipeline').resolve()}{by}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
