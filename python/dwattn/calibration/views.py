"""More views of few photos: the photo itself, a mirrored random crop of it, then mosaics of four photos.

With about a hundred photos the fits of the wide layers see too little. Mosaics put parts of photos beside each other
that never met, which tells more about what attention does than further crops of the same scene. A view depends on the
seed, the photo's number and the photos before it, not on how photos are batched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.data import Batch

#: Range of a crop's side, as a share of the image's: of crops, and of the parts of a mosaic.
CROP, PART = (0.6, 1.0), (0.4, 1.0)
#: Where the corner that the four parts of a mosaic share may lie, as a share of the side.
CORNER = (0.25, 0.75)
#: Bounds of a mosaic's change of contrast (factor) and brightness (in standard deviations).
LIGHT = 0.25
#: Photos that are remembered as parts of mosaics.
MEMORY = 64


class PhotoViews:
    """Makes views of photos that arrive batch by batch, in order.

    Args:
        count: views of each photo, itself among them.
        seed: of crops and mosaics.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._photos = 0
        # Held-out photos and fitted ones never share a mosaic.
        self._recent: dict[bool, deque[Tensor]] = {s: deque(maxlen=MEMORY) for s in (False, True)}

    def of(self, batch: Batch, held_out: Tensor) -> Iterator[Batch]:
        """The batch, then ``count - 1`` batches of views of it; ``held_out (B,)`` tells its photos apart."""
        yield batch
        if self.count == 1 or batch.pixels is None:
            yield from [batch] * (self.count - 1)
            return
        views = [
            self._views_of(*pair) for pair in zip(batch.pixels, held_out.tolist(), strict=True)
        ]
        for images in zip(*views, strict=True):
            yield batch.showing(torch.stack(images))

    def _views_of(self, image: Tensor, held_out: bool) -> list[Tensor]:
        recent = self._recent[held_out]
        if self.count > 2:
            recent.append(image)
        number, self._photos = self._photos, self._photos + 1
        views = []
        for view in range(1, self.count):
            mixed = (self.seed * 1_000_003 + number) * 1_009 + view
            rng = torch.Generator().manual_seed(mixed % 2**63)
            if view == 1:
                views.append(_crop(image, image.shape[-2:], CROP, rng).flip(-1))
            else:
                views.append(_mosaic(image, recent, rng))
        return [view.to(image.dtype) for view in views]


def _crop(
    image: Tensor, size: tuple[int, ...], sides: tuple[float, float], rng: torch.Generator
) -> Tensor:
    """``(3, H, W) -> (3, *size)`` in fp32: a random crop of the image's aspect ratio, resized."""
    scale, top, left = torch.rand(3, generator=rng).tolist()
    side = sides[0] + (sides[1] - sides[0]) * scale
    height, width = image.shape[-2:]
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    row, column = round(top * (height - rows)), round(left * (width - columns))
    part = image[None, :, row : row + rows, column : column + columns].float()
    return F.interpolate(part, size=size, mode="bicubic", align_corners=False)[0]


def _mosaic(image: Tensor, others: deque[Tensor], rng: torch.Generator) -> Tensor:
    """``(3, H, W)`` in fp32: parts of the image and of three others around one corner, in another light."""
    height, width = image.shape[-2:]
    low, high = CORNER
    down, along = (low + (high - low) * torch.rand(2, generator=rng)).tolist()
    row, column = round(down * height), round(along * width)
    mosaic = torch.empty_like(image, dtype=torch.float32)
    for top, bottom in ((0, row), (row, height)):
        for left, right in ((0, column), (column, width)):
            source = image
            if top or left:
                source = others[int(torch.randint(len(others), (1,), generator=rng))]
            # Whole images are resized and then cut, so that things keep their proportions.
            part = _crop(source, (height, width), PART, rng)
            part = part.flip(-1) if torch.rand(1, generator=rng) < 0.5 else part
            mosaic[:, top:bottom, left:right] = part[:, top:bottom, left:right]
    contrast, brightness = (LIGHT * (2 * torch.rand(2, generator=rng) - 1)).tolist()
    mean, deviation = mosaic.mean(), mosaic.std()
    return (mosaic - mean) * (1 + contrast) + mean + brightness * deviation
