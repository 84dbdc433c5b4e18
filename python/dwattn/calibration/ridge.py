"""Ridge regression of what a linear layer should have written, with the strength chosen on held-out images.

A pretrained layer ``y = f W^T + b`` misses its target by ``e``. The correction minimises

    ``mean_t |e_t - dW f_t - db|^2  +  lambda * mean(diag cov(f)) * |dW|^2``,

so ``lambda -> inf`` keeps the pretrained weights. Only second moments are kept: ``cov(f)`` and ``cov(f, e)``,
once for the images that are fitted and once for the images that are held out. The strength is the one with
the least held-out error; the final fit uses all images. Sums are formed in fp32 products of at most one chunk
of tokens and accumulated in fp64; all solves are fp64. Where the layer has a bias, features are taken less their mean
in the first chunk, so that a large mean does not drown ``cov(f)`` in the rounding of the products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwattn.errors import CalibrationError

#: Strengths tried, relative to the mean feature variance: half decades from 10 down to 1e-4, until the held-out
#: error rises.
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(2, -9, -1))

#: Columns of a Gram matrix that are multiplied at a time.
_GRAM_COLUMNS = 384

#: A correction is kept only if it lowers the held-out error by this share.
MIN_GAIN = 1e-3


@dataclass(frozen=True)
class Correction:
    """``dW (q, p)`` and ``db (q)`` in fp64, and how they were judged.

    Args:
        strength: the chosen lambda, or inf if no correction helped (then both are zero).
        held_out: error energy left on held-out images, as a share of the error energy before.
        fitted: the same on the fitted images.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    held_out: float
    fitted: float


class _Moments:
    """Sums over tokens of ``f (p)`` and ``e (q)``: enough for the error of any linear correction."""

    def __init__(self, features: int, targets: int, device: torch.device, *, centred: bool) -> None:
        self.centred = centred

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count = 0.0
        self.f, self.e, self.ee = zeros(features), zeros(targets), zeros(1).squeeze()
        self.ff, self.fe = zeros(features, features), zeros(features, targets)

    def add(self, f: Tensor, e: Tensor) -> None:
        self.count += f.shape[0]
        self.f += f.sum(0)
        self.e += e.sum(0)
        self.ee += e.square().sum()
        self.ff += _gram(f)
        self.fe += f.T @ e

    def __add__(self, other: _Moments) -> _Moments:
        total = _Moments(self.f.numel(), self.e.numel(), self.f.device, centred=self.centred)
        for name in ("count", "f", "e", "ee", "ff", "fe"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def covariances(self) -> tuple[Tensor, Tensor]:
        """``cov(f) (p, p)`` and ``cov(f, e) (p, q)``; plain second moments where no bias can be fitted."""
        if not self.centred:
            return self.ff / self.count, self.fe / self.count
        mean_f, mean_e = self.f / self.count, self.e / self.count
        return (
            self.ff / self.count - torch.outer(mean_f, mean_f),
            self.fe / self.count - torch.outer(mean_f, mean_e),
        )

    def energy(self) -> float:
        """Mean of ``|e|^2``."""
        return float(self.ee / self.count)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean of ``|e - f W - b|^2`` for ``weight (p, q)``."""
        cross = (weight * self.fe).sum() / self.count
        quadratic = (weight * (self.ff @ weight)).sum() / self.count
        mean_fit = (self.f / self.count) @ weight
        offset = bias @ bias + 2 * bias @ mean_fit - 2 * bias @ (self.e / self.count)
        return float(self.ee / self.count - 2 * cross + quadratic + offset)


def _gram(f: Tensor) -> Tensor:
    """``f^T f`` of ``f (tokens, p)``: what lies above the diagonal blocks is copied from below them."""
    features = f.shape[1]
    gram = f.new_empty(features, features)
    for start in range(0, features, _GRAM_COLUMNS):
        block = slice(start, start + _GRAM_COLUMNS)
        below = f[:, start:].T @ f[:, block]
        gram[start:, block] = below
        gram[block, start:] = below.T
    return gram


class CorrectionFit:
    """Accumulates ``(f, e)`` pairs and solves for the correction.

    Args:
        features: ``p``, inputs of the layer; targets: ``q``, its outputs.
        device: where the moments live.
        bias: whether the layer has a bias to correct.
    """

    def __init__(
        self, features: int, targets: int, device: torch.device, *, bias: bool = True
    ) -> None:
        self.fit = _Moments(features, targets, device, centred=bias)
        self.held_out = _Moments(features, targets, device, centred=bias)
        self._origin = torch.zeros(features, device=device)

    def add(self, features: Tensor, error: Tensor, *, held_out: bool) -> None:
        """``features (..., p)`` and ``error (..., q)`` of tokens of images on one side of the split."""
        moments = self.held_out if held_out else self.fit
        features = features.flatten(0, -2)
        if moments.centred:
            if not self.fit.count + self.held_out.count:
                self._origin = features.mean(0)
            features = features - self._origin
        moments.add(features, error.flatten(0, -2))

    def solve(self) -> Correction:
        """The correction with the least held-out error; zero if none lowers it.

        Without held-out images (a single photo) nothing can be judged and the strongest shrinkage is used.

        Raises:
            CalibrationError: the features are the same everywhere.
        """
        judged = self.held_out.count > 0
        best, best_error = None, self.held_out.energy() * (1 - MIN_GAIN) if judged else float("inf")
        previous = float("inf")
        for strength in STRENGTHS if judged else STRENGTHS[:1]:
            try:
                weight, bias = _solve(self.fit, strength)
            except CalibrationError:
                if strength == STRENGTHS[0]:
                    raise
                break  # weaker ones fail too
            error = self.held_out.error(weight, bias) if judged else 0.0
            if error < best_error:
                best, best_error = strength, error
            if error > previous:
                break
            previous = error
        if best is None:
            return Correction(self.fit.fe.T * 0, self.fit.e * 0, float("inf"), 1.0, 1.0)
        everything = self.fit + self.held_out if judged else self.fit
        weight, bias = _solve(everything, best)
        held_out = best_error / max(self.held_out.energy(), 1e-300) if judged else float("nan")
        fitted = everything.error(weight, bias) / max(everything.energy(), 1e-300)
        bias = bias - self._origin.double() @ weight
        return Correction(weight.T.contiguous(), bias, best, held_out, fitted)


def _solve(moments: _Moments, strength: float) -> tuple[Tensor, Tensor]:
    """``(p, q)`` weights and ``(q)`` bias at one ridge strength."""
    cov, cross = moments.covariances()
    spread = cov.diagonal().mean()
    ridge = strength * spread.clamp(min=1e-30)
    factor, failed = torch.linalg.cholesky_ex(
        cov + ridge * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    )
    if failed:
        raise CalibrationError(
            f"The inputs of a layer hardly vary (mean variance {float(spread):.2g}), so that nothing can be fitted to "
            f"them: the images may be constant. Calibrate on more varied ones."
        )
    weight = torch.cholesky_solve(cross, factor)
    bias = (moments.e - moments.f @ weight) / moments.count
    return weight, bias if moments.centred else torch.zeros_like(bias)
