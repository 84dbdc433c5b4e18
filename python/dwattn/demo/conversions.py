"""The conversions the demo compares, and how one is carried out and measured."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dwattn
from dwattn.demo.pretrained import HEADS, SaliencyModel
from dwattn.fidelity import Fidelity, compare, mask_iou
from dwattn.report.results import ConversionInfo, FidelityInfo

BATCH = 10


#: By which the main comparison chooses its blocks; the other criteria are shown beside it.
MAIN_CRITERION = "residual"


@dataclass(frozen=True)
class Spec:
    """A conversion to make.

    Args:
        label: for tables.
        variant, rank: of :func:`dwattn.replace`.
        criterion: by which ``blocks`` blocks are chosen.
        method: ``calibrated``, ``mean-map`` or ``gaussian`` (the paper's initialisation, without
            context terms).
        keep: whether later steps need the model.
        optional: left out when time runs short.
    """

    label: str
    variant: str
    criterion: str
    blocks: int
    method: str = "calibrated"
    rank: int | None = None
    keep: bool = False
    optional: bool = False

    @property
    def key(self) -> str:
        """Unique name."""
        rank = f"-r{self.rank}" if self.rank else ""
        return f"{self.criterion}-{self.blocks}-{self.variant}{rank}-{self.method}"


def specs(channels: int, blocks: int, quick: bool) -> list[Spec]:
    """All conversions, most important first.

    Args:
        channels: ``C``; ``lowrank_dw`` is shown at ``C / 4`` and at ``d_h``, the width of
            ``ens_dw``.
        blocks: replaced blocks of the main comparison.
    """
    quarter, head = channels // 4, channels // HEADS
    narrow, narrower = f"lowrank_dw {quarter}, fitted", f"lowrank_dw {head}, fitted"
    best = MAIN_CRITERION
    main = [
        Spec("dw, fitted", "dw", best, blocks, keep=True),
        Spec(narrow, "lowrank_dw", best, blocks, rank=quarter, keep=True),
        Spec("dw, Gaussian", "dw", best, blocks, "gaussian", keep=True),
    ]
    if quick:
        return main
    fewer, more = blocks - 2, blocks + blocks // 2
    other = "perturbation"
    return [
        *main,
        Spec("dw, fitted", "dw", other, blocks),
        Spec("dw, fitted", "dw", "variance", blocks),
        Spec(f"ens_dw {head}, Gaussian", "ens_dw", best, blocks, "gaussian", keep=True),
        Spec("dw, fitted", "dw", best, more, optional=True),
        Spec("dw, fitted", "dw", other, fewer, optional=True),
        Spec(narrower, "lowrank_dw", best, blocks, rank=head, optional=True),
        Spec("dw, Gaussian", "dw", best, more, "gaussian", optional=True),
        Spec("dw, Gaussian", "dw", best, fewer, "gaussian", optional=True),
        Spec("dw, fitted", "dw", best, fewer, optional=True),
        Spec("dw, mean map", "dw", best, blocks, "mean-map", optional=True),
    ]


@dataclass(frozen=True)
class HeldOut:
    """Held-out photos and what the original model makes of them.

    Args:
        pixels: ``(N, 3, 224, 224)``; tokens: ``(N, 257, 384)``; saliency: ``(N, 1, 224, 224)``.
        masks: boolean ``(224, 224)`` alpha masks of pasted cut-outs, None without one.
    """

    pixels: Tensor
    masks: list[Tensor | None]
    tokens: Tensor
    saliency: Tensor

    @classmethod
    def of(cls, model: SaliencyModel, pixels: Tensor, masks: list[np.ndarray | None]) -> HeldOut:
        """Run the original model."""
        tokens, saliency = outputs(model, pixels)
        return cls(
            pixels, [None if m is None else torch.from_numpy(m) for m in masks], tokens, saliency
        )

    def fidelity(self, tokens: Tensor, saliency: Tensor) -> FidelityInfo:
        """Fidelity of a converted model's outputs, on all photos and on those with a cut-out."""
        whole = self._compare(tokens, saliency, slice(None))
        with_object = [index for index, mask in enumerate(self.masks) if mask is not None]
        part = self._compare(tokens, saliency, with_object) if with_object else None
        return FidelityInfo(
            **asdict(whole),
            mask_iou=mask_iou(saliency, self.masks),
            object_cosine=part.cosine if part else None,
            object_iou=part.iou if part else None,
        )

    def _compare(self, tokens: Tensor, saliency: Tensor, chosen: slice | list[int]) -> Fidelity:
        maps = (self.saliency[chosen], saliency[chosen])
        return compare(self.tokens[chosen], tokens[chosen], maps, num_prefix=1)


@torch.inference_mode()
def outputs(model: SaliencyModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and saliency of all images."""
    tokens = torch.cat([model.tokens(batch) for batch in pixels.split(BATCH)])
    return tokens, torch.cat([model.decode(batch) for batch in tokens.split(BATCH)])


@dataclass(frozen=True)
class Outcome:
    """A conversion that was made: its record, and the model and maps if they are kept."""

    record: ConversionInfo
    report: Any
    model: SaliencyModel
    saliency: Tensor


def carry_out(
    spec: Spec,
    model: SaliencyModel,
    scores: Any,
    images: Tensor,
    held_out: HeldOut,
    *,
    quick: bool,
    seed: int,
    progress: bool,
    views: int = 1,
) -> Outcome:
    """Convert a copy of ``model`` and compare it with the original on the held-out photos.

    Args:
        images: calibration images ``(M, 3, 224, 224)``.
        quick: correct only the output projections of the replaced layers.
        views: of each photo; a second and a third add a little fidelity, and each as much time.
    """
    plan = dwattn.select(scores, blocks=spec.blocks, criterion=spec.criterion)
    student = copy.deepcopy(model)
    options: dict[str, Any] = {"variant": spec.variant, "seed": seed, "progress": progress}
    if spec.rank is not None:
        options["rank"] = spec.rank
    if spec.method == "calibrated":
        options |= {"calibrate": images, "views": views, "refit": "attention" if quick else "all"}
    elif spec.method == "gaussian":
        options |= {"kernel_init": "gaussian", "context": False}
    else:
        options["kernel_init"] = "mean-attention"
    start = time.perf_counter()
    report = dwattn.replace(student, plan, **options)
    seconds = time.perf_counter() - start
    tokens, saliency = outputs(student, held_out.pixels)
    record = ConversionInfo(
        key=spec.key,
        label=spec.label,
        variant=spec.variant,
        rank=spec.rank,
        criterion=spec.criterion,
        blocks=sorted(row.block for row in report.rows if row.action == "replaced"),
        method=spec.method,
        fidelity=held_out.fidelity(tokens, saliency),
        seconds=seconds,
    )
    return Outcome(record, report, student, saliency)
