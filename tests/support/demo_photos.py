"""Photos of the demo that need no package: files of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dwattn.demo.photos import Photo


def picture(path: Path, seed: int, size: tuple[int, int] = (90, 70)) -> Path:
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def noise_photos(folder: Path) -> list[Photo]:
    """30 photos of 20 scenes."""
    return [
        Photo(f"p{i}", "package", f"scene{i % 20}", picture(folder / f"{i}.png", i))
        for i in range(30)
    ]
