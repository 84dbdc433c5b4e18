"""Datasets of a task: images in one folder per class, or images with masks of classes; checked before training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dwattn.errors import DataError
from dwattn.finetune.views import Augment, Item, Key, Views, resized_mask
from dwattn.image_files import (
    IMAGE_SUFFIXES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFolder,
    child_folders,
    files_below,
    fit,
    image_folder,
    open_image,
)

#: Pixels of this class count neither in the loss nor in mIoU.
IGNORE = 255
_LISTED = 5


class LabelledViews(Views):
    """Images in memory with a class each: items have ``label``.

    Args:
        images: ``(M, 3, H, W)`` or a folder; labels: ``(M,)`` integers in ``[0, classes)``.

    Raises:
        DataError: another number of labels, or labels out of range.
    """

    def __init__(
        self,
        images: Tensor | ImageFolder,
        labels: Tensor | Sequence[int],
        classes: int,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(images, augment, seed)
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.classes = classes
        if self.labels.shape != (len(self),):
            raise DataError(f"{len(self)} images have labels of shape {tuple(self.labels.shape)}.")
        _check_range(self.labels, classes, "The labels")

    def __getitem__(self, key: Key) -> Item:
        return {**super().__getitem__(key), "label": self.labels[key[0]]}

    def fingerprint(self) -> str:
        return _with_targets(super().fingerprint(), self.labels)


class MaskedViews(Views):
    """Images in memory with a class for each pixel: items have ``mask (h, w)``.

    Args:
        masks: ``(M, H, W)`` integers in ``[0, classes)``, or 255 where a pixel has no class.
        mask_size: of the masks in the items; default: that of the images.
    """

    def __init__(
        self,
        images: Tensor | ImageFolder,
        masks: Tensor,
        classes: int,
        augment: Augment | None = None,
        seed: int = 0,
        mask_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(images, augment, seed)
        self.masks, self.classes, self.mask_size = masks, classes, mask_size
        size = images.shape[-2:] if isinstance(images, Tensor) else images.size
        if masks.shape != (len(self), *size):
            raise DataError(
                f"{len(self)} images of {size[0]} x {size[1]} pixels have masks of shape {tuple(masks.shape)}."
            )
        _check_range(masks, classes, "The masks", IGNORE)

    def __getitem__(self, key: Key) -> Item:
        image, mask = self.view(key, self.load_mask(key[0]))
        assert mask is not None
        if self.mask_size is not None and mask.shape != self.mask_size:
            mask = resized_mask(mask, self.mask_size)
        return {"pixels": image, "key": key, "mask": mask.long()}

    def load_mask(self, index: int) -> Tensor:
        """The mask of an image, in the image's size."""
        return self.masks[index]

    def fingerprint(self) -> str:
        return _with_targets(f"{super().fingerprint()} {self.mask_size}", self.masks)


class MaskFolder(MaskedViews):
    """Images in one folder, masks of the same names in another (``.png``; each grey or palette value is a class).

    Everything is read and checked when it is made: missing masks, masks of another size than their image, class
    ids out of range.

    Args:
        images, masks: folders; size: ``(height, width)`` that images and masks are brought to alike.
        classes: number of classes; 255 marks pixels without one.

    Raises:
        DataError: names the files, their sizes and values.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        size: tuple[int, int],
        classes: int,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augment: Augment | None = None,
        seed: int = 0,
        mask_size: tuple[int, int] | None = None,
    ) -> None:
        folder = image_folder(images, size, mean, std)
        root, masks = Path(images), Path(masks)
        if not masks.is_dir():
            raise DataError(f"There is no folder of masks {masks}.")
        paths = [(masks / file.relative_to(root)).with_suffix(".png") for file in folder.files]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} images have no mask: {_some(missing)} missing. Add them, or remove "
                f"the images."
            )
        found = torch.stack(
            [_read_mask(m, f, size, classes) for m, f in zip(paths, folder.files, strict=True)]
        )
        super().__init__(folder, found, classes, augment, seed, mask_size)


def labelled_folder(
    path: str | Path,
    size: tuple[int, int],
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: Augment | None = None,
    seed: int = 0,
) -> tuple[LabelledViews, list[str]]:
    """Images of ``path/CLASS/...``, and the names of the classes in the order of their numbers.

    Args:
        classes: names that a training folder gave, so that a test folder numbers them alike.

    Raises:
        DataError: no class folders, an empty one, one class only, or a folder that is no known class.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}.")
    found = sorted(child_folders(root))
    names = list(classes) if classes is not None else found
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{root} has folders that are no class of the training images: {_some(unknown)}."
        )
    if len(names) < 2:
        raise DataError(
            f"{root} holds {len(names)} class folders; put the images of each class, at least two, into a folder of its own."
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in found:
            continue
        images = [f for f in sorted(files_below(root / name)) if f.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise DataError(f"The class folder {root / name} holds no images. Fill or remove it.")
        files += images
        labels += [label] * len(images)
    folder = ImageFolder(files, size, mean, std)
    return LabelledViews(folder, labels, len(names), augment, seed), names


def _read_mask(path: Path, image: Path, size: tuple[int, int], classes: int) -> Tensor:
    from PIL import Image

    mask, picture = open_image(path), open_image(image)
    if mask.size != picture.size:
        raise DataError(
            f"The mask {path} has {mask.width} x {mask.height} pixels, its image {image} {picture.width} x "
            f"{picture.height}."
        )
    if mask.mode not in ("L", "P", "1"):
        raise DataError(
            f"The mask {path} has the mode {mask.mode}; the class of a pixel must be its grey or palette value."
        )
    spread = _spread(path) if mask.mode == "L" else 1
    values = torch.from_numpy(np.asarray(mask, dtype=np.uint8) // spread)
    _check_range(values, classes, f"The mask {path}", IGNORE)
    fitted = fit(Image.fromarray(values.numpy()), size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(fitted, dtype=np.uint8).copy())


def _spread(path: Path) -> int:
    """The factor by which PIL multiplies the grey values of a PNG file of 2 or 4 bits, so that they reach 255."""
    with path.open("rb") as file:
        header = file.read(25)
    bits = header[24] if header.startswith(b"\x89PNG") else 8
    return 255 // (2**bits - 1) if bits in (2, 4) else 1


def _check_range(values: Tensor, classes: int, what: str, ignore: int | None = None) -> None:
    if ignore is not None and classes > ignore:
        raise DataError(
            f"{ignore} marks pixels without a class, so that {classes} classes are too many."
        )
    found = values.unique().long()  # 256 classes are more than bytes can be compared with
    wrong = found[(found < 0) | (found >= classes)]
    if ignore is not None:
        wrong = wrong[wrong != ignore]
    if len(wrong):
        also = "" if ignore is None else f", or {ignore} for pixels without a class"
        raise DataError(
            f"{what} have class ids {wrong[:_LISTED].tolist()}; with {classes} classes they are 0 to "
            f"{classes - 1}{also}."
        )


def _with_targets(images: str, targets: Tensor) -> str:
    return hashlib.sha256(images.encode() + targets.cpu().numpy().tobytes()).hexdigest()[:16]


def _some(items: Sequence[object]) -> str:
    listed = ", ".join(str(item) for item in items[:_LISTED])
    return listed + (f" and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
