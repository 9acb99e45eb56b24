"""A stage of training that can be killed at any moment and resumes from its last checkpoint."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import nn

WARM_UP = 200


@dataclass(frozen=True)
class Stage:
    """A module whose forward gives its loss, where its batches come from, and what to do after each checkpoint."""

    name: str
    module: nn.Module
    # From random numbers and the share of the stage that is done.
    batch: Callable[[torch.Generator, float], tuple[torch.Tensor, ...]]
    steps: int
    learning_rate: float
    # Is called with the number of steps while the module has its averaged weights.
    check: Callable[[int], None] = lambda step: None


def write(state: dict[str, Any], file: Path) -> None:
    """Write a checkpoint whole or not at all."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def generator(seed: int, *key: object) -> torch.Generator:
    """Random numbers that depend on nothing but the seed and the key."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: it rises, stays, and falls over the last quarter."""
    return min(1.0, (step + 1) / WARM_UP, 4 * (1 - step / steps) + 0.01)


class Training:
    """The weights of a stage, their exponential moving average, and the optimizer."""

    def __init__(self, stage: Stage, accelerator: Accelerator):
        self.stage = stage
        self.accelerator = accelerator
        optimizer = torch.optim.AdamW(stage.module.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.model, self.optimizer = accelerator.prepare(stage.module, optimizer)
        self.parameters = [parameter.detach() for parameter in stage.module.parameters()]
        self.average = [parameter.clone() for parameter in self.parameters]

    def state(self, step: int) -> dict[str, Any]:
        """All that resuming needs."""
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "parameters": self.parameters,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }

    def restore(self, file: Path) -> int:
        """Take what a checkpoint has, and return how many steps it has seen; 0 if there is none."""
        if not file.exists():
            return 0
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        torch._foreach_copy_(self.parameters, state["parameters"])
        torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def step(self, step: int, numbers: torch.Generator) -> torch.Tensor:
        """Learn from one batch and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * rate(step, self.stage.steps)
        batch = self.stage.batch(numbers, step / self.stage.steps)
        loss = self.model(*(tensor.to(self.accelerator.device) for tensor in batch))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.stage.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # The first weights are far from the last: at first the average forgets quickly.
        torch._foreach_lerp_(self.average, self.parameters, 1 - min(0.999, (1 + step) / (10 + step)))
        return loss.detach()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The module has its averaged weights."""
        trained = [parameter.clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, trained)


def fit(stage: Stage, accelerator: Accelerator, file: Path, seed: int, save_every: int, progress: Progress) -> None:
    """Train a stage from the checkpoint in `file` to its end, and leave the averaged weights in its module."""
    stage.module.train()
    training = Training(stage, accelerator)
    first = training.restore(file)
    task = progress.add_task(stage.name, total=stage.steps, completed=first, loss="")
    recent = None
    for step in range(first, stage.steps):
        # A batch depends on its step alone, so a resumed run is the same as one without interruption.
        loss = training.step(step, generator(seed, stage.name, step, accelerator.process_index))
        recent = loss if recent is None else torch.lerp(recent, loss, 0.02)
        done = step + 1
        if step % 10 == 0:
            progress.update(task, completed=done, loss=f"loss {recent.item():.4f}")
        if (done % save_every == 0 or done == stage.steps) and accelerator.is_main_process:
            write(training.state(done), file)
            progress.console.print(f"{stage.name}: step {done} of {stage.steps}, loss {recent.item():.4f}")
            with training.averaged():
                stage.check(done)
            stage.module.train()
    progress.update(task, completed=stage.steps)
    torch._foreach_copy_(training.parameters, training.average)
    accelerator.wait_for_everyone()
