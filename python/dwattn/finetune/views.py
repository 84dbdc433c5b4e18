"""Training images as augmented views, each a function of its number, and the order in which a run sees them.

A view is a function of (seed, image, view number), a batch one of (seed, step): nothing random has a state that
would have to be stored, so a run continues where it was stopped, on any number of data workers and processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dwattn.errors import DataError
from dwattn.image_files import ImageFolder

Key = tuple[int, int]
Item = dict[str, Any]


@dataclass(frozen=True)
class Augment:
    """Random views of an image; view 0 is the image itself.

    Args:
        crop: range of the crop's area as a share of the image's; the crop is resized.
        ratio: range of the crop's aspect ratio relative to the image's.
        flip: probability of a mirror image.
        colour: largest relative change of brightness, contrast and saturation; 0 for none.
        size: ``(height, width)`` of all views; None for the image's. Images that are kept larger make sharper crops.
    """

    crop: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    colour: float = 0.0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        low, high = self.crop
        if not 0 < low <= high <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise DataError(
                f"crop={self.crop} must be shares of the area in (0, 1], and ratio={self.ratio} a positive range."
            )
        if not 0 <= self.flip <= 1:
            raise DataError(f"flip={self.flip} must lie in [0, 1].")
        if not 0 <= self.colour < 1:
            raise DataError(f"colour={self.colour} must be at least 0 and below 1.")

    def __call__(
        self, image: Tensor, seed: int, key: Key, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """View ``key = (image, view)`` of a ``(3, H, W)`` image and, moved alike, of its ``(H, W)`` class mask."""
        number, view = key
        height, width = image.shape[-2:]
        size = self.size or (height, width)
        if view == 0:
            return _resized(image, mask, size)
        rng = torch.Generator().manual_seed(mix(seed, number, view))
        area, ratio, top, left, mirror, *colours = torch.rand(8, generator=rng).tolist()
        side = (self.crop[0] + (self.crop[1] - self.crop[0]) * area) ** 0.5
        stretch = (self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** ratio) ** 0.5
        rows = min(height, max(1, round(side * height / stretch)))
        columns = min(width, max(1, round(side * width * stretch)))
        row, column = round(top * (height - rows)), round(left * (width - columns))
        window = (..., slice(row, row + rows), slice(column, column + columns))
        image, mask = _resized(image[window], None if mask is None else mask[window], size)
        if mirror < self.flip:
            image, mask = image.flip(-1), None if mask is None else mask.flip(-1)
        return self._coloured(image, colours) if self.colour else image, mask

    def _coloured(self, image: Tensor, draws: Sequence[float]) -> Tensor:
        """Brightness, contrast and saturation of normalised pixels, around their means."""
        brightness, contrast, saturation = ((2 * draw - 1) * self.colour for draw in draws)
        image = image + brightness * image.std()
        mean = image.mean()
        image = mean + (1 + contrast) * (image - mean)
        grey = image.mean(0, keepdim=True)
        return grey + (1 + saturation) * (image - grey)


def _resized(
    image: Tensor, mask: Tensor | None, size: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    if image.shape[-2:] == size:
        return image, mask
    options: dict[str, Any] = {"mode": "bicubic", "align_corners": False, "antialias": True}
    image = F.interpolate(image[None].float(), size, **options)[0].to(image.dtype)
    if mask is not None:
        mask = resized_mask(mask, size)
    return image, mask


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """``(H, W)`` classes in another size: those under the middles of the new pixels, as the image's are."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].to(mask.dtype)


def mix(*numbers: int) -> int:
    """A seed from several numbers, such that neighbours are unrelated."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class Views(Dataset[Item]):
    """Images under ``(image, view)`` keys: ``views[3, 1] -> {"pixels": (3, H, W), "key": (3, 1)}``.

    Args:
        images: a tensor ``(M, 3, H, W)`` of normalised pixels, or an :class:`dwattn.image_files.ImageFolder`, whose files
            are decoded when they are needed.
        augment: how views differ; None repeats the images.
        seed: of the views.
    """

    def __init__(
        self, images: Tensor | ImageFolder, augment: Augment | None = None, seed: int = 0
    ) -> None:
        if isinstance(images, Tensor) and (images.dim() != 4 or not len(images)):
            raise DataError(
                f"Training images are a tensor (M, 3, H, W) with M > 0, got {tuple(images.shape)}."
            )
        self.images, self.augment, self.seed = images, augment, seed

    def __len__(self) -> int:
        return len(self.images) if isinstance(self.images, Tensor) else len(self.images.files)

    def __getitem__(self, key: Key) -> Item:
        image, _ = self.view(key, None)
        return {"pixels": image, "key": key}

    def view(self, key: Key, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pixels of a view and the mask that belongs to it."""
        image = self.load(key[0])
        return (image, mask) if self.augment is None else self.augment(image, self.seed, key, mask)

    def load(self, index: int) -> Tensor:
        """The image itself."""
        if isinstance(self.images, Tensor):
            return self.images[index]
        return self.images.read(self.images.files[index])

    def rounds(self, count: int) -> Iterator[Tensor]:
        """View 0 of every image, then view 1 of every image, and so on: ``(3, H, W)`` each, made as they are read.

        For calibration on many views: ``dwattn.replace(..., calibrate=views.rounds(16), photos=len(views), views=1)``.
        """
        for view in range(count):
            for image in range(len(self)):
                pixels: Tensor = self[image, view]["pixels"]
                yield pixels

    def fingerprint(self) -> str:
        """Changes with the images (a folder's by their names and sizes), normalisation, augmentation and seed."""
        digest = hashlib.sha256(repr((self.augment, self.seed, len(self))).encode())
        if isinstance(self.images, Tensor):
            digest.update(self.images[:: max(1, len(self) // 16)].float().cpu().numpy().tobytes())
        else:
            mean, std = (t.flatten().tolist() for t in (self.images.mean, self.images.std))
            digest.update(repr((self.images.size, mean, std)).encode())
            for path in self.images.files:
                digest.update(f"{Path(path).name} {Path(path).stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


def collate(items: list[Item]) -> Item:
    """One batch: tensors stacked, ``key`` collected under ``keys``.

    Raises:
        DataError: images of different sizes.
    """
    shapes = sorted({tuple(item["pixels"].shape) for item in items})
    if len(shapes) > 1:
        raise DataError(f"Images of different sizes cannot be put into one batch: {shapes}.")
    batch: Item = {"keys": [item["key"] for item in items]}
    for name in items[0]:
        if name != "key":
            batch[name] = torch.stack([torch.as_tensor(item[name]) for item in items])
    return batch


@dataclass(frozen=True)
class Order:
    """Which views the steps see: every image once an epoch, in an order of its own each time.

    Args:
        images: number of images.
        batch_size: of a step, over all processes.
        seed: of the permutations.
        views: distinct views of an image before they repeat; None for ever new ones.
        steps: how many steps there are; start: the first of them.
        rank, world: takes every ``world``-th image of each step.
    """

    images: int
    batch_size: int
    seed: int
    views: int | None
    steps: int
    start: int = 0
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        for step in range(self.start, self.steps):
            keys = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.images != epoch:
                    epoch = place // self.images
                    order = self._permutation(epoch)
                view = epoch if self.views is None else epoch % self.views
                keys.append((order[place % self.images], view))
            yield keys[self.rank :: self.world]

    def _permutation(self, epoch: int) -> list[int]:
        rng = torch.Generator().manual_seed(mix(self.seed, epoch))
        order: list[int] = torch.randperm(self.images, generator=rng).tolist()
        return order

    def distinct(self) -> list[Key]:
        """All views that come at least twice, in a fixed order: what is worth keeping in a cache."""
        if self.views is None:
            return []
        epochs, rest = divmod(self.steps * self.batch_size, self.images)
        last = set(self._permutation(epochs)[:rest])
        times = [(epochs - view + self.views - 1) // self.views for view in range(self.views)]
        return [
            (image, view)
            for image in range(self.images)
            for view in range(self.views)
            if times[view] + (view == epochs % self.views and image in last) > 1
        ]
