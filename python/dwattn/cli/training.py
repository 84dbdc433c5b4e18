"""``dwattn finetune``: train a converted model, without labels or for a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dwattn.cli.common import (
    AmpOption,
    BatchOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    ProgressOption,
    SizeOption,
    StdOption,
    WeightsOption,
    command,
    emit,
    image_size,
    normalisation,
    note,
    require_readable,
)
from dwattn.errors import CheckpointError, TrainingError
from dwattn.files import require_apart

if TYPE_CHECKING:
    from torch import nn

    from dwattn.finetune import Recipe, Task, TrainingResult, Views

TASKS = ("distill", "classify", "segment")


@command
def finetune(
    context: typer.Context,
    model: ModelArgument,
    student: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDENT]",
            help="File written by dwattn replace; without it (tasks only) the model as it is.",
        ),
    ] = None,
    *,
    images: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Training images; for classify one folder a class in it."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder for checkpoints, train.csv and the trained student."
        ),
    ] = Path("finetune"),
    task: Annotated[
        str, typer.Option(help="distill (no labels, from the original), classify or segment.")
    ] = "distill",
    masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="segment: masks of the same names (.png).")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="segment: number of classes.")] = None,
    test_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tasks: images to measure on at the end.")
    ] = None,
    test_masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="segment: masks of --test-images.")
    ] = None,
    pool: Annotated[str, typer.Option(help="classify: mean of the patch tokens, or cls.")] = "mean",
    split: Annotated[
        bool,
        typer.Option(
            "--split", help="Tasks: ViT-Split heads beside a backbone that stays as it is."
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times each image is seen, instead.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="As many steps as this machine makes in this time, instead."),
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    kernel_lr: Annotated[float, typer.Option(help="Factor on it for kernels.")] = 10.0,
    weight_decay: Annotated[
        float | None, typer.Option(help="Default: 0 for distill, 0.05 for tasks.")
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.05,
    train: Annotated[
        str, typer.Option(help="all, blocks (with replaced layers), replaced, or head.")
    ] = "all",
    batch_size: BatchOption = 8,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once in a process, to save memory.")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Average the weights with this decay.")] = None,
    amp: AmpOption = "no",
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Different crops of an image before they repeat; default: never."),
    ] = None,
    features: Annotated[float, typer.Option(help="distill: weight of the feature error.")] = 0.0,
    blocks: Annotated[float, typer.Option(help="distill: weight of the error by block.")] = 0.0,
    output: Annotated[float, typer.Option(help="distill: weight of the model's output.")] = 0.0,
    output_loss: Annotated[str, typer.Option(help="auto, kl, mse or binary.")] = "auto",
    cache: Annotated[
        int, typer.Option(min=0, metavar="MB", help="distill: memory for the original's features.")
    ] = 0,
    colour: Annotated[float, typer.Option(help="Colour jitter, from 0 to below 1.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything random.")] = 0,
    size: SizeOption = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what is there.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    save_minutes: Annotated[float, typer.Option(min=0.0, help="Between checkpoints.")] = 5.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its own recipe.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure time and memory of a run, and stop.")
    ] = False,
    progress: ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Recover accuracy by training: from the original without labels, or for a task."""
    from dwattn.finetune import Augment, Distillation, Targets, Trainer, estimate

    for name in ("student", "backbone"):
        require_apart(out / f"{name}.safetensors", CheckpointError, (student, weights))
    check_usage(task, student, masks, classes, test_images, test_masks, steps, epochs, minutes)
    if split and task == "distill":
        raise typer.BadParameter("--split is for tasks; distill has no head.")
    targets = None
    if task == "distill":
        targets = Targets(
            features=features, blocks=blocks, output=output, output_loss=cast(Any, output_loss)
        )
    original, trained = _models(model, student, weights, wants_teacher=targets is not None)
    pixels = image_size(trained, size)
    norm = normalisation(trained, model, mean, std)
    note(f"Images from {images} at {pixels[0]} x {pixels[1]}, normalised with {norm.source}.")
    folder = Folders(task, pixels, norm.mean, norm.std, classes, seed)
    data = folder.read(images, masks, Augment(colour=colour))
    tested = None if test_images is None else folder.read(test_images, test_masks, None)
    module: nn.Module
    if targets is not None:
        module = Distillation(trained, original, targets=targets, cache=cache * 2**20)
    else:
        module = build_task(task, trained, folder, pool, split, seed)
    if weight_decay is None:
        weight_decay = 0.05 if targets is None else 0.0
    options: dict[str, Any] = {
        "batch_size": batch_size, "micro_batch": micro_batch, "lr": lr, "kernel_lr": kernel_lr,
        "weight_decay": weight_decay, "warmup": warmup, "train": train, "ema": ema, "amp": amp,
        "views": views, "seed": seed,
    }  # fmt: skip
    recipe = _resumed(out, context, options, steps, epochs, len(data)) if resume else None
    if recipe is None:
        recipe = _recipe(options, steps, epochs, minutes, module, data, device)
    if dry_run:
        emit(estimate(module, data, recipe, device=device), as_json)
        return
    trainer = Trainer(
        module, data, recipe, folder=out, save_minutes=save_minutes, device=device,
        workers=workers, progress=progress,
    )  # fmt: skip
    result = trainer.fit(resume=resume)
    if trainer.main:
        _finish(out, module, trained, tested, result, recipe, as_json)


def check_usage(
    task: str,
    student: Path | None,
    masks: Path | None,
    classes: int | None,
    test_images: Path | None,
    test_masks: Path | None,
    steps: int | None,
    epochs: float | None,
    minutes: float | None,
) -> None:
    if task not in TASKS:
        raise typer.BadParameter(f"--task {task} must be one of {', '.join(TASKS)}.")
    if task == "distill" and student is None:
        raise typer.BadParameter(
            "Name the STUDENT written by dwattn replace: it learns from MODEL."
        )
    if task == "distill" and test_images is not None:
        raise typer.BadParameter("--test-images measures tasks; distill has no labels.")
    given = {masks is not None, classes is not None}
    if given != {task == "segment"}:
        raise typer.BadParameter("segment, and only segment, needs --masks DIR and --classes N.")
    if task == "segment" and (test_images is None) != (test_masks is None):
        raise typer.BadParameter("Give --test-images and --test-masks together.")
    if sum(value is not None for value in (steps, epochs, minutes)) > 1:
        raise typer.BadParameter("Give one of --steps, --epochs and --minutes.")


def _models(
    spec: str, student: Path | None, weights: Path | None, *, wants_teacher: bool
) -> tuple[nn.Module | None, nn.Module]:
    """The original where it teaches, and the model to train."""
    import dwattn
    from dwattn.models import load_model

    original = load_model(spec, weights) if wants_teacher or student is None else None
    if student is None:
        assert original is not None
        return None, original
    return original, dwattn.load(load_model(spec, weights, pretrained=False), student)


class Folders:
    """Training and test images of a task, read alike."""

    def __init__(
        self,
        task: str,
        size: tuple[int, int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        classes: int | None,
        seed: int,
    ) -> None:
        self.task, self.size, self.mean, self.std, self.seed = task, size, mean, std, seed
        self.classes = classes
        self.names: list[str] | None = None

    def read(self, images: Path, masks: Path | None, augment: Any) -> Views:
        from dwattn.finetune import Views
        from dwattn.finetune.labelled import MaskFolder, labelled_folder
        from dwattn.image_files import image_folder

        common: dict[str, Any] = {"augment": augment, "seed": self.seed}
        if self.task == "distill":
            photos = image_folder(images, self.size, self.mean, self.std)
            require_readable(photos)
            return Views(photos, **common)
        common |= {"mean": self.mean, "std": self.std}
        if self.task == "segment":
            assert masks is not None
            assert self.classes is not None
            return MaskFolder(images, masks, self.size, self.classes, **common)
        data, names = labelled_folder(images, self.size, classes=self.names, **common)
        require_readable(data.images)
        self.names, self.classes = names, len(names)
        return data


def build_task(
    task: str, trained: nn.Module, folder: Folders, pool: str, split: bool, seed: int
) -> Task:
    from dwattn.finetune import classifier, segmenter

    assert folder.classes is not None
    if task == "classify":
        return classifier(trained, folder.classes, pool=pool, split=split, seed=seed)
    return segmenter(trained, folder.classes, split=split, seed=seed)


def _resumed(
    out: Path,
    context: typer.Context,
    options: dict[str, Any],
    steps: int | None,
    epochs: float | None,
    images: int,
) -> Recipe | None:
    """The recipe of the run in ``out``, which options that were typed must not contradict."""
    from dwattn.finetune import steps_for
    from dwattn.finetune.state import read_progress

    progress = read_progress(out)
    if progress is None:
        return None
    recipe = progress.recipe
    typed = {key: value for key, value in options.items() if _is_typed(context, key)}
    if epochs is not None:
        steps = steps_for(epochs, images, typed.get("batch_size", recipe.batch_size))
    if steps is not None:
        typed["steps"] = steps
    different = recipe.differences(recipe.but(**typed))
    if different:
        raise typer.BadParameter(
            f"--resume goes on with the recipe of the run in {out}, and the options say {different}. Leave them out, "
            "or begin another run in another --out."
        )
    return recipe


def _is_typed(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _recipe(
    options: dict[str, Any],
    steps: int | None,
    epochs: float | None,
    minutes: float | None,
    module: nn.Module,
    data: Views,
    device: str | None,
) -> Recipe:
    """The recipe of a new run; ``minutes`` are measured."""
    from dwattn.finetune import Recipe, estimate, steps_for

    recipe = Recipe.of(steps=steps or 1, **options)
    if steps is not None:
        return recipe
    if minutes is None:
        return recipe.but(steps=steps_for(10 if epochs is None else epochs, len(data), recipe.batch_size))  # fmt: skip
    if minutes <= 0:
        raise TrainingError(f"--minutes {minutes} must be above 0.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "--minutes is measured by each process on its own; with several give --steps or --epochs."
        )
    measured = estimate(module, data, recipe, device=device)
    return recipe.but(steps=max(1, int(60 * minutes / measured.seconds_per_step)))


def _finish(
    out: Path,
    module: nn.Module,
    trained: nn.Module,
    tested: Views | None,
    result: TrainingResult,
    recipe: Recipe,
    as_json: bool,
) -> None:
    """Write what was trained, measure it, and say so."""
    written = _write(out, module, trained)
    measured = {} if tested is None else _measure(module, tested)
    for text in result.notes:
        note(f"Note: {text}")
    if as_json:
        emit({**result.to_dict(), "recipe": recipe.model_dump(), "test": measured}, True)
    for name, value in measured.items():
        note(f"{name}: {value:.4f}")
    note(
        f"{result.steps} steps in {result.seconds / 60:.1f} min, loss {result.losses['loss']:.4g}."
    )
    note(f"Wrote {', '.join(str(path) for path in written)}.")


def _write(out: Path, module: nn.Module, trained: nn.Module) -> list[Path]:
    """The trained student, and a task's head beside it."""
    import dwattn
    from dwattn.conversion import conversion
    from dwattn.files import write_tensors

    written = []
    if conversion(trained) is not None:
        dwattn.save(trained, out / "student.safetensors")
        written.append(out / "student.safetensors")
    head = getattr(module, "head", None)
    parts = {"head": head, "backbone": None if written else trained}
    for name, part in parts.items():
        if part is None:
            continue
        path = out / f"{name}.safetensors"
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in part.state_dict().items()}
        write_tensors(path, tensors, CheckpointError)
        written.append(path)
    return written


def _measure(module: nn.Module, tested: Views) -> dict[str, float]:
    from dwattn.finetune import Task, evaluate

    assert isinstance(module, Task)
    return evaluate(module, tested)
