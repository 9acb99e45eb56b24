"""
Train a small but complete text-to-image pipeline from scratch on emoji of two vendors, with their names as captions.

    python -m examples.testbeds.train_emoji --output runs/emoji-sd
    python -m examples.testbeds.train_emoji --model sd3 --output runs/emoji-sd3

The pictures come from two npm packages, which npm fetches if they are not in the folder of --packages. If training is
interrupted, start it again with the same arguments: it resumes from its last checkpoint. At the end the pipeline is in
OUTPUT/pipeline.
"""

import enum
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.testbeds.emoji import data, joint, learning, networks
from examples.testbeds.shapes import tokens
from examples.testbeds.shapes.learning import Conditioned
from examples.testbeds.shapes.networks import TEXT_WIDTH, clip_encoder, pipeline, save
from examples.testbeds.shapes.stages import Stage, fit
from examples.testbeds.train_shapes import Precision, accelerator_for, attention, claim

PACKAGES = Path("runs/emoji-packages")


class Model(enum.StrEnum):
    """What is trained."""

    sd = "sd"
    sd3 = "sd3"


def untrained(
    model: Model, folder: Path
) -> tuple[Any, learning.Reading, Callable[[list[str]], torch.Tensor], Callable[..., Any]]:
    """The text encoder with the denoiser, what teaches it to read, what makes tokens, and what makes a pipeline."""
    if model is Model.sd3:
        tokenizers = joint.Tokenizers(folder)
        conditioned = joint.conditioned(tokenizers)
        reading = learning.Reading(conditioned.text_encoder, joint.TEXT_WIDTH)
        return conditioned, reading, tokenizers, partial(joint.pipeline, tokenizers=tokenizers)
    tokenizer = tokens.load("sd", folder / "tokenizer")
    plain = Conditioned(clip_encoder(tokenizer), networks.unet(), tokenizer.pad_token_id)
    reading = learning.Reading(plain.text_encoder, TEXT_WIDTH)
    return plain, reading, partial(tokens.encode, tokenizer), partial(pipeline, tokenizer=tokenizer)


def main(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the pipeline.")],
    model: Annotated[Model, typer.Option(help="Stable Diffusion, or Stable Diffusion 3 (joint attention).")] = Model.sd,
    packages: Annotated[Path, typer.Option(help="Folder of the two npm packages.")] = PACKAGES,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the denoiser.")] = 8000,
    reader_steps: Annotated[int, typer.Option(min=1, help="Steps of the text encoder alone.")] = 1000,
    decoder_steps: Annotated[int, typer.Option(min=1)] = 1300,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures for each step and process.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of the denoiser and the text encoder.")] = 1e-3,
    copies: Annotated[int, typer.Option(min=1, help="Pictures of each caption.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; accelerate's choice if not given.")] = None,
    mixed_precision: Annotated[Precision, typer.Option(help="While the networks train.")] = Precision.no,
    smoke: Annotated[bool, typer.Option(help="A few pictures only, to see whether it runs.")] = False,
) -> None:
    """Train a small text-to-image pipeline on emoji."""
    accelerator = accelerator_for(device, mixed_precision)
    settings: dict[str, Any] = {
        "model": model.value,
        "seed": seed,
        "batch_size": batch_size,
        "copies": copies,
        "smoke": smoke,
    }
    if accelerator.is_main_process:
        claim(output, settings)
        captions = [caption for scene in data.everything(packages) for caption in scene.captions]
        tokens.make("sd", captions, output / "tokenizer")
        if model is Model.sd3:
            tokens.make(model.value, captions, output / "tokenizer_3")
    accelerator.wait_for_everyone()
    console = Console(quiet=not accelerator.is_main_process)

    torch.manual_seed(seed)
    drawn = data.drawn(packages, seed, copies, every=40 if smoke else 1)
    vae = networks.autoencoder(drawn.mean, drawn.components)
    conditioned, reading, encode, join = untrained(model, output)
    for network in (vae, conditioned.denoiser):
        network.to(memory_format=torch.channels_last)
    batches = data.Batches(drawn, encode, batch_size)
    build = partial(join, vae, conditioned.text_encoder, conditioned.denoiser)
    stages = [
        Stage("reader", reading, batches.questions, reader_steps, learning_rate),
        Stage("denoiser", conditioned, batches.noisy, steps, learning_rate),
        Stage("decoder", learning.Decoding(vae), batches.encoded, decoder_steps, 2e-3),
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress, attention(accelerator):
        for stage in stages:
            fit(stage, accelerator, output / f"{stage.name}.pt", seed, save_every, progress)
    if accelerator.is_main_process:
        save(build(), output / "pipeline", output / "tokenizer")
        console.print(f"Pipeline: {(output / 'pipeline').resolve()}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
