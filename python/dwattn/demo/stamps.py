"""Photographed cut-outs with alpha masks (tuxpaint-stamps-default), pasted on photographs."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

#: Folders of stamps that are mostly photographs of things; drawings, flags and symbols lie in
#: others.
FOLDERS = (
    "animals",
    "food",
    "hobbies",
    "household",
    "medical",
    "military",
    "plants",
    "space",
    "sports",
    "town",
    "vehicles",
)
_MIN_COLOURS = 3000
_COVERAGE = (0.05, 0.97)


def find(folder: Path, count: int, rng: random.Random) -> list[Path]:
    """Up to ``count`` stamps that are photographs, in an order that ``rng`` decides."""
    candidates = [
        path
        for top in FOLDERS
        for path in sorted((folder / top).rglob("*.png"))
        if "mirror" not in path.name and "cartoon" not in path.as_posix()
    ]
    rng.shuffle(candidates)
    return list(islice((path for path in candidates if is_photograph(path)), count))


def is_photograph(path: Path) -> bool:
    """Many colours inside a mask that covers neither nothing nor everything: not a drawing."""
    with Image.open(path) as image:
        if image.mode not in ("RGBA", "LA", "P"):
            return False
        pixels = np.asarray(image.convert("RGBA"))
    opaque = pixels[..., 3] > 127
    if not _COVERAGE[0] < opaque.mean() < _COVERAGE[1]:
        return False
    colours = pixels[opaque][:, :3].astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    return np.unique(colours).size > _MIN_COLOURS


def compose(
    background: Image.Image, stamp: Path, rng: random.Random, size: int
) -> tuple[Image.Image, np.ndarray]:
    """Paste a stamp at a random place, size (45-85% of the side) and side on a random square of the
    background.

    Returns:
        The RGB image of ``size`` x ``size`` pixels and the boolean mask ``(size, size)`` of the
        stamp.
    """
    side = min(background.size)
    left, top = (rng.randint(0, length - side) for length in background.size)
    box = (left, top, left + side, top + side)
    canvas = background.resize((size, size), Image.Resampling.BICUBIC, box=box)
    with Image.open(stamp) as image:
        cutout = image.convert("RGBA")
    scale = rng.uniform(0.45, 0.85) * size / max(cutout.size)
    width, height = (max(8, round(length * scale)) for length in cutout.size)
    cutout = cutout.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x, y = rng.randint(0, size - width), rng.randint(0, size - height)
    canvas.paste(cutout, (x, y), cutout)
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + height, x : x + width] = np.asarray(cutout)[..., 3] > 127
    return canvas, mask
