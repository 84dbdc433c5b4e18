"""What ``dwattn finetune`` and ``dwattn study`` share: options of a task, its images, and the model with its head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dwattn.cli.common import require_readable

if TYPE_CHECKING:
    from torch import nn

    from dwattn.finetune import Task, Views
    from dwattn.models import Preprocessing

#: Tasks with labels; ``distill`` has none.
LABELLED = ("classify", "segment")
TASKS = ("distill", *LABELLED)

MasksOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="segment: masks of the same names (.png).")
]
TestMasksOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="segment: masks of --test-images.")
]
ClassesOption = Annotated[int | None, typer.Option(min=2, help="segment: number of classes.")]
PoolOption = Annotated[
    str, typer.Option(help="classify: mean of the patch tokens, or cls (the paper's Table A.2).")
]
ColourOption = Annotated[float, typer.Option(help="Colour jitter, from 0 (none) to below 1.")]
TrainingDeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")
]
WorkersOption = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]


def check_labels(
    task: str,
    masks: Path | None,
    classes: int | None,
    test_images: Path | None,
    test_masks: Path | None,
) -> None:
    """Raise a usage error unless masks and classes are given for ``segment``, and for it alone."""
    given = {masks is not None, classes is not None}
    if given != {task == "segment"}:
        raise typer.BadParameter("segment, and only segment, needs --masks DIR and --classes N.")
    if task == "segment" and (test_images is None) != (test_masks is None):
        raise typer.BadParameter("Give --test-images and --test-masks together.")


class TaskImages:
    """Reads the training and test images of a task alike: same size, normalisation and classes.

    Args:
        task: one of ``TASKS``.
        size: ``(H, W)`` in pixels.
        norm: mean and standard deviation of the pixels.
        classes: of ``segment``; those of ``classify`` are the folders of the first images that are read.
        seed: of the views.
    """

    def __init__(
        self, task: str, size: tuple[int, int], norm: Preprocessing, classes: int | None, seed: int
    ) -> None:
        self.task, self.size, self.norm, self.seed = task, size, norm, seed
        self.classes = classes
        self.names: list[str] | None = None

    def read(self, images: Path, masks: Path | None, augment: Any) -> Views:
        """The views of a folder; ``augment`` is None for images to measure on."""
        from dwattn.finetune import Views
        from dwattn.finetune.labelled import MaskFolder, labelled_folder
        from dwattn.image_files import image_folder

        common: dict[str, Any] = {"augment": augment, "seed": self.seed}
        if self.task == "distill":
            photos = image_folder(images, self.size, self.norm.mean, self.norm.std)
            require_readable(photos)
            return Views(photos, **common)
        common |= {"mean": self.norm.mean, "std": self.norm.std}
        if self.task == "segment":
            assert masks is not None
            assert self.classes is not None
            return MaskFolder(images, masks, self.size, self.classes, **common)
        data, names = labelled_folder(images, self.size, classes=self.names, **common)
        require_readable(data.images)
        self.names, self.classes = names, len(names)
        return data

    def task_of(self, model: nn.Module, pool: str, split: bool, seed: int) -> Task:
        """``model`` with a new head for the classes of the images that were read."""
        from dwattn.finetune import classifier, segmenter

        assert self.classes is not None
        if self.task == "classify":
            return classifier(model, self.classes, pool=pool, split=split, seed=seed)
        return segmenter(model, self.classes, split=split, seed=seed)
