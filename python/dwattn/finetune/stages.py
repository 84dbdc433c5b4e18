"""The paper's recipes for a task: fine-tune, replace, fine-tune again; or replace first; or train little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dwattn.errors import TrainingError
from dwattn.finetune.groups import param_groups
from dwattn.finetune.recipe import Recipe
from dwattn.finetune.tasks import Task
from dwattn.finetune.trainer import Trainer, TrainingResult
from dwattn.finetune.views import Views
from dwattn.initial import KERNEL_INITS
from dwattn.plan import Plan
from dwattn.surgery import replace
from dwattn.surgery_report import ReplacementReport

Stages = Literal["two-stage", "one-stage", "frozen"]
KernelInit = Literal["calibrated", "mean-attention", "gaussian"]


@dataclass(frozen=True)
class StagedResult:
    """Results of the stages in order, and what was replaced between them: None if a callback stopped the first one."""

    stages: list[TrainingResult]
    replaced: ReplacementReport | None

    @property
    def complete(self) -> bool:
        """False if a callback stopped one of the stages."""
        return self.stages[-1].complete


def second_stage(recipe: Recipe) -> Recipe:
    """The paper's second stage: half the epochs at half the batch size, and so as many steps as the first.

    Raises:
        TrainingError: the batch size is odd.
    """
    if recipe.batch_size % 2:
        raise TrainingError(
            f"batch_size={recipe.batch_size} cannot be halved for the second stage; use an even one, or give a recipe "
            f"for that stage (second)."
        )
    return recipe.but(batch_size=recipe.batch_size // 2)


def train_in_stages(
    task: Task,
    data: Views,
    plan: Plan | Callable[[nn.Module], Plan],
    recipe: Recipe,
    *,
    stages: Stages = "two-stage",
    kernel_init: KernelInit = "calibrated",
    calibrate: Any = None,
    second: Recipe | None = None,
    folder: str | Path | None = None,
    first_folder: str | Path | None = None,
    trainer_options: dict[str, Any] | None = None,
    **replace_options: Any,
) -> StagedResult:
    """Train a task and replace attention layers of its backbone, as the paper does.

    ``two-stage`` fine-tunes, replaces, and fine-tunes half as long (:func:`second_stage`); ``one-stage`` replaces
    layers of the pretrained backbone and fine-tunes once; ``frozen`` is ``two-stage`` with only the replaced layers
    trained in the second stage.

    Args:
        task: with an unconverted backbone; it is changed in place.
        plan: what to replace, or a function that selects it from the backbone just before replacing: the paper
            scores after the first stage.
        recipe: of the first (or only) stage.
        kernel_init: ``calibrated`` in closed form on ``calibrate``, ``mean-attention`` (from the plan's maps), or
            ``gaussian`` (the paper's).
        calibrate: images for calibration.
        second: recipe of the second stage; default: :func:`second_stage` of the first one's.
        folder: gets a subfolder for each stage; a call that is repeated there resumes, also a stage that a callback
            stopped. The layers are then replaced again, so the calibration images must be the same.
        first_folder: folder of the first stage, if several calls share it.
        trainer_options: of :class:`dwattn.finetune.Trainer`.
        replace_options: of :func:`dwattn.replace`.

    Raises:
        TrainingError: unknown names, ``calibrated`` without images, or a batch that has no half.
    """
    if stages not in ("two-stage", "one-stage", "frozen"):
        raise TrainingError(f"stages={stages!r} must be two-stage, one-stage or frozen.")
    options = {**replace_options, **_init_options(kernel_init, calibrate)}
    settings = dict(trainer_options or {})
    root = None if folder is None else Path(folder)

    def fit(name: str, with_recipe: Recipe, groups: Any = None) -> TrainingResult:
        place = None if root is None else root / name
        if name == "first" and first_folder is not None:
            place = Path(first_folder)
        trainer = Trainer(task, data, with_recipe, folder=place, groups=groups, **settings)
        return trainer.fit(resume=True)

    results = []
    if stages != "one-stage":
        second = second or second_stage(recipe)
        results.append(fit("first", recipe))
        if not results[-1].complete:
            return StagedResult(results, None)
    chosen = plan if isinstance(plan, Plan) else plan(task.backbone)
    # allow_stale: training has moved the weights on since the plan was made.
    report = replace(task.backbone, chosen, allow_stale=True, seed=recipe.seed, **options)
    task.rebuild()
    if second is None or stages == "one-stage":
        results.append(fit("only", recipe))
    elif stages == "two-stage":
        results.append(fit("second", second))
    else:
        second = second.but(train="replaced")
        groups = param_groups(
            task, lr=second.lr, kernel_lr=second.kernel_lr, weight_decay=second.weight_decay, train="replaced"
        )  # fmt: skip
        results.append(fit("second", second, groups))
    return StagedResult(results, report)


def _init_options(kernel_init: str, calibrate: Any) -> dict[str, Any]:
    if kernel_init == "calibrated":
        if calibrate is None:
            raise TrainingError("kernel_init='calibrated' needs images: pass calibrate=images.")
        return {"calibrate": calibrate}
    if kernel_init in KERNEL_INITS:
        return {"kernel_init": kernel_init}
    raise TrainingError(
        f"kernel_init={kernel_init!r} must be calibrated, mean-attention or gaussian."
    )
