"""Small labelled data that installs as Debian packages: Fashion-MNIST, and photographed cut-outs on photographs."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.demo import photos, stamps
from dwattn.demo.pretrained import PIXEL_MEAN, PIXEL_STD
from dwattn.errors import DataError
from dwattn.finetune import Augment, LabelledViews, MaskedViews

FASHION = "usr/share/datasets/fashion-mnist"
GARMENTS = 10
#: Kinds of cut-outs, each with its folders; a pixel is of one of them, or background.
KINDS = {
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "small animal": ("animals/amphibians", "animals/fish", "animals/insects", "animals/lizards", "animals/shellfish"),
    "plant": ("plants",),
    "food": ("food",),
    "planet": ("space",),
    "vehicle": ("vehicles", "military"),
    "thing": ("hobbies", "household", "medical", "sports"),
}  # fmt: skip


def fashion(
    train: int, test: int, size: int, seed: int = 0, *, validation: bool = False
) -> tuple[LabelledViews, LabelledViews]:
    """``train`` and ``test`` pictures of clothes (dataset-fashion-mnist), 10 classes, at ``size x size`` pixels.

    Args:
        validation: measure on training pictures that are not trained on, to choose a recipe by.

    Raises:
        DataError: the package is neither installed nor unpacked, or holds fewer pictures.
    """
    folder = _package(FASHION, "dataset-fashion-mnist")
    augment = Augment(crop=(0.7, 1.0))
    kept = ("train", slice(train, train + test)) if validation else ("t10k", slice(-test, None))
    return (
        LabelledViews(*_drawn(folder, "train", slice(train), size, seed), GARMENTS, augment),
        LabelledViews(*_drawn(folder, *kept, size, seed), GARMENTS),
    )


def cutouts(
    train: int,
    test: int,
    size: int,
    seed: int = 0,
    *,
    validation: bool = False,
    known: bool = False,
) -> tuple[MaskedViews, MaskedViews]:
    """Cut-outs (tuxpaint-stamps-default) of eight kinds on photos, 9 classes with the background.

    The images to train and to measure on have no photo in common, and no cut-out unless ``known``. Masks have the
    size that the paper's decoder makes of the patches.

    Args:
        validation: measure on cut-outs and photos taken away from the training side, to choose a recipe by; those
            of the test are then not used at all.
        known: train and measure on all cut-outs, which then differ in place, size and photo: whether a pixel is
            found again, not whether a kind is recognised by things never seen.

    Raises:
        DataError: there are no cut-outs, or too few of a kind.
    """
    folder = _package(photos.STAMPS, "tuxpaint-stamps-default")
    plain = [photo for photo in photos.pool(200, seed) if photo.stamp is None]
    fitting, kept = _thirds(plain, seed)
    fit_stamps, test_stamps = _stamps(folder, random.Random(seed))
    if validation:
        fitting, kept = _thirds(fitting, seed)
        test_stamps = [paths[: len(paths) // 3] for paths in fit_stamps]
        fit_stamps = [paths[len(paths) // 3 :] for paths in fit_stamps]
    if known:
        both = zip(fit_stamps, test_stamps, strict=True)
        fit_stamps = test_stamps = [fitted + tested for fitted, tested in both]
    masks = (8 * (size // 14), 8 * (size // 14))
    augment = Augment(crop=(0.5, 1.0), colour=0.2)
    classes = len(KINDS) + 1
    return (
        MaskedViews(*_composed(fitting, fit_stamps, train, size, seed), classes, augment, mask_size=masks),
        MaskedViews(*_composed(kept, test_stamps, test, size, seed + 1), classes, mask_size=masks),
    )  # fmt: skip


def _thirds(found: list[photos.Photo], seed: int) -> tuple[list[photos.Photo], list[photos.Photo]]:
    """Two thirds and one third, split by scene."""
    return photos.split(found, calibration=2 * len(found) // 3, held_out=len(found) // 3, seed=seed)


def _package(inside: str, name: str) -> Path:
    for root in photos.data_folders():
        if (root / inside).is_dir():
            return root / inside
    raise DataError(
        f"{name} is needed: install it, or unpack it (apt-get download {name}; dpkg-deb -x {name}_*.deb FOLDER) and "
        f"set {photos.DATA_FOLDER_VARIABLE}=FOLDER."
    )


def _drawn(folder: Path, part: str, chosen: slice, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised pixels and labels of the ``chosen`` of all pictures of a part in drawn order."""
    pictures = _idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz")
    most = max(abs(bound) for bound in (chosen.start, chosen.stop) if bound is not None)
    if most > len(labels):
        raise DataError(f"{most} pictures were asked for; {part} holds {len(labels)}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[chosen]
    grey = torch.from_numpy(pictures[order.numpy()]).float().div(255)[:, None]
    grey = F.interpolate(grey, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (grey - mean) / std, torch.from_numpy(labels[order.numpy()]).long()


def _idx(path: Path) -> np.ndarray:
    """A file of the MNIST format: magic number with the number of axes, their lengths, bytes."""
    with gzip.open(path) as file:
        axes = file.read(4)[3]
        shape = [int.from_bytes(file.read(4), "big") for _ in range(axes)]
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def _stamps(folder: Path, rng: random.Random) -> tuple[list[list[Path]], list[list[Path]]]:
    """Cut-outs by kind to train on, and the third to test on."""
    fitting, kept = [], []
    for kind, places in KINDS.items():
        paths = [
            path
            for place in places
            for path in sorted((folder / place).rglob("*.png"))
            if "mirror" not in path.name
            and "cartoon" not in path.as_posix()
            and stamps.is_photograph(path)
        ]
        if len(paths) < 3:
            raise DataError(
                f"{folder} holds {len(paths)} photographed cut-outs of the kind {kind!r} "
                f"({', '.join(places)}); 3 are needed."
            )
        rng.shuffle(paths)
        kept.append(paths[: len(paths) // 3])
        fitting.append(paths[len(paths) // 3 :])
    return fitting, kept


def _composed(
    backgrounds: list[photos.Photo], by_kind: list[list[Path]], count: int, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """``count`` cut-outs, of each kind as many, each on a photo: pixels and masks."""
    rng = random.Random(seed)
    pixels, masks = [], []
    for index in range(count):
        kind = index % len(by_kind)
        stamp = by_kind[kind][index // len(by_kind) % len(by_kind[kind])]
        photo = backgrounds[index % len(backgrounds)]
        place = photos.Photo(
            photo.name, photo.package, photo.scene, photo.path, stamp, rng.randrange(1 << 30)
        )
        image, mask = place.render(size)
        assert mask is not None
        pixels.append(photos.to_pixels(image))
        masks.append(torch.from_numpy(mask).to(torch.uint8) * (kind + 1))
    return torch.stack(pixels), torch.stack(masks)
