"""Images in, batches out: tensors, loaders, lists of images and folders, checked before a model
sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.errors import DataError, DwattnError
from dwattn.finite import all_finite
from dwattn.image_files import ImageFolder

#: Keys of a batch dictionary that hold targets; a model is called without them.
LABEL_KEYS = frozenset({"label", "labels", "label_ids", "target", "targets"})
#: Keys under which a batch dictionary may hold its pixels, in this order.
PIXEL_KEYS = ("pixel_values", "pixels", "images", "image", "x")


@dataclass(frozen=True)
class Batch:
    """A batch of images, in the form in which a model takes them.

    Args:
        inputs: the ``(B, 3, H, W)`` tensor, or the keyword arguments of the model.
        size: number of images ``B``.
        pixels: the ``(B, 3, H, W)`` tensor, or None when a dictionary has none under a known key.
    """

    inputs: Tensor | dict[str, Any]
    size: int
    pixels: Tensor | None

    def call(self, model: nn.Module) -> Any:
        """The model's output: ``model(pixels)``, or ``model(**inputs)`` without label keys.

        Raises:
            DataError: the model takes no such arguments, or no images of this size.
        """
        try:
            return model(**self.inputs) if isinstance(self.inputs, dict) else model(self.inputs)
        except (DwattnError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            raise DataError(
                f"{type(model).__name__} could not be called with {_described(self.inputs)} "
                f"({type(error).__name__}: {str(error).rstrip('.')}). {_remedy(self.inputs)}"
            ) from error

    def showing(self, pixels: Tensor) -> Batch:
        """The same batch with other pixels of the same shape; unchanged if its own pixels are not known."""
        if self.pixels is None:
            return self
        if isinstance(self.inputs, Tensor):
            return Batch(pixels, self.size, pixels)
        inputs = {k: pixels if v is self.pixels else v for k, v in self.inputs.items()}
        return Batch(inputs, self.size, pixels)


def _described(inputs: Tensor | dict[str, Any]) -> str:
    """What a model was called with: sizes of tensors, names of arguments."""
    if isinstance(inputs, Tensor):
        return f"a tensor of pixels alone, of shape {tuple(inputs.shape)}"
    sizes = (tuple(v.shape) if isinstance(v, Tensor) else "..." for v in inputs.values())
    return ", ".join(f"{key}={size}" for key, size in zip(inputs, sizes, strict=True))


def _remedy(inputs: Tensor | dict[str, Any]) -> str:
    if isinstance(inputs, Tensor):
        return (
            "If it takes images of another size or other channels, give those (--size), or make the model for these "
            "(timm:NAME?img_size=96); if it needs more than pixels, give batches that are dictionaries of its arguments, "
            "or pass the part of it that sees images."
        )
    return "Leave out keys that its forward does not take, and give images of a size that it takes."


def iterate(
    data: Any,
    *,
    batch_size: int = 16,
    num_images: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Batch]:
    """Walk over ``data`` once.

    Args:
        data: an image tensor ``(N, 3, H, W)``; a list or iterable of images ``(3, H, W)`` or of
            batches: tensors ``(B, 3, H, W)``, ``(image, label)`` pairs, or dictionaries of keyword
            arguments.
        batch_size: images per batch where ``data`` does not come in batches; a loader's batches
            stay as they are.
        num_images: stop after this many images; the last batch is cut.
        device, dtype: where the inputs go; ``dtype`` applies to floating-point tensors only.

    Raises:
        DataError: no images, another number of dimensions, NaN or infinite pixels, integer pixels,
            images of different sizes in one batch, or something that holds no images at all.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} must be at least 1.")
    if num_images is not None and num_images < 1:
        raise DataError(f"num_images={num_images} must be at least 1.")
    left = num_images
    seen = 0
    for item in _items(data, batch_size):
        batch = _batch(item, where=f"after {seen} images")
        if left is not None and batch.size > left:
            batch = _cut(batch, left)
        _check_pixels(batch, where=f"after {seen} images")
        seen += batch.size
        yield _move(batch, device, dtype)
        if left is not None:
            left -= batch.size
            if left == 0:
                return
    if seen == 0:
        raise DataError(
            "The data holds no images. Pass an image tensor (N, 3, H, W) or an iterable of "
            "batches; an iterator that was read before is empty."
        )


def is_reiterable(data: Any) -> bool:
    """Whether ``data`` can be read more than once (a one-shot iterator or generator cannot)."""
    if isinstance(data, Tensor):
        return True
    try:
        return iter(data) is not data
    except TypeError:
        return hasattr(data, "__getitem__")


def require_reiterable(data: Any, why: str) -> None:
    """Raise :class:`DataError` unless ``data`` can be read again; ``why`` completes "it has to,
    because ...".
    """
    if not is_reiterable(data):
        raise DataError(
            f"The data is a one-shot iterator ({type(data).__name__}) and cannot be read again, "
            f"but it has to be, because {why}. Pass a list of batches, a tensor or a DataLoader "
            "instead."
        )


def count_images(data: Any) -> int | None:
    """Number of images if it is known without reading them, for progress bars; None otherwise."""
    if isinstance(data, Tensor):
        return int(data.shape[0]) if data.dim() == 4 else None
    if isinstance(data, ImageFolder):
        return len(data.files)
    if isinstance(data, torch.utils.data.DataLoader):
        try:
            return len(data.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
    if isinstance(data, (list, tuple)):
        try:
            return sum(_leading(item) for item in data)
        except (DataError, AttributeError, IndexError):
            return None
    return None


def _leading(item: Any) -> int:
    tensor = item[0] if isinstance(item, (tuple, list)) else item
    if isinstance(tensor, Mapping):
        return _batch(tensor, where="").size
    return int(tensor.shape[0]) if tensor.dim() == 4 else 1


def _items(data: Any, batch_size: int) -> Iterator[Any]:
    """Batches of ``data``; single images are collected into batches."""
    if isinstance(data, Tensor):
        if data.dim() != 4:
            raise DataError(
                f"An image tensor has 4 dimensions (N, 3, H, W), got shape {tuple(data.shape)}. "
                "Add the batch dimension with images[None] if this is one image."
            )
        for start in range(0, len(data), batch_size):
            yield data[start : start + batch_size]
        return
    if isinstance(data, (str, bytes, Path, Mapping)) or not isinstance(data, (Iterable, Sequence)):
        if not (
            hasattr(data, "__getitem__")
            and hasattr(data, "__len__")
            and not isinstance(data, (str, Mapping))
        ):
            raise DataError(
                "Expected an image tensor (N, 3, H, W) or an iterable of batches, got "
                f"{type(data).__name__}{_advice(data)}"
            )
        data = _indexed(data)
    yield from _group_images(data, batch_size)


def _indexed(data: Any) -> Iterator[Any]:
    """The items of a map-style dataset."""
    for index in range(len(data)):
        yield data[index]


def _advice(data: Any) -> str:
    if isinstance(data, (str, Path)):
        return f" ({str(data)!r}); read a folder with dwattn.image_files.image_folder(path, size)."
    if isinstance(data, Mapping):
        return "; put one dictionary of a model's inputs into a list: [inputs]."
    return "."


def _group_images(data: Iterable[Any], batch_size: int) -> Iterator[Any]:
    pending: list[Tensor] = []
    for item in data:
        image = item[0] if isinstance(item, (tuple, list)) and len(item) else item
        if not (isinstance(image, Tensor) and image.dim() == 3):
            if pending:
                yield _stack(pending)
                pending = []
            yield item
            continue
        pending.append(image)
        if len(pending) == batch_size:
            yield _stack(pending)
            pending = []
    if pending:
        yield _stack(pending)


def _stack(images: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise DataError(
            "Images of different sizes cannot be put into one batch: "
            f"{', '.join(map(str, shapes))}. Resize and crop them to one size first."
        )
    return torch.stack(images)


def _batch(item: Any, where: str) -> Batch:
    if isinstance(item, Mapping):
        inputs = {key: value for key, value in item.items() if key not in LABEL_KEYS}
        pixels = next((inputs[k] for k in PIXEL_KEYS if isinstance(inputs.get(k), Tensor)), None)
        first = (
            pixels
            if pixels is not None
            else next((v for v in inputs.values() if isinstance(v, Tensor)), None)
        )
        if first is None or first.dim() == 0:
            raise DataError(
                f"A batch dictionary ({where}) has no tensors; its keys are "
                f"{sorted(map(str, item))}."
            )
        _check_shape(pixels, where)
        return Batch(inputs, int(first.shape[0]), pixels)
    if isinstance(item, (tuple, list)):
        if not item or not isinstance(item[0], Tensor):
            kind = type(item[0]).__name__ if item else "nothing"
            raise DataError(
                f"A batch ({where}) is a {type(item).__name__} that starts with {kind}; expected "
                "(image, label) with an image tensor first."
            )
        item = item[0]
    if not isinstance(item, Tensor):
        raise DataError(
            f"A batch ({where}) is a {type(item).__name__}; expected a tensor (B, 3, H, W), an "
            "(image, label) pair or a dictionary of model inputs. Turn PIL images into tensors "
            "first."
        )
    _check_shape(item, where)
    return Batch(item, int(item.shape[0]), item)


def _check_shape(pixels: Tensor | None, where: str) -> None:
    if pixels is None:
        return
    if pixels.dim() != 4:
        raise DataError(
            f"A batch of images ({where}) has shape {tuple(pixels.shape)}; expected (B, 3, H, W)."
        )
    if not pixels.is_floating_point():
        raise DataError(
            f"A batch of images ({where}) has dtype {pixels.dtype}; models take normalised "
            "floating-point pixels: divide by 255, subtract the mean and divide by the standard "
            "deviation the model was trained with."
        )
    if 0 in pixels.shape:
        raise DataError(
            f"A batch of images ({where}) is empty: its shape is {tuple(pixels.shape)}."
        )


def _check_pixels(batch: Batch, where: str) -> None:
    if batch.pixels is None:
        return
    if all_finite(batch.pixels):
        return
    bad = (~torch.isfinite(batch.pixels).flatten(1).all(1)).nonzero().flatten().tolist()
    raise DataError(
        f"Images {bad} of a batch ({where}) have NaN or infinite pixels. Remove these images or "
        "repair the preprocessing."
    )


def _cut(batch: Batch, size: int) -> Batch:
    if isinstance(batch.inputs, Tensor):
        return Batch(batch.inputs[:size], size, batch.inputs[:size])
    inputs = {
        key: value[:size]
        if isinstance(value, Tensor) and value.dim() and len(value) == batch.size
        else value
        for key, value in batch.inputs.items()
    }
    return _rebuilt(batch, inputs, size)


def _move(batch: Batch, device: torch.device | str | None, dtype: torch.dtype | None) -> Batch:
    def to(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    if isinstance(batch.inputs, Tensor):
        moved = to(batch.inputs)
        return Batch(moved, batch.size, moved)
    moved_inputs = {k: to(v) for k, v in batch.inputs.items()}
    return _rebuilt(batch, moved_inputs, batch.size)


def _rebuilt(batch: Batch, inputs: dict[str, Any], size: int) -> Batch:
    """``batch`` with other values under the same keys; its pixels stay one of them."""
    assert isinstance(batch.inputs, dict)
    key = next((k for k, v in batch.inputs.items() if v is batch.pixels), None)
    return Batch(inputs, size, None if key is None else inputs[key])
