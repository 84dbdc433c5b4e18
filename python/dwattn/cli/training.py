"""``dwattn finetune``: train a converted model, without labels or for a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
)
from dwattn.cli.tasks import (
    TASKS,
    ClassesOption,
    ColourOption,
    MasksOption,
    PoolOption,
    TaskImages,
    TestMasksOption,
    TrainingDeviceOption,
    WorkersOption,
    check_labels,
)
from dwattn.cli.training_options import (
    BlocksOption,
    CacheOption,
    DryRunOption,
    EmaOption,
    EpochsOption,
    FeaturesOption,
    KernelLrOption,
    LrOption,
    MicroBatchOption,
    MinutesOption,
    OutOption,
    OutputLossOption,
    OutputOption,
    ResumeOption,
    SaveMinutesOption,
    SeedOption,
    SplitOption,
    StepsOption,
    TaskOption,
    TestImagesOption,
    TrainedStudentArgument,
    TrainingImagesOption,
    TrainOption,
    ViewsOption,
    WarmupOption,
    WeightDecayOption,
)
from dwattn.errors import CheckpointError, TrainingError
from dwattn.files import require_apart

if TYPE_CHECKING:
    from torch import nn

    from dwattn.finetune import Recipe, TrainingResult, Views


@command
def finetune(
    context: typer.Context,
    model: ModelArgument,
    student: TrainedStudentArgument = None,
    *,
    images: TrainingImagesOption,
    out: OutOption = Path("finetune"),
    task: TaskOption = "distill",
    masks: MasksOption = None,
    classes: ClassesOption = None,
    test_images: TestImagesOption = None,
    test_masks: TestMasksOption = None,
    pool: PoolOption = "mean",
    split: SplitOption = False,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    minutes: MinutesOption = None,
    lr: LrOption = 2e-5,
    kernel_lr: KernelLrOption = 10.0,
    weight_decay: WeightDecayOption = None,
    warmup: WarmupOption = 0.05,
    train: TrainOption = "all",
    batch_size: BatchOption = 8,
    micro_batch: MicroBatchOption = None,
    ema: EmaOption = None,
    amp: AmpOption = "no",
    views: ViewsOption = None,
    features: FeaturesOption = 0.0,
    blocks: BlocksOption = 0.0,
    output: OutputOption = 0.0,
    output_loss: OutputLossOption = "auto",
    cache: CacheOption = 0,
    colour: ColourOption = 0.0,
    seed: SeedOption = 0,
    size: SizeOption = None,
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: TrainingDeviceOption = None,
    workers: WorkersOption = 0,
    save_minutes: SaveMinutesOption = 5.0,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    progress: ProgressOption = True,
    as_json: JsonOption = False,
) -> None:
    """Recover accuracy by training: from the original without labels, or for a task."""
    from dwattn.finetune import Augment, Distillation, Targets, Trainer, estimate

    for name in ("student", "backbone"):
        require_apart(out / f"{name}.safetensors", CheckpointError, (student, weights))
    _check_usage(task, student, test_images, split, (steps, epochs, minutes))
    check_labels(task, masks, classes, test_images, test_masks)
    targets = None
    if task == "distill":
        targets = Targets(
            features=features, blocks=blocks, output=output, output_loss=cast(Any, output_loss)
        )
    original, trained = _models(model, student, weights, wants_teacher=targets is not None)
    pixels = image_size(trained, size)
    norm = normalisation(trained, model, mean, std)
    note(f"Images from {images} at {pixels[0]} x {pixels[1]}, normalised with {norm.source}.")
    reader = TaskImages(task, pixels, norm, classes, seed)
    data = reader.read(images, masks, Augment(colour=colour))
    tested = None if test_images is None else reader.read(test_images, test_masks, None)
    module: nn.Module
    if targets is not None:
        module = Distillation(trained, original, targets=targets, cache=cache * 2**20)
    else:
        module = reader.task_of(trained, pool, split, seed)
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


def _check_usage(
    task: str,
    student: Path | None,
    test_images: Path | None,
    split: bool,
    lengths: tuple[int | None, float | None, float | None],
) -> None:
    """Raise a usage error for options that contradict the task; ``lengths``: steps, epochs, minutes."""
    if task not in TASKS:
        raise typer.BadParameter(f"--task {task} must be one of {', '.join(TASKS)}.")
    if task == "distill" and student is None:
        raise typer.BadParameter(
            "Name the STUDENT written by dwattn replace: it learns from MODEL."
        )
    if task == "distill" and test_images is not None:
        raise typer.BadParameter("--test-images measures tasks; distill has no labels.")
    if task == "distill" and split:
        raise typer.BadParameter("--split is for tasks; distill has no head.")
    if sum(value is not None for value in lengths) > 1:
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
            f"--resume continues with the recipe of the run in {out}, but the options say {different}. Leave them out, "
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
