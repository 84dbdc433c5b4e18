"""Closed-form kernels and context terms of a replaced layer.

For channel ``c`` the best ``K[c], kappa[:, c], mu[c], beta[c]`` are a ridge regression of the true attention
output (patch rows, before Wo) on ``9 + P + 2`` features: the 3x3 neighbourhood of V, the prefix values, the
mean of the patch values, and 1. One small Gram matrix a channel is accumulated over all images and solved once
in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.geometry import Geometry
from dwattn.residual import RIDGE, feature_energy

TAPS = tuple((dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1))


@dataclass(frozen=True)
class StencilWeights:
    """``kernel (C, 3, 3)``, ``kappa (P, C)``, ``mu (C)``, ``beta (C)``, fp64; ``residual (C)`` energy left."""

    kernel: Tensor
    kappa: Tensor
    mu: Tensor
    beta: Tensor
    residual: Tensor
    energy: Tensor


def stencil_features(v: Tensor, geometry: Geometry) -> Tensor:
    """``(C, 9 + P + 2, B*H*W)`` features of the patch rows; ``v (B, N, C)``."""
    batch, _, channels = v.shape
    height, width, prefix = geometry.height, geometry.width, geometry.num_prefix
    # Channels come first from here on: transposing V once is much cheaper than transposing its features.
    rows = v.permute(2, 0, 1).contiguous()
    grids = F.pad(rows[:, :, prefix:].unflatten(2, geometry.grid), (1, 1, 1, 1))
    features = v.new_empty(channels, 9 + prefix + 2, batch, height, width)
    for k, (dr, dc) in enumerate(TAPS):
        features[:, k] = grids[:, :, 1 + dr : 1 + dr + height, 1 + dc : 1 + dc + width]
    context = torch.cat([rows[:, :, :prefix], rows[:, :, prefix:].mean(2, keepdim=True)], dim=2)
    features[:, 9:-1] = context.transpose(1, 2)[..., None, None]
    features[:, -1] = 1
    return features.flatten(2)


class StencilFit:
    """Accumulates the Gram matrices of ``C`` channels.

    Args:
        channels: ``C``; geometry: grid and prefix tokens of the images.
        context: fit kappa, mu and beta too; without them only the 3x3 kernel.
    """

    def __init__(
        self, channels: int, geometry: Geometry, device: torch.device, *, context: bool = True
    ) -> None:
        self.geometry, self.context = geometry, context
        size = 9 + geometry.num_prefix + 2 if context else 9
        self.gram = torch.zeros(channels, size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(channels, size, dtype=torch.float64, device=device)
        self.energy = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, v: Tensor, target: Tensor) -> None:
        """``v (B, N, C)`` values, ``target (B, H*W, C)`` attention output of the patch rows before Wo."""
        features = stencil_features(v, self.geometry)[:, : self.gram.shape[1]]
        y = target.flatten(0, 1).T.contiguous()
        self.gram += features @ features.transpose(1, 2)
        self.cross += (features @ y.unsqueeze(-1)).squeeze(-1)
        self.energy += y.square().sum(1)

    def tie(self, groups: int) -> None:
        """Give all channels of each of ``groups`` equal runs one common fit (the per-head kernels of ``conv``)."""
        for name in ("gram", "cross", "energy"):
            moments = getattr(self, name)
            per_group = moments.unflatten(0, (groups, -1))
            setattr(
                self,
                name,
                per_group.mean(1, keepdim=True).expand_as(per_group).flatten(0, 1).clone(),
            )

    def solve(self, strength: float = RIDGE) -> StencilWeights:
        """Solve all channels; the residual is that of the fitted images."""
        regular = self.gram + strength * feature_energy(self.gram, constant=self.context)
        w = torch.linalg.solve(regular, self.cross.unsqueeze(-1)).squeeze(-1)
        residual = (
            self.energy
            - 2 * (w * self.cross).sum(1)
            + torch.einsum("cp,cpq,cq->c", w, self.gram, w)
        )
        channels, prefix = w.shape[0], self.geometry.num_prefix
        rest = w[:, 9:] if self.context else w.new_zeros(channels, prefix + 2)
        return StencilWeights(
            kernel=w[:, :9].reshape(channels, 3, 3),
            kappa=rest[:, :prefix].T.contiguous(),
            mu=rest[:, prefix],
            beta=rest[:, prefix + 1],
            residual=residual.clamp(min=0),
            energy=self.energy,
        )


class PrefixFit:
    """Closed-form ``a, b`` of static prefix rows: true prefix rows on ``V_t`` and ``mean_patches(V)``."""

    def __init__(self, num_prefix: int, channels: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_prefix, channels, 2, 2, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_prefix, channels, 2, dtype=torch.float64, device=device)
        self.num_prefix = num_prefix

    def add(self, v: Tensor, target: Tensor) -> None:
        """``v (B, N, C)``, ``target (B, P, C)``: true attention output of the prefix rows before Wo."""
        mean = v[:, self.num_prefix :].mean(1, keepdim=True).expand(-1, self.num_prefix, -1)
        features = torch.stack([v[:, : self.num_prefix], mean], dim=-1).double()
        self.gram += torch.einsum("btcp,btcq->tcpq", features, features)
        self.cross += torch.einsum("btcp,btc->tcp", features, target.double())

    def solve(self, strength: float = RIDGE) -> tuple[Tensor, Tensor]:
        """``a (P, C)``, ``b (P, C)`` in fp64."""
        scale = self.gram.diagonal(dim1=2, dim2=3).mean(2).clamp(min=1e-30)
        eye = torch.eye(2, dtype=self.gram.dtype, device=self.gram.device)
        regular = self.gram + (strength * scale)[..., None, None] * eye
        w = torch.linalg.solve(regular, self.cross.unsqueeze(-1)).squeeze(-1)
        return w[..., 0], w[..., 1]
