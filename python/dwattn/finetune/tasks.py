"""Classification and semantic segmentation with a backbone and a head."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.adapters import describe
from dwattn.data import Batch
from dwattn.errors import TrainingError
from dwattn.finetune.features import FeatureReader, token_width
from dwattn.finetune.heads import Head, LinearHead, SegmentationDecoder, SplitHead
from dwattn.finetune.labelled import IGNORE
from dwattn.finetune.views import Views, collate
from dwattn.geometry import Geometry


class Task(nn.Module):
    """A training module for labelled images: cross-entropy of a head's logits.

    Items with ``label`` make it a classification, items with ``mask`` a segmentation.

    Args:
        backbone: converted or not; head: for its tokens.
        frozen: never train the backbone and keep it in eval mode (ViT-Split, linear probes).
    """

    def __init__(self, backbone: nn.Module, head: Head, *, frozen: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.frozen = backbone, head, frozen
        self.rebuild()

    def rebuild(self) -> None:
        """Look at the backbone again, after its layers were replaced."""
        self._layout = describe(self.backbone)
        self._read = FeatureReader(self.backbone, self.head.blocks)

    def train(self, mode: bool = True) -> Task:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def settings(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with its beginning."""
        return {"head": self.head.settings(), "frozen": self.frozen}

    def predict(self, pixels: Tensor) -> Tensor:
        """Logits ``(B, classes)`` or ``(B, classes, h, w)``."""
        grid = self._layout.grid_of(pixels.shape[-2], pixels.shape[-1])
        with torch.no_grad() if self.frozen else nullcontext():
            features = self._read(Batch(pixels, len(pixels), pixels))
        logits: Tensor = self.head(features, Geometry(*grid, self._layout.num_prefix))
        return logits

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``loss`` and the share of images or pixels that are right, both means over the images.

        Pixels count within their image, and an image in which all of them are ignored as 0.
        """
        target = _target(batch)
        logits = _resized(self.predict(batch["pixels"]), target).float()
        ignored = IGNORE if target.dim() > 1 else -100
        counted = (target != ignored).reshape(len(target), -1)
        losses = F.cross_entropy(logits, target, ignore_index=ignored, reduction="none")
        right = logits.detach().argmax(1) == target
        return {"loss": _mean_by_image(losses, counted), "accuracy": _mean_by_image(right, counted)}


@torch.no_grad()
def evaluate(task: Task, data: Views, *, batch_size: int = 16) -> dict[str, float]:
    """``{"top1": share}`` of a classification, ``{"miou": share, "pixel_accuracy": share}`` of a segmentation.

    Computed by torchmetrics on the images themselves (view 0); the task is in eval mode meanwhile.

    Raises:
        TrainingError: torchmetrics is not installed.
    """
    classes: int = data.classes  # type: ignore[attr-defined]
    metrics: dict[str, Any] = {}
    mode = task.training
    task.eval()
    try:
        for batch in _plain_batches(data, batch_size):
            target = _target(batch)
            if not metrics:
                metrics = _metrics(classes, dense=target.dim() > 1)
            device = next(task.parameters()).device
            logits = _resized(task.predict(batch["pixels"].to(device)), target).float().cpu()
            for metric in metrics.values():
                metric.update(logits.argmax(1), target)
    finally:
        task.train(mode)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def classifier(
    backbone: nn.Module, classes: int, *, pool: str = "mean", split: bool = False, seed: int = 0
) -> Task:
    """A backbone with one linear layer, drawn from ``seed``; with ``split`` the backbone is frozen and the head is a
    :class:`SplitHead`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _task(backbone, LinearHead(token_width(backbone), classes, pool), split)


def segmenter(
    backbone: nn.Module,
    classes: int,
    *,
    widths: Sequence[int] = (256, 128, 64),
    split: bool = False,
    seed: int = 0,
) -> Task:
    """A backbone with the paper's decoder of these widths, drawn from ``seed``; with ``split`` the backbone is frozen and
    the head is a :class:`SplitHead`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _task(backbone, SegmentationDecoder(token_width(backbone), classes, widths), split)


def _task(backbone: nn.Module, head: Head, split: bool) -> Task:
    if not split:
        return Task(backbone, head)
    return Task(backbone, SplitHead(backbone, head), frozen=True)


def _plain_batches(data: Views, size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(data), size):
        yield collate([data[index, 0] for index in range(start, min(start + size, len(data)))])


def _target(batch: dict[str, Any]) -> Tensor:
    for name in ("label", "mask"):
        if name in batch:
            target: Tensor = batch[name]
            return target
    raise TrainingError("A task needs images with 'label' or 'mask'; see dwattn.finetune.labelled.")


def _mean_by_image(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over images of each one's mean over what is ``counted`` ``(B, pixels)``.

    By image, so that the loss of a batch is the mean over its parts however it is divided.
    """
    sums = (values.reshape(counted.shape) * counted).sum(1)
    return (sums / counted.sum(1).clamp(min=1)).mean()


def _resized(logits: Tensor, target: Tensor) -> Tensor:
    """Dense logits in the size of the mask."""
    if target.dim() == 1 or logits.shape[-2:] == target.shape[-2:]:
        return logits
    return F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)


def _metrics(classes: int, *, dense: bool) -> dict[str, Any]:
    try:
        library = importlib.import_module("torchmetrics.classification")
    except (
        ImportError,
        RuntimeError,
    ) as error:  # it imports torchvision, which may be of another torch
        raise TrainingError(
            f"Evaluation needs torchmetrics ({error}); install it with pip install 'dwattn[train]'."
        ) from error
    # Each process sees all images, and it may be the only one that evaluates: there is nothing to gather.
    options: dict[str, Any] = {"num_classes": classes, "sync_on_compute": False}
    if dense:
        options["ignore_index"] = IGNORE
    accuracy = library.MulticlassAccuracy(average="micro", **options)
    if not dense:
        return {"top1": accuracy}
    overlap = library.MulticlassJaccardIndex(**options)
    return {"miou": overlap, "pixel_accuracy": accuracy}
