"""First values of a replacement's kernels, before any calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from dwattn.attention import (
    ConvAttention,
    EnsembleDWAttention,
    LowRankDWAttention,
    SPViTAttention,
)
from dwattn.plan import KernelInit
from dwattn.variants import Replacement

KERNEL_INITS = ("mean-attention", "gaussian")


@torch.no_grad()
def gaussian_init(layer: Replacement, seed: int) -> None:
    """The paper's initialisation, reproducible and without touching torch's global generator."""
    parameter = layer.logits if isinstance(layer, SPViTAttention) else layer.kernel
    generator = torch.Generator().manual_seed(seed % 2**63)
    draw = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.copy_(draw.normal_(std=0.02, generator=generator))


@torch.no_grad()
def mean_init(layer: Replacement, init: KernelInit) -> None:
    """Kernels, ``kappa`` and ``mu`` from the mean attention map of the replaced heads.

    A mean map is ``k`` at the 3x3 displacements, ``p_t`` on the prefix tokens and a uniform floor
    ``f`` elsewhere. The floor also lies under the 3x3 window, so with context terms the kernel is
    ``k - f`` and ``mu`` takes what is left of the row's mass of one: ``mu = 1 - sum(p) - sum(k -
    f)``, which is ``f H W`` on the grid that was scored and right on any other.

    Args:
        init: of the replaced heads, in ascending order.
    """
    kernel = torch.tensor(init.kernel, dtype=torch.float64)
    prefix = torch.tensor(init.prefix, dtype=torch.float64).reshape(len(init.kernel), -1)
    floor = torch.tensor(init.uniform, dtype=torch.float64)
    if isinstance(layer, SPViTAttention):
        layer.logits.copy_(kernel.clamp_min(1e-8).log())
        return
    if layer.beta is not None:
        # On a grid of one row or column, displacements across it have no weight and no floor under them.
        kernel = torch.where(kernel > 0, kernel - floor[:, None, None], 0.0)
    uniform = (1 - prefix.sum(1) - kernel.sum((1, 2))).clamp_min(0)
    if isinstance(layer, (LowRankDWAttention, EnsembleDWAttention)):
        # Their channels mix all heads.
        kernel, prefix, uniform = (t.mean(0, keepdim=True) for t in (kernel, prefix, uniform))
    per_head = layer.inner_dim // kernel.shape[0]
    layer.kernel.copy_(kernel if isinstance(layer, ConvAttention) else _spread(kernel, per_head))
    if layer.mu is not None:
        layer.mu.copy_(_spread(uniform, per_head))
    if layer.kappa is not None:
        layer.kappa.copy_(_spread(prefix, per_head).T)


def _spread(per_head: Tensor, channels: int) -> Tensor:
    """``(n, ...) -> (n * channels, ...)``."""
    return per_head.repeat_interleave(channels, dim=0)
