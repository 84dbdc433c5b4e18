"""More views of few photos: the photo itself, then mirrored random crops of it.

With about a hundred photos the fits of the wide layers see too little; other views of the same photos help, crops
more than mirror images alone. A view depends on the seed and the photo's number only, not on how photos are batched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.data import Batch

#: Range of the crop's side, as a share of the image's.
CROP = (0.6, 1.0)


def views_of(batch: Batch, first: int, count: int, seed: int) -> Iterator[Batch]:
    """The batch, then ``count - 1`` mirrored random crops of it; ``first`` is the number of its first photo."""
    yield batch
    for view in range(1, count):

        def crop(pixels: Tensor, view: int = view) -> Tensor:
            return torch.stack(
                [_mirrored_crop(image, seed, first + i, view) for i, image in enumerate(pixels)]
            )

        yield batch.with_pixels(crop)


def _mirrored_crop(image: Tensor, seed: int, photo: int, view: int) -> Tensor:
    """``(3, H, W) -> (3, H, W)``: a random crop of the image's aspect ratio, resized back and mirrored."""
    rng = torch.Generator().manual_seed((seed * 1_000_003 + photo) * 1_009 + view)
    scale, top, left = torch.rand(3, generator=rng).tolist()
    side = CROP[0] + (CROP[1] - CROP[0]) * scale
    height, width = image.shape[-2:]
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    row, column = round(top * (height - rows)), round(left * (width - columns))
    part = image[None, :, row : row + rows, column : column + columns].float()
    resized = F.interpolate(part, size=(height, width), mode="bicubic", align_corners=False)
    return resized[0].flip(-1).to(image.dtype)
