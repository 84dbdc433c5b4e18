"""The training loop: one process or many, resumable to the last bit, with a log and checkpoints."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.errors import CheckpointError, TrainingError
from dwattn.files import make_folder, require_writable, sole_writer
from dwattn.finetune.batches import in_step, micro_batches, move, read_batches
from dwattn.finetune.cache import TeacherCache
from dwattn.finetune.ema import Average
from dwattn.finetune.groups import param_groups
from dwattn.finetune.log import CsvLog
from dwattn.finetune.recipe import Recipe
from dwattn.finetune.state import (
    STATE_FILE,
    Progress,
    load_state,
    read_progress,
    remove_leftovers,
    save_state,
)
from dwattn.finetune.views import Order, Views, mix
from dwattn.progress import training_bar
from dwattn.ranks import Ranks


class Callback:
    """A user's hooks into the training loop; override what you need. ``trainer.stop()`` ends the run."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, and after a resume."""

    def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
        """After each optimiser step, the first being 1; losses are means over all processes."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written; in the main process only."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, with the final (averaged) weights in place."""


class Evaluate(Callback):
    """Calls ``function(module) -> {name: number}`` every so many steps and at the end, with averaged weights.

    Results are kept in ``history`` as ``(step, numbers)`` and, where the run has a folder, in ``eval.csv``.
    """

    def __init__(self, function: Callable[[nn.Module], dict[str, float]], every: int) -> None:
        self.function, self.every = function, every
        self.history: list[tuple[int, dict[str, float]]] = []
        self._log = CsvLog(None)

    def on_start(self, trainer: Trainer) -> None:
        path = None if trainer.folder is None or not trainer.main else trainer.folder / "eval.csv"
        # The row of the last step is written again at the end of the resumed run.
        self._log = CsvLog(path, min(trainer.step, trainer.recipe.steps - 1))
        # A stop amid an evaluation keeps the step, whose evaluation is still to come.
        if trainer._agreed(path is not None and self._log.last < trainer.step):
            self.on_step(trainer, trainer.step, {})

    def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
        if step % self.every == 0 and step < trainer.recipe.steps:
            with trainer.averaged():
                self._evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        mode = trainer.module.training
        trainer.module.eval()
        with torch.no_grad():
            found = self.function(trainer.module)
        trainer.module.train(mode)
        self.history.append((trainer.step, found))
        self._log.write({"step": trainer.step, **found})


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Args:
        steps: optimiser steps done; seconds: of training, over all resumed parts, without filling the cache.
        losses: means of the last logged steps.
        complete: False if a callback stopped it.
        notes: problems that did not end the run.
    """

    steps: int
    seconds: float
    losses: dict[str, float]
    complete: bool
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Trainer:
    """Trains ``module``, whose ``forward(batch)`` returns losses by name, ``loss`` among them.

    The same code runs on one CPU, one GPU, or many processes under ``torchrun`` or ``accelerate launch``.

    Args:
        module: for example :class:`dwattn.finetune.Distillation`; in place.
        data: images; see :class:`dwattn.finetune.Views`.
        recipe: how to train.
        folder: for ``state.safetensors`` and ``train.csv``; None writes nothing.
        groups: for AdamW; default: :func:`param_groups` as the recipe says, with ``module.head`` if there is one.
        callbacks: see :class:`Callback`.
        save_minutes: between checkpoints.
        device: ``cpu``, ``cuda`` or None for what accelerate finds.
        workers: processes that decode images.
        progress: show a progress bar with the time left.

    Raises:
        TrainingError: accelerate is missing, or the recipe does not fit the processes.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Views,
        recipe: Recipe,
        *,
        folder: str | Path | None = None,
        groups: list[dict[str, Any]] | None = None,
        callbacks: Sequence[Callback] = (),
        save_minutes: float = 5.0,
        device: str | None = None,
        workers: int = 0,
        progress: bool = True,
    ) -> None:
        self.module, self.data, self.recipe = module, data, recipe
        self.folder = None if folder is None else Path(folder)
        self.callbacks, self.save_minutes = list(callbacks), save_minutes
        self.workers, self.show_progress = workers, progress
        self.accelerator = _accelerator(device)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process
        self.world: int = self.accelerator.num_processes
        if recipe.batch_size % self.world:
            raise TrainingError(
                f"batch_size={recipe.batch_size} cannot be shared equally by {self.world} processes."
            )
        module.to(self.device)
        prepare = getattr(module, "prepare", None)
        if callable(prepare):
            prepare(self.device)
        if groups is None:
            groups = recipe_groups(module, recipe)
        # One pass over each parameter instead of eight: on a CPU a quarter of the time.
        self.optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._trained = [p for group in groups for p in group["params"]]
        self.average = None if recipe.ema is None else Average(module, recipe.ema)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self._fingerprint = data.fingerprint()
        self._settings = (
            settings() if callable(settings := getattr(module, "settings", None)) else {}
        )
        self.step = 0
        self.notes: list[str] = []
        self._seconds, self._stopped, self._updating = 0.0, False, False
        self._losses: dict[str, float] = {}

    def stop(self) -> None:
        """End the run after this step; a later one with ``resume=True`` goes on."""
        self._stopped = True

    def averaged(self) -> AbstractContextManager[None]:
        """The module with its averaged weights, where the recipe averages."""
        return nullcontext() if self.average is None else self.average.applied()

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Run to the end of the recipe; the module then holds the final (averaged) weights.

        Args:
            resume: go on from the checkpoint in the folder, if there is one. On the same machine and number of
                processes the weights are then those of a run that was never interrupted, bit for bit on a CPU.

        Raises:
            TrainingError: a loss or gradient that is not finite, or a folder that holds another run or in which another process
                is at work.
            DataError: an image that cannot be read (in another process: DwattnError).
            CheckpointError: the final state cannot be written.
            KeyboardInterrupt: Ctrl-C. Before this and any other error between two steps a checkpoint is written.
        """
        with self._alone():
            return self._fit(resume)

    def _fit(self, resume: bool) -> TrainingResult:
        self._stopped = False
        self._start(resume)
        self._fill_cache()
        distributed = self.accelerator.prepare(self.module) if self.world > 1 else self.module
        self.module.train()
        for callback in self.callbacks:
            callback.on_start(self)
        with torch.random.fork_rng():
            try:
                self._loop(distributed)
            except BaseException:
                # Ctrl-C, SIGTERM or an image that cannot be read should not cost what was trained before.
                if not self._updating and (self.average is None or self.average.whole):
                    self._try(self._save)
                raise
        self._save()
        complete = self.step == self.recipe.steps
        if complete:
            if self.average is not None:
                self.average.swap()
            self.module.eval()
            for callback in self.callbacks:
                callback.on_end(self)
        return TrainingResult(self.step, self._seconds, self._losses, complete, self.notes)

    def _loop(self, module: nn.Module) -> None:
        log = CsvLog(self._path("train.csv"), self.step)
        if log.last < self.step:  # stopped between a step and its row
            self._try(partial(log.write, self._row()))
        started, saved = time.perf_counter() - self._seconds, time.perf_counter()
        with training_bar(self.show_progress and self.main) as bar:
            task = bar.add_task("training", total=self.recipe.steps, completed=self.step, note="")
            for batch in self.batches():
                self.train_step(module, batch)
                self._seconds = time.perf_counter() - started
                self._try(partial(log.write, self._row()))
                bar.update(task, completed=self.step, note=f"loss {self._losses['loss']:.4g}")
                for callback in self.callbacks:
                    callback.on_step(self, self.step, self._losses)
                if self._agreed(self._stopped):
                    return
                if time.perf_counter() - saved > 60 * self.save_minutes:
                    self._try(self._save)
                    saved = time.perf_counter()

    def _agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop: all of them do so together."""
        if self.world == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _row(self) -> dict[str, float]:
        rate = self.recipe.lr * self.recipe.rate(self.step - 1)
        return {"step": self.step, **self._losses, "lr": rate}

    def _alone(self) -> AbstractContextManager[None]:
        """The folder, made if need be, for this run alone."""
        if self.folder is None:
            return nullcontext()
        make_folder(self.folder, CheckpointError)
        if not self.main:
            return nullcontext()
        require_writable(self.folder / STATE_FILE, CheckpointError)
        return sole_writer(self.folder, TrainingError)

    def _start(self, resume: bool) -> None:
        if self.folder is None:
            return
        if self.main:
            remove_leftovers(self.folder)
        found = read_progress(self.folder)
        if found is None:
            return
        if not resume:
            raise TrainingError(
                f"{self.folder} holds a run of {found.step} steps; resume it (--resume), or give an empty folder."
            )
        different = self.recipe.differences(found.recipe)
        if different:
            raise TrainingError(
                f"{self.folder} holds a run with {different}; resume it with its own recipe."
            )
        # Read back as those in the folder were: a tuple is a list then.
        mine = Progress.model_validate_json(self._progress().model_dump_json())
        # Older states hold less; what they do not say is taken to be as it is now.
        if {**mine.settings, **found.settings} != mine.settings:
            raise TrainingError(
                f"{self.folder} holds a run with the settings {found.settings}, now they are {mine.settings}; "
                f"resume it with its own."
            )
        if (found.data, found.images) != (self._fingerprint, len(self.data)):
            raise TrainingError(
                f"{self.folder} was trained on {found.images} other images than these {len(self.data)}, or with another size, "
                f"normalisation, augmentation, seed or labels of theirs; resume with the same, or start in an empty folder."
            )
        load_state(self.folder, self.module, self.optimizer, self.average)
        if found.scaler:
            self.scaler.load_state_dict(dict(found.scaler))
        self.step, self._seconds, self._losses = found.step, found.seconds, found.losses

    def _order(self, start: int) -> Order:
        recipe = self.recipe
        return Order(
            len(self.data), recipe.batch_size, recipe.seed, recipe.views, recipe.steps, start,
            self.accelerator.process_index, self.world,
        )  # fmt: skip

    def batches(self) -> Iterator[dict[str, Any]]:
        """From the step on at which the run is, in all processes as many."""
        batches = read_batches(
            self.data, self._order(self.step), workers=self.workers, pin=self.device.type == "cuda"
        )
        ranks = Ranks(self.accelerator.process_index, self.world)
        return in_step(batches, ranks, self._agreed)

    def _fill_cache(self) -> None:
        """Let the teacher see, once and in a fixed order, the views that will come again."""
        cache, teach = getattr(self.module, "cache", None), getattr(self.module, "_teach", None)
        if not isinstance(cache, TeacherCache) or teach is None or not cache.limit:
            return
        keys = self._order(0).distinct()
        source = (self._fingerprint, keys)
        if cache.source == source:
            return
        cache.clear()
        items = (((index, view), self.data[index, view]["pixels"]) for index, view in keys)
        with training_bar(self.show_progress and self.main) as bar:
            task = bar.add_task("teacher", total=len(keys), note="")
            cache.fill(items, teach, self.device, lambda count: bar.advance(task, count))
        cache.source = source

    def train_step(self, module: nn.Module, batch: dict[str, Any]) -> None:
        """Train on a batch; its losses are kept as means over all processes."""
        # Dropout too depends on the step alone.
        torch.manual_seed(mix(self.recipe.seed, self.step, self.accelerator.process_index))
        rate = self.recipe.rate(self.step)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(micro_batches(batch, self.recipe.micro_batch))
        total: dict[str, Tensor] = {}
        for number, (part, share) in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(module):
                with self.recipe.autocast(self.device.type):
                    losses = module(move(part, self.device))
                self.scaler.scale(losses["loss"] * share).backward()
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * share
        self.scaler.unscale_(self.optimizer)
        means, norm = self._reduced(total, self._clipped())
        self._check(means, norm)
        self._updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.step)
        self.step, self._losses = self.step + 1, means
        self._updating = False

    def _clipped(self) -> Tensor:
        """The norm of the gradients as they were, which are clipped if the recipe says so."""
        if self.recipe.clip is not None:
            return nn.utils.clip_grad_norm_(self._trained, self.recipe.clip)
        return nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])

    def _reduced(self, losses: dict[str, Tensor], norm: Tensor) -> tuple[dict[str, float], float]:
        """Means over the processes, fetched from the device together: each fetch waits for it."""
        values = [value.float() for value in (*losses.values(), norm.to(self.device))]
        stacked = torch.stack(values)
        if self.world > 1:
            stacked = self.accelerator.reduce(stacked, reduction="mean")
        *means, mean_norm = stacked.tolist()
        return dict(zip(losses, means, strict=True)), mean_norm

    def _check(self, losses: dict[str, float], norm: float) -> None:
        found = {"loss": losses["loss"]}
        if not self.scaler.is_enabled():  # which leaves steps out in which gradients overflow
            found["norm of the gradients"] = norm
        for what, value in found.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"The {what} is {value} at step {self.step + 1} ({losses}); the weights are those before it. "
                    f"Use a lower lr than {self.recipe.lr:g}, a longer warm-up, or amp='no'."
                )

    def _progress(self) -> Progress:
        scaler = {k: v for k, v in self.scaler.state_dict().items() if isinstance(v, (int, float))}
        return Progress(
            step=self.step, seconds=round(self._seconds, 3), recipe=self.recipe,
            data=self._fingerprint, images=len(self.data), losses=self._losses, settings=self._settings,
            scaler=scaler,
        )  # fmt: skip

    def _save(self) -> None:
        if self.folder is None or not self.main:
            return
        path = save_state(self.folder, self._progress(), self.module, self.optimizer, self.average)
        for callback in self.callbacks:
            callback.on_checkpoint(self, path)

    def _try(self, write: Callable[[], None]) -> None:
        """Go on if something cannot be written meanwhile: the last checkpoint is still there."""
        try:
            write()
        except CheckpointError as error:
            if str(error) not in self.notes:
                self.notes.append(str(error))

    def _path(self, name: str) -> Path | None:
        return self.folder / name if self.folder is not None and self.main else None


def recipe_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """:func:`param_groups` of a training module as a recipe says."""
    head = getattr(module, "head", None)
    return param_groups(
        module, lr=recipe.lr, kernel_lr=recipe.kernel_lr, gate_lr=recipe.gate_lr, weight_decay=recipe.weight_decay,
        train="head" if getattr(module, "frozen", False) else recipe.train,
        head=head if isinstance(head, nn.Module) else None, head_lr=recipe.head_lr,
    )  # fmt: skip


def _accelerator(device: str | None) -> Any:
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise TrainingError(
            f"Training needs accelerate ({error}); install it with pip install 'dwattn[train]'."
        ) from error
    if device not in (None, "cpu", "cuda"):
        raise TrainingError(
            f"device={device!r} must be cpu, cuda or None; CUDA_VISIBLE_DEVICES chooses among several GPUs."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device='cuda' was asked for, but this torch finds no GPU.")
    # Layers that the losses do not reach, such as a classifier in distillation, have no gradients.
    handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = accelerate.Accelerator(cpu=device == "cpu", kwargs_handlers=[handler])
        taken = device is not None and accelerator.device.type != device
        reason = f"accelerate keeps to {accelerator.device.type}" if taken else ""
    except ValueError as error:
        reason = str(error)
    if reason:
        raise TrainingError(
            f"device={device!r} is not available in this process ({reason}); start another one for it."
        )
    return accelerator
