"""The ``residual`` criterion: what the best static replacement of an attention layer leaves
unexplained.

Per channel c the true attention output at a patch is regressed on the features that a replacement
has there: the 3x3 window of V, the prefix tokens' V, ``mean_patches(V)`` and 1. A small random
sample of the query positions of each image is enough, which makes the criterion nearly free during
scoring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwattn.errors import ScoreError
from dwattn.geometry import Geometry

POSITIONS_PER_IMAGE = 16
FOLDS = 4
#: Ridge strength relative to :func:`feature_energy`; both fits to attention outputs, this one and calibration's, are far from
#: underdetermined.
RIDGE = 1e-3
#: Channels whose features are formed at a time: a few megabytes.
_CHANNELS_AT_ONCE = 96


@dataclass(frozen=True)
class Sample:
    """The query positions that are looked at in each image of a batch, shared by all layers.

    The images are sorted by fold.

    Args:
        images: ``(B,)`` int64, indices into the batch.
        queries: ``(B, S)`` int64, token indices of the sampled patches.
        window: ``(B, S, 9)`` int64, token indices of their 3x3 windows, any valid index outside the
            grid.
        outside: ``(n,)`` int64, indices into the flattened windows that are not on the grid.
        folds: number of images in each fold.
    """

    images: Tensor
    queries: Tensor
    window: Tensor
    outside: Tensor
    folds: tuple[int, ...]


def image_keys(pixels: Tensor) -> Tensor:
    """A number per image that depends on its pixels alone: ``(B, C, H, W) -> (B,)`` int64 on the
    CPU.

    Positions and folds follow from it, so that they are the same however images are ordered,
    batched or divided among processes.
    """
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[pixels.element_size()]
    flat = pixels.detach().flatten(1)
    # Sums of integers wrap around and have the same value in any order. Odd weights tell images
    # apart whose pixels are permuted, for example flipped ones. One image at a time: the products
    # take twice the memory of fp32 pixels.
    weights = torch.arange(1, 2 * flat.shape[1], 2, device=pixels.device)
    return torch.stack([(image.view(words) * weights).sum() for image in flat]).cpu()


def sample_positions(
    keys: Tensor, geometry: Geometry, device: torch.device, seed: int = 0
) -> Sample:
    """Draw one position in each of S equal stretches of the raster order: no repeats, even
    coverage.

    Args:
        keys: ``(B,)`` int64 of :func:`image_keys`.
        seed: another seed draws other positions and folds.
    """
    fold = (_uniform(keys + seed, torch.zeros_like(keys)) * FOLDS).long()
    images = fold.argsort(stable=True)
    keys, patches = keys[images], geometry.num_patches
    count = min(POSITIONS_PER_IMAGE, patches)
    index = torch.arange(count)
    jitter = _uniform(keys[:, None] + seed, index[None] + 1)
    edges = torch.arange(count + 1) * patches // count
    queries = edges[:-1] + (jitter * edges.diff()).long()
    row, column = queries // geometry.width, queries % geometry.width
    step = torch.arange(-1, 2)
    rows = row[..., None] + step.repeat_interleave(3)
    columns = column[..., None] + step.repeat(3)
    inside = (rows >= 0) & (rows < geometry.height) & (columns >= 0) & (columns < geometry.width)
    window = rows.clamp(0, geometry.height - 1) * geometry.width + columns.clamp(
        0, geometry.width - 1
    )
    return Sample(
        images=images.to(device),
        queries=(queries + geometry.num_prefix).to(device),
        window=(window + geometry.num_prefix).to(device),
        outside=(~inside).flatten().nonzero().flatten().to(device),
        folds=tuple(torch.bincount(fold, minlength=FOLDS).tolist()),
    )


def _uniform(keys: Tensor, index: Tensor) -> Tensor:
    """Hash of two int64 tensors (splitmix64's finaliser) to fp64 numbers in [0, 1)."""
    x = keys + index * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shift(x, shift)) * factor
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() / 2**53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class StaticFit:
    """Gram matrices of features and true output, per fold of the images and channel.

    Args:
        channels: ``C``; num_prefix: ``P``.
        device: where they are accumulated, in fp64.
        storage: fp64 zeros to use, 1-D, :meth:`nbytes` long.
    """

    def __init__(
        self,
        channels: int,
        num_prefix: int,
        device: torch.device,
        storage: Tensor | None = None,
    ) -> None:
        size = 9 + num_prefix + 2 + 1
        self.num_prefix = num_prefix
        if storage is None:
            count = FOLDS * channels * size * size
            storage = torch.zeros(count, dtype=torch.float64, device=device)
        self.grams = storage.view(FOLDS, channels, size, size)

    @staticmethod
    def nbytes(channels: int, num_prefix: int) -> int:
        """Bytes of the Gram matrices of one layer."""
        return FOLDS * channels * (9 + num_prefix + 3) ** 2 * 8

    @torch.no_grad()
    def update(self, values: Tensor, output: Tensor, sample: Sample) -> None:
        """Add a batch: ``values`` V and ``output`` E V, both ``(B, N, C)``."""
        if values.dtype not in (torch.float32, torch.float64):
            values, output = values.float(), output.float()
        # Autocast would round the Gram matrices to half precision.
        with torch.autocast(values.device.type, enabled=False):
            self._add(values, output, sample)

    def _add(self, values: Tensor, output: Tensor, sample: Sample) -> None:
        for start in range(0, values.shape[-1], _CHANNELS_AT_ONCE):
            channels = slice(start, start + _CHANNELS_AT_ONCE)
            features = self._features(values[..., channels], output[..., channels], sample)
            positions, size, count = features.shape
            # (count, F + 1, positions) views of one transposed copy
            rows = features.flatten(1).t().contiguous().view(size, count, positions).transpose(0, 1)
            folds = rows.split([n * sample.queries.shape[1] for n in sample.folds], dim=2)
            for gram, fold in zip(self.grams, folds, strict=True):
                if fold.shape[2]:
                    gram[channels] += torch.bmm(fold, fold.transpose(1, 2))

    def _features(self, values: Tensor, output: Tensor, sample: Sample) -> Tensor:
        """Features and true output at the sampled positions: ``(B * S, F + 1, C)``."""
        shape = (*sample.queries.shape, -1, values.shape[-1])
        image = sample.images[:, None]
        window = values[image[..., None], sample.window]
        window.view(-1, shape[-1]).index_fill_(0, sample.outside, 0)
        prefix = values[sample.images, None, : self.num_prefix].expand(shape)
        mean = values[:, self.num_prefix :].mean(1)[image, None].expand(*shape[:2], 1, -1)
        target = output[image, sample.queries][:, :, None]
        return torch.cat([window, prefix, mean, torch.ones_like(mean), target], dim=2).flatten(0, 1)


def feature_energy(gram: Tensor, *, constant: bool) -> Tensor:
    """The scale that a ridge strength is relative to, ``(C, F, F)``: on the diagonal the mean energy of a channel's features, and for a last
    one that is constant its own, so that the units of the values do not matter.

    Args:
        gram: ``(C, F, F)``; constant: whether the last feature is 1 everywhere.
    """
    energy = gram.diagonal(dim1=1, dim2=2)
    values = energy[:, :-1] if constant else energy
    mean = values.mean(1, keepdim=True).clamp(min=1e-30).expand_as(values)
    return torch.diag_embed(torch.cat([mean, energy[:, -1:]], dim=1) if constant else mean)


def unexplained(grams: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Squared error of the best static replacement and squared true output, per channel: two
    ``(C,)`` fp64.

    Every fold is predicted by weights fitted to the other folds, so that few images do not make a
    layer look better than it is. With all images in one fold (one to three images) the fit is
    judged on itself.

    Args:
        grams: ``(folds, C, F + 1, F + 1)`` with the true output as the last row and column.
        ridge: strength relative to :func:`feature_energy`.
    """
    filled = [gram for gram in grams.double() if bool(gram.any())]
    if not filled:
        raise ScoreError("The residual has no data: the attention output of every image is zero.")
    total = torch.stack(filled).sum(0)
    error, power = torch.zeros_like(total[:, 0, 0]), torch.zeros_like(total[:, 0, 0])
    for gram in filled:
        train = total - gram if len(filled) > 1 else total
        a, b = train[:, :-1, :-1], train[:, :-1, -1]
        weights = torch.linalg.solve(a + ridge * feature_energy(a, constant=True), b)
        signed = torch.cat([weights, -torch.ones_like(weights[:, :1])], dim=1)
        error += torch.einsum("cf,cfg,cg->c", signed, gram, signed)
        power += gram[:, -1, -1]
    return error, power


def residual_shares(
    error: Tensor, power: Tensor, weight: Tensor, num_heads: int
) -> tuple[Tensor, float]:
    """Unexplained share per head ``(n_h,)`` and of the whole layer.

    Args:
        error, power: ``(C,)`` of :func:`unexplained`.
        weight: ``(C,)``, for example the squared column norms of Wo: what a channel's error adds to
            the stream.
    """
    lost = (error * weight).view(num_heads, -1).sum(1)
    whole = (power * weight).view(num_heads, -1).sum(1)
    tiny = torch.finfo(whole.dtype).tiny
    return lost / whole.clamp_min(tiny), float(lost.sum() / whole.sum().clamp_min(tiny))
