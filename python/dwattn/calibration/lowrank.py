"""Closed-form factors of ``lowrank_dw``: which directions of a layer's attention output to keep.

With ``Y`` the true attention output before Wo (patch rows) and ``C = cov(Y)``, the ``r`` directions that keep
most of ``Y Wo^T`` in the mean square are the leading left singular vectors ``Q`` of ``C^(1/2) Wo^T``; then
``M = (C^(-1/2) Q_r)^T (r, C)`` and ``A = M Wv``, ``b_A = M bv``. The decomposition is done per head, because a
static kernel fits the mixture of channels of one head better than a mixture over heads with different patterns,
and the rank is shared among heads by their singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class OutputCovariance:
    """Accumulates ``cov(Y)`` of ``(..., C)`` attention outputs in fp64; second moments if not ``centred``.

    They are centred where a bias after Wo takes the mean, which the kept directions need not keep then.
    """

    def __init__(self, channels: int, device: torch.device, *, centred: bool = True) -> None:
        self.count, self.centred = 0, centred
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.outer = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, y: Tensor) -> None:
        y = y.flatten(0, -2)
        self.count += y.shape[0]
        self.sum += y.sum(0)
        self.outer += y.T @ y

    def covariance(self) -> Tensor:
        """``(C, C)``, with a floor on the spectrum so that its inverse root exists.

        Sums of fp32 products leave small eigenvalues negative where some channels follow from others.
        """
        cov = self.outer / self.count
        if self.centred:
            mean = self.sum / self.count
            cov = cov - torch.outer(mean, mean)
        floor = 1e-6 * cov.diagonal().mean().clamp(min=1e-30)
        values, vectors = torch.linalg.eigh(cov)
        return (vectors * (values.clamp(min=0) + floor)) @ vectors.T


@dataclass(frozen=True)
class Directions:
    """All directions of a layer, strongest first.

    Args:
        mix: ``(C, C)``; row ``k`` mixes the C channels into kept channel ``k``.
        strength: ``(C,)`` singular values, descending: what each adds to ``|Y Wo^T|^2`` of its head alone is its square.
    """

    mix: Tensor
    strength: Tensor


def output_directions(covariance: Tensor, wo: Tensor, num_heads: int) -> Directions:
    """Directions of every head, merged and sorted by singular value; ``wo (D, C)``."""
    channels = covariance.shape[0]
    head_dim = channels // num_heads
    rows, strengths = [], []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        values, vectors = torch.linalg.eigh(covariance[part, part])
        root = values.clamp(min=1e-30).sqrt()
        half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
        left, singular, _ = torch.linalg.svd(half @ wo[:, part].double().T, full_matrices=False)
        row = covariance.new_zeros(left.shape[1], channels)
        row[:, part] = (inverse @ left).T
        rows.append(row)
        strengths.append(singular)
    mix, strength = torch.cat(rows), torch.cat(strengths)
    order = strength.argsort(descending=True, stable=True)
    return Directions(mix[order], strength[order])


def kept_energy(mix: Tensor, covariance: Tensor, wo: Tensor) -> Tensor:
    """``(C,)``; entry ``k`` is the share of ``|Y Wo^T|^2``, of all heads together, that the best decoder finds in the first
    ``k + 1`` channels of ``Y mix^T``: these are made uncorrelated one after the other (Cholesky), so that each adds a
    square of its own.
    """
    wo = wo.double()
    lower = torch.linalg.cholesky(mix @ covariance @ mix.T)
    found = torch.linalg.solve_triangular(lower, mix @ covariance @ wo.T, upper=False)
    total = (wo @ covariance * wo).sum()
    return found.square().sum(1).cumsum(0) / total.clamp(min=1e-300)
