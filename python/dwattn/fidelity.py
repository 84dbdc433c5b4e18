"""How close a converted model stays to the original on the same images.

All functions take outputs of the two models, so they work with any head: cosine of patch features, and for dense maps in
[0, 1] (saliency, foreground) overlap and absolute difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.errors import DataError


@dataclass(frozen=True)
class Fidelity:
    """Means over images.

    Args:
        cosine: of patch features, mean over patches and images.
        prefix_cosine: of prefix (CLS, register) features, or None without prefix tokens.
        iou: intersection over union of ``map > threshold`` between the models, mean over the images
            in which at least one map has a pixel above the threshold.
        mae: mean absolute difference of the maps.
        empty: images left out of ``iou`` because both maps are empty.
        images: number of images.
    """

    cosine: float
    prefix_cosine: float | None
    iou: float
    mae: float
    empty: int
    images: int

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-able."""
        return asdict(self)


def same_shape(first: Tensor, second: Tensor, what: str) -> None:
    """Raise :class:`DataError` unless the shapes agree."""
    if first.shape != second.shape:
        raise DataError(
            f"{what} of the two models have shapes {tuple(first.shape)} and {tuple(second.shape)}; run both "
            "models on the same images."
        )


def patch_cosine(original: Tensor, converted: Tensor, num_prefix: int = 0) -> Tensor:
    """Cosine of ``(B, N, D)`` features token by token, mean over the patches of each image:
    ``(B,)`` fp32.
    """
    same_shape(original, converted, "Features")
    pair = (original[:, num_prefix:].float(), converted[:, num_prefix:].float())
    return F.cosine_similarity(*pair, dim=-1).mean(1)


def prefix_cosine(original: Tensor, converted: Tensor, num_prefix: int) -> Tensor:
    """Cosine of the prefix features, mean over the prefix tokens of each image: ``(B,)`` fp32."""
    same_shape(original, converted, "Features")
    pair = (original[:, :num_prefix].float(), converted[:, :num_prefix].float())
    return F.cosine_similarity(*pair, dim=-1).mean(1)


def drift(original: Tensor, converted: Tensor, num_prefix: int = 0) -> float:
    """Share by which patch tokens ``(B, N, D)`` differ: ``sum |t' - t|^2 / sum |t - mean(t)|^2``.

    Sums and mean are over the patches of all images. NaN or infinite if tokens are not finite or all of the original's
    are the same.
    """
    same_shape(original, converted, "Tokens")
    wanted = original[:, num_prefix:]
    apart = (converted[:, num_prefix:] - wanted).square().sum()
    return float(apart / (wanted - wanted.mean((0, 1))).square().sum())


def map_iou(first: Tensor, second: Tensor, threshold: float = 0.5) -> Tensor:
    """Intersection over union of ``first > threshold`` and ``second > threshold`` by image:
    ``(B,)`` fp32.

    Boolean masks are taken as they are. NaN marks images in which both are empty: they say nothing
    of overlap.
    """
    same_shape(first, second, "Maps")
    masks = [m if m.dtype == torch.bool else m > threshold for m in (first, second)]
    a, b = (mask.flatten(1) for mask in masks)
    # 0 / 0 = NaN where both are empty
    return (a & b).sum(1).float() / (a | b).sum(1).float()


def map_mae(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference of two maps by image: ``(B,)`` fp32."""
    same_shape(first, second, "Maps")
    return (first.float() - second.float()).abs().flatten(1).mean(1)


def compare(
    original: Tensor,
    converted: Tensor,
    maps: tuple[Tensor, Tensor] | None = None,
    *,
    num_prefix: int = 0,
) -> Fidelity:
    """Fidelity of one set of images.

    Args:
        original, converted: features ``(B, N, D)``, prefix tokens first.
        maps: dense maps of both models, ``(B, 1, H, W)`` in [0, 1]; without them ``iou`` and
            ``mae`` are NaN.
        num_prefix: prefix tokens ``P``.

    Raises:
        DataError: shapes differ or there is no image.
    """
    if len(original) == 0:
        raise DataError("Fidelity needs at least one image.")
    nan = torch.full((len(original),), float("nan"))
    iou, mae = (map_iou(*maps), map_mae(*maps)) if maps else (nan, nan)
    return Fidelity(
        cosine=patch_cosine(original, converted, num_prefix).mean().item(),
        prefix_cosine=prefix_cosine(original, converted, num_prefix).mean().item()
        if num_prefix
        else None,
        iou=iou.nanmean().item(),
        mae=mae.mean().item(),
        empty=int(iou.isnan().sum()) if maps else 0,
        images=len(original),
    )


def mask_iou(maps: Tensor, masks: Sequence[Tensor | None], threshold: float = 0.5) -> float | None:
    """Mean IoU of ``maps (B, 1, H, W)`` with ground-truth boolean masks ``(H, W)``, where there are
    any.
    """
    chosen = [index for index, mask in enumerate(masks) if mask is not None]
    if not chosen:
        return None
    truth = torch.stack([mask for mask in masks if mask is not None])[:, None]
    return map_iou(maps[chosen], truth, threshold).nanmean().item()
