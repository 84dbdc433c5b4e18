"""Augmentation of the demo's photos: crops of the full resolution, cut-outs pasted on them, mosaics, changes of light.

A hundred photos are too few for the wide layers of a model: what is fitted to them unchanged is much better on them than on
other photos. Views differ in what is beside what, at which size and in which light.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dwattn.demo import photos, stamps
from dwattn.demo.photos import Photo
from dwattn.demo.pretrained import IMAGE_SIZE
from dwattn.finetune.views import Item, Key, Views, mix

#: Crops: their area as a share of the largest square's, and their aspect ratio.
AREA, RATIO = (0.2, 1.0), (0.75, 4 / 3)
#: Share of views that are mosaics of four photos; default share of photos (parts of mosaics too) that get a cut-out.
MOSAICS, CUTOUTS = 0.3, 0.4
#: Where the corner that the four parts of a mosaic share may lie, as a share of the side.
CORNER = (0.25, 0.75)
#: Default bound of the change of contrast and saturation (factors) and of brightness (in standard deviations).
LIGHT = 0.25
#: Shorter side in pixels to which photos are reduced when they are read.
KEPT_SIZE = 2 * IMAGE_SIZE


class AugmentedPhotos(Views):
    """Views under ``(photo, view)`` keys, each a function of the seed and the key.

    View 0 is the photo itself; for a photo that is listed again (see :func:`with_repeats`) only at its first place.

    Args:
        fitting: the photos.
        cutouts: stamps to paste, see :func:`free_cutouts`.
        seed: of the views.
        share: of the photos that get a cut-out.
        light: by how much brightness, contrast and saturation change at most.
        sides: a photo whose number is ``sides - 1`` modulo ``sides`` never meets the others in a view, nor their
            cut-outs: calibration with its default ``held_out`` judges on every fourth photo.
    """

    def __init__(
        self,
        fitting: Sequence[Photo],
        cutouts: Sequence[Path],
        seed: int = 0,
        sides: int = 4,
        *,
        share: float = CUTOUTS,
        light: float = LIGHT,
    ) -> None:
        self.fitting, self.cutouts, self.seed = list(fitting), list(cutouts), seed
        self.sides, self.share, self.light = sides, share, light
        first = {photo: index for index, photo in reversed(list(enumerate(self.fitting)))}
        self._first = set(first.values())
        self._opened: dict[Path, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.fitting)

    def __getitem__(self, key: Key) -> Item:
        index, view = key
        if view == 0 and index in self._first:
            return {"pixels": photos.to_pixels(self.fitting[index].render()[0]), "key": key}
        rng = random.Random(mix(self.seed, index, view))
        chosen = [index]
        if rng.random() < MOSAICS:
            chosen += rng.choices(self._companions(index, len(self.fitting)), k=3)
        parts = [self._part(number, rng) for number in chosen]
        pixels = parts[0] if len(parts) == 1 else _mosaic(parts, rng)
        return {"pixels": _lit(pixels, rng, self.light), "key": key}

    def _companions(self, index: int, count: int) -> list[int]:
        """The numbers below ``count`` on the same side as ``index``."""
        last = self.sides - 1
        side = index % self.sides == last
        return [number for number in range(count) if (number % self.sides == last) == side]

    def _part(self, index: int, rng: random.Random) -> Tensor:
        """A random crop of a photo's file, mirrored or not, with a cut-out or without."""
        image = _crop(self._open(self.fitting[index].path), rng)
        places = self._companions(index, len(self.cutouts))
        if places and rng.random() < self.share:
            image, _ = stamps.compose(image, self.cutouts[rng.choice(places)], rng, IMAGE_SIZE)
        return photos.to_pixels(image)

    def _open(self, path: Path) -> Image.Image:
        if path not in self._opened:
            self._opened[path] = photos.open_reduced(path, KEPT_SIZE)
        return self._opened[path]

    def fingerprint(self) -> str:
        """Changes with the photos, the cut-outs and the seed."""
        named = ([photo.name for photo in self.fitting], [p.name for p in self.cutouts])
        settings = (*named, self.seed, self.sides, self.share, self.light)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def with_repeats(
    fitting: Sequence[Photo], chosen: Collection[Photo], times: int, sides: int = 4
) -> list[Photo]:
    """``fitting``, followed by copies of those ``chosen`` until each is listed ``times`` times.

    This gives some photos a larger share of the views. A copy is placed on the same side as its photo
    (:class:`AugmentedPhotos`); if a side runs out of copies, the remaining ones of the other side are left out.
    """
    found, last = list(fitting), sides - 1
    waiting: dict[bool, list[Photo]] = {False: [], True: []}
    for _ in range(times - 1):
        for index, photo in enumerate(fitting):
            if photo in chosen:
                waiting[index % sides == last].append(photo)
    while waiting[len(found) % sides == last]:
        found.append(waiting[len(found) % sides == last].pop(0))
    return found


def free_cutouts(held_out: Collection[Photo], seed: int = 0) -> list[Path]:
    """Photographed stamps that are on none of the held-out photos, in an order that ``seed`` decides."""
    folder = photos.stamp_folder()
    if folder is None:
        return []
    taken = {photo.stamp for photo in held_out}
    found = stamps.find(folder, 10_000, random.Random(seed))
    return [path for path in found if path not in taken]


def _crop(image: Image.Image, rng: random.Random) -> Image.Image:
    area = rng.uniform(*AREA) * min(image.size) ** 2
    ratio = rng.uniform(*RATIO)
    width, height = (
        min(image.width, (area * ratio) ** 0.5),
        min(image.height, (area / ratio) ** 0.5),
    )
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _mosaic(parts: Sequence[Tensor], rng: random.Random) -> Tensor:
    """Four ``(3, S, S)`` images around one corner, each where it would be if it were alone."""
    row, column = (round(IMAGE_SIZE * rng.uniform(*CORNER)) for _ in range(2))
    first, right, below, last = parts
    upper = torch.cat([first[:, :row, :column], right[:, :row, column:]], dim=2)
    lower = torch.cat([below[:, row:, :column], last[:, row:, column:]], dim=2)
    return torch.cat([upper, lower], dim=1)


def _lit(pixels: Tensor, rng: random.Random, light: float) -> Tensor:
    """Normalised pixels with other brightness, contrast and saturation."""
    brightness, contrast, saturation = (rng.uniform(-light, light) for _ in range(3))
    mean = pixels.mean()
    pixels = mean + (1 + contrast) * (pixels - mean) + brightness * pixels.std()
    grey = pixels.mean(0, keepdim=True)
    return grey + (1 + saturation) * (pixels - grey)
