"""Folders of images: which files are read, how they are decoded, and the batches that a model gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwattn.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: The largest 16-bit grey value.
_WHITE = 65535
#: Damaged files that an error names.
_LISTED = 5


class ImageFolder:
    """Batches ``(B, 3, H, W)`` of a folder's images, decoded as they are read; can be read again
    and again.

    Args:
        files: image paths, in the order they are read.
        size: ``(height, width)`` of the result: the image is resized to cover it and its centre is
            cropped.
        mean, std: per-channel normalisation of pixels in ``[0, 1]``.
        batch_size: images per batch.
    """

    def __init__(
        self,
        files: Sequence[Path],
        size: tuple[int, int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 16,
    ) -> None:
        self.files, self.size, self.batch_size = list(files), size, batch_size
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.files), self.batch_size):
            yield torch.stack(
                [self.read(path) for path in self.files[start : start + self.batch_size]]
            )

    def read(self, path: Path) -> Tensor:
        """One image as a normalised ``(3, H, W)`` tensor.

        Raises:
            DataError: the file cannot be decoded or has grey values of unknown range; names it.
        """
        from PIL import Image  # imported here: `import dwattn` stays light

        height, width = self.size
        image = fit(_coloured(open_image(path), path), self.size, Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
            height, width, 3
        )
        return (pixels.permute(2, 0, 1).float() / 255 - self.mean) / self.std


def require_readable(
    files: Sequence[Path],
    watch: Callable[[Iterable[DataError | None]], Iterable[DataError | None]] = iter,
) -> None:
    """Decode every file once, before long work begins that a damaged one would end.

    JPEGs are decoded at an eighth of their size, for which all of their data are read too.

    Args:
        watch: gets what was found file by file and passes it on, as progress bars do.

    Raises:
        DataError: files cannot be decoded or have grey values of unknown range; names them.
    """
    # Decoders release the interpreter's lock.
    with ThreadPoolExecutor() as threads:
        faults = [fault for fault in watch(threads.map(_fault, files)) if fault is not None]
    if len(faults) == 1:
        raise faults[0]
    if faults:
        more = f" And {len(faults) - _LISTED} more." if len(faults) > _LISTED else ""
        raise DataError(
            f"{len(faults)} of {len(files)} images cannot be read. "
            + " ".join(str(fault) for fault in faults[:_LISTED])
            + more
        )


def _fault(path: Path) -> DataError | None:
    try:
        _coloured(open_image(path, coarse=True), path)
    except DataError as error:
        return error
    return None


def open_image(path: Path, *, coarse: bool = False) -> Any:
    """The PIL image of a file, decoded and turned upright.

    Args:
        coarse: JPEGs at an eighth of their size, which is several times faster.

    Raises:
        DataError: the file cannot be decoded; names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            if coarse:
                opened.draft(None, (max(1, opened.width // 8), max(1, opened.height // 8)))
            opened.load()
            try:
                return ImageOps.exif_transpose(opened)
            except (
                Exception
            ):  # damaged EXIF raises whatever Pillow meets in it; the pixels are whole
                return opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image: {error}. Remove or replace the file."
        ) from error


def _coloured(image: Any, path: Path) -> Any:
    """A PIL image in RGB; 16-bit grey is scaled to 8 bits, where Pillow would clip it to white."""
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > _WHITE:
            raise DataError(
                f"{path} has grey values from {grey.min():g} to {grey.max():g} (mode {image.mode}), and nothing says "
                "which are black and white. Save it with 8 or 16 bits per pixel."
            )
        image = Image.fromarray(((grey.astype(np.int64) + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def fit(image: Any, size: tuple[int, int], resample: Any) -> Any:
    """A PIL image resized to cover ``size = (height, width)``, and its centre of that size."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(resized, resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def image_folder(
    path: str | Path,
    size: int | tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> ImageFolder:
    """The images below ``path`` in the order of their names, or the single image at ``path``.

    Links to folders are followed; files and folders whose names start with a dot are left out.

    Args:
        size: side of the square, or ``(height, width)``, in pixels.
        limit: at most this many images, evenly spaced over all, so that each subfolder has its share.

    Raises:
        DataError: the folder does not exist or holds no images.
    """
    root = Path(path)
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise DataError(f"size={size} must be positive numbers of pixels.")
    if not root.exists():
        raise DataError(f"There is no folder or image {root}.")
    found = [root] if root.is_file() else sorted(files_below(root))
    files = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and _is_file(file)]
    if not files:
        raise DataError(
            f"{root} holds no images; files ending in {', '.join(sorted(IMAGE_SUFFIXES))} are "
            "read, in subfolders too."
        )
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    return ImageFolder(files, (height, width), mean, std, batch_size)


def child_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones left out; raises as :func:`files_below`."""
    _, folders, _ = next(os.walk(root, onerror=_unreadable))
    return [name for name in folders if not name.startswith(".")]


def files_below(root: Path) -> Iterator[Path]:
    """Files below a folder, hidden ones (such as macOS's ``._a.jpg``) left out.

    Raises:
        DataError: a folder that may not be read, whose images would be missing without a word.
    """
    for name, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        folder = Path(name)
        folders[:] = [n for n in folders if not n.startswith(".") and not _leads_back(folder / n)]
        yield from (folder / n for n in files if not n.startswith("."))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:  # said when it is decoded
        return True


def _unreadable(error: OSError) -> None:
    raise DataError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error


def _leads_back(path: Path) -> bool:
    """Whether a link points to a folder that it lies in."""
    return path.is_symlink() and path.resolve() in {above.resolve() for above in path.parents}
