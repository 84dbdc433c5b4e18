"""What a run will take, measured on one batch before anything is trained."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from dwattn.finetune.batches import micro_batches, move
from dwattn.finetune.distill import Distillation
from dwattn.finetune.recipe import Recipe
from dwattn.finetune.trainer import Trainer
from dwattn.finetune.views import Views
from dwattn.printed import Printed

MIB = 2**20


@dataclass(frozen=True)
class Estimate(Printed):
    """Of a run in one process on this machine.

    Args:
        steps: of the recipe; seconds_per_step: measured, reading the images included.
        trained: parameters that are trained; parameters: all of them.
        weights, gradients, optimizer, average, activations: bytes; activations of one micro-batch.
        held: bytes of a teacher and its cache.
        checkpoint: bytes of a checkpoint file.
    """

    steps: int
    seconds_per_step: float
    trained: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    held: int
    checkpoint: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.seconds_per_step

    @property
    def memory(self) -> int:
        """Bytes in all, without what torch itself and the images need."""
        trained = self.gradients + self.optimizer + self.average
        return self.weights + trained + self.activations + self.held

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "seconds": self.seconds, "memory": self.memory}

    def table(self) -> Table:
        """For people."""
        table = Table(title="A run would take", title_justify="left", show_header=False)
        minutes = self.seconds / 60
        rows = [
            ("time", f"{minutes:.1f} min: {self.steps} steps of {self.seconds_per_step:.2f} s"),
            ("trained parameters", f"{self.trained:,} of {self.parameters:,}"),
            ("memory", f"{self.memory / MIB:.0f} MiB"),
            ("  weights", f"{self.weights / MIB:.0f} MiB"),
            ("  gradients", f"{self.gradients / MIB:.0f} MiB"),
            ("  optimizer", f"{(self.optimizer + self.average) / MIB:.0f} MiB"),
            ("  activations", f"{self.activations / MIB:.0f} MiB"),
            ("  teacher and cache", f"{self.held / MIB:.0f} MiB"),
            ("checkpoint on disk", f"{self.checkpoint / MIB:.0f} MiB"),
        ]
        for row in rows:
            table.add_row(*row)
        return table


def estimate(
    module: nn.Module, data: Views, recipe: Recipe, *, device: str | None = None, repeats: int = 2
) -> Estimate:
    """Measure steps of a private copy; the module and the random state stay as they are.

    Args:
        module: a training module; data, recipe, device: as for :class:`dwattn.finetune.Trainer`.
        repeats: timed steps, after one untimed step.

    Raises:
        TrainingError: as of a run.
    """
    with torch.random.fork_rng():
        copied = copy.deepcopy(module)
        short = recipe.but(steps=repeats + 1)
        trainer = Trainer(copied, data, short, device=device, progress=False)
        copied.train()
        activations, times = _activations(trainer), []
        batches = trainer.batches()
        for _ in range(short.steps):
            start = time.perf_counter()
            trainer.train_step(copied, next(batches))
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            times.append(time.perf_counter() - start)
    groups = trainer.optimizer.param_groups
    trained = [p for group in groups for p in group["params"]]
    size = sum(p.numel() * p.element_size() for p in trained)
    weights = sum(t.numel() * t.element_size() for t in [*copied.parameters(), *copied.buffers()])
    average = size if recipe.ema is not None else 0
    return Estimate(
        steps=recipe.steps,
        seconds_per_step=min(times[1:] or times),
        trained=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in copied.parameters()),
        weights=weights,
        gradients=size,
        optimizer=2 * size,
        average=average,
        activations=activations,
        held=module.held_bytes() if isinstance(module, Distillation) else 0,
        checkpoint=weights + 2 * size + average,
    )


def _activations(trainer: Trainer) -> int:
    """Bytes that one micro-batch keeps for its backward pass."""
    part, _ = next(micro_batches(next(trainer.batches()), trainer.recipe.micro_batch))
    with _Saved(trainer.module) as saved, trainer.recipe.autocast(trainer.device.type):
        trainer.module(move(part, trainer.device))
    return saved.bytes


class _Saved:
    """Bytes that autograd keeps for the backward pass, parameters not counted."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        self._hooks.__exit__(*reason)
