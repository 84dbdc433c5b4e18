"""Photos and saliency maps as small JPEG files for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dwattn.demo.photos import Photo
from dwattn.fidelity import map_iou
from dwattn.report.results import PictureCell, PictureRow

FOLDER = "pictures"
_OUTLINE = np.array([70, 225, 255], dtype=np.uint8)


def choose(photos: Sequence[Photo], saliency: Tensor, count: int) -> list[int]:
    """Indices of ``count`` photos: the packages in turn, each in the order of the split.

    Photos in which the original model finds almost nothing salient (under 2% of the pixels) would
    show black squares and come last, as do further photos of one scene.
    """
    shows = ((saliency > 0.5).flatten(1).float().mean(1) > 0.02).tolist()
    turns: dict[tuple[bool, str], int] = {}
    scenes: set[str] = set()
    ranked = []
    for index, photo in enumerate(photos):
        late = not shows[index] or photo.scene in scenes
        if not late:
            scenes.add(photo.scene)
        turns[late, photo.package] = turn = turns.get((late, photo.package), 0) + 1
        ranked.append((late, turn, index))
    return [index for _, _, index in sorted(ranked)[:count]]


def save(
    out: Path,
    photos: Sequence[Photo],
    chosen: Sequence[int],
    original: Tensor,
    maps: Mapping[str, Tensor],
) -> list[PictureRow]:
    """Write the pictures of the chosen photos below ``out`` and describe them.

    Args:
        original: saliency ``(N, 1, H, W)`` of the original model.
        maps: the converted models' saliency by label.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"original": original, **maps}
    ious = {label: map_iou(original, values) for label, values in maps.items()}
    rows = []
    for number, index in enumerate(chosen):
        outline = _outline(original[index, 0].numpy() > 0.5)
        images = {"photo": photos[index].render()[0]}
        images |= {
            label: _coloured(values[index, 0].numpy(), outline) for label, values in columns.items()
        }
        cells = []
        for column, (label, image) in enumerate(images.items()):
            name = f"{FOLDER}/{number:02d}-{column}.jpg"
            image.save(out / name, quality=88)
            iou = ious[label][index].item() if label in ious else math.nan
            cells.append(PictureCell(label=label, file=name, iou=None if math.isnan(iou) else iou))
        rows.append(PictureRow(photo=photos[index].name, cells=cells))
    return rows


def _coloured(values: np.ndarray, outline: np.ndarray) -> Image.Image:
    """A map in [0, 1] in the colours of magma, with an outline."""
    import matplotlib

    colours = matplotlib.colormaps["magma"](values.clip(0, 1), bytes=True)[..., :3].copy()
    colours[outline] = _OUTLINE
    return Image.fromarray(colours)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of ``mask`` with a neighbour outside of it."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: np.ndarray = mask & ~inside
    return edge
