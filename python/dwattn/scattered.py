"""Layers that keep softmax attention: the ``mhsa`` baseline and scattered ``dw``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn import functional
from dwattn.attention import add_context, copy_linear, gaussian_kernel_
from dwattn.errors import DwattnError
from dwattn.prefix import ExactPrefixRows
from dwattn.projections import AttentionWeights
from dwattn.reference import merge_heads, split_heads
from dwattn.rotary import Rotary, placed
from dwattn.token_grid import Grid, TokenGridModule, head_width


class SelfAttention(nn.Module):
    """``mhsa`` (Eq. 1-4) through ``scaled_dot_product_attention``: the baseline, ``(B, N, D) -> (B, N, D)``."""

    variant = "mhsa"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = head_width(dim, num_heads, head_dim)
        channels = num_heads * head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.query = nn.Linear(dim, channels, bias=qkv_bias, **factory)
        self.key = nn.Linear(dim, channels, bias=qkv_bias, **factory)
        self.value = nn.Linear(dim, channels, bias=qkv_bias, **factory)
        self.proj = nn.Linear(channels, dim, bias=proj_bias, **factory)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """``grid`` is accepted for symmetry with the replacements and ignored: attention needs none."""
        q, k, v = (split_heads(p(x), self.num_heads) for p in (self.query, self.key, self.value))
        rows = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out: Tensor = self.proj(merge_heads(rows))
        return out

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Copy the pretrained projections."""
        copy_linear(self.query, weights.wq, weights.bq)
        copy_linear(self.key, weights.wk, weights.bk)
        copy_linear(self.value, weights.wv, weights.bv)
        copy_linear(self.proj, weights.wo, weights.bo)


class ScatteredDWAttention(TokenGridModule):
    """Scattered ``dw`` (section 2.3): the heads in ``heads`` become ``dw``, the others keep softmax attention.

    Equivalent to :func:`dwattn.reference.scattered_attention`. Value rows and output columns are stored with
    the kept heads first and the replaced heads after them, each in head order, so that nothing is gathered at
    run time. Prefix rows keep exact attention in every head.

    Args:
        heads: indices of the replaced heads, at least one and not all of them.
        qkv_bias, proj_bias, context, q_norm, k_norm, rotary: as for :class:`dwattn.attention.ReplacementAttention`.

    Raises:
        DwattnError: ``heads`` empty, out of range, repeated, or all of them.
    """

    variant = "dw"
    kappa: nn.Parameter | None
    mu: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        heads: list[int],
        grid: Grid | None = None,
        num_prefix: int = 0,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        context: bool = True,
        scale: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rotary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, grid=grid, num_prefix=num_prefix, head_dim=head_dim, scale=scale
        )
        self.replaced = _check_heads(heads, num_heads)
        self.kept = [head for head in range(num_heads) if head not in self.replaced]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inner_dim = len(self.replaced) * self.head_dim
        self.kept_dim = len(self.kept) * self.head_dim
        channels = num_heads * self.head_dim
        self.query = nn.Linear(dim, self.kept_dim, bias=qkv_bias, **factory)
        self.key = nn.Linear(dim, self.kept_dim, bias=qkv_bias, **factory)
        self.value = nn.Linear(dim, channels, bias=qkv_bias, **factory)
        self.proj = nn.Linear(channels, dim, bias=proj_bias, **factory)
        self.q_norm, self.k_norm = q_norm, k_norm
        add_context(self, context, num_prefix, self.inner_dim, factory)
        self.kernel = nn.Parameter(torch.empty(self.inner_dim, 3, 3, **factory))
        gaussian_kernel_(self.kernel)
        self.prefix_rows: ExactPrefixRows | None = None
        if num_prefix:
            self.prefix_rows = ExactPrefixRows(
                dim, len(self.replaced), self.head_dim, num_prefix,
                scale=self.scale, qkv_bias=qkv_bias, q_norm=q_norm, k_norm=k_norm, rotary=rotary, **factory,
            )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments that rebuild a module with the same state-dict keys and shapes."""
        return {
            "heads": list(self.replaced),
            "grid": None if self.grid is None else list(self.grid),
            "context": self.beta is not None,
        }

    def forward(self, x: Tensor, grid: Grid | None = None, rotary: Rotary | None = None) -> Tensor:
        """``(B, N, D) -> (B, N, D)``; ``grid=(H, W)`` overrides the fixed grid for this call."""
        out: Tensor = self.proj(self.rows(x, grid, rotary))
        return out

    def rows(self, x: Tensor, grid: Grid | None = None, rotary: Rotary | None = None) -> Tensor:
        """Kept heads' channels, then replaced heads', of all tokens before Wo: ``(B, N, C)``."""
        geometry = self.geometry(x, grid)
        kept, replaced = self.value(x).split([self.kept_dim, self.inner_dim], dim=-1)
        y = functional.dw_aggregate(replaced, self.kernel, geometry, self.kappa, self.mu, self.beta)
        if self.prefix_rows is not None:
            prefix = self.prefix_rows.of_values(x, replaced, rotary).to(y.dtype)
            y = torch.cat([prefix, y], dim=1)
        return torch.cat([self._attend(x, kept, rotary), y], dim=-1)

    def _attend(self, x: Tensor, value: Tensor, rotary: Rotary | None) -> Tensor:
        heads = len(self.kept)
        q, k, v = (split_heads(t, heads) for t in (self.query(x), self.key(x), value))
        q, k = placed(q, k, self, rotary)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Copy the pretrained projections into the kept-first order."""
        kept, replaced = weights.head_rows(self.kept), weights.head_rows(self.replaced)
        order = torch.cat([kept, replaced])

        def rows(bias: Tensor | None, index: Tensor) -> Tensor | None:
            return None if bias is None else bias[index]

        copy_linear(self.query, weights.wq[kept], rows(weights.bq, kept))
        copy_linear(self.key, weights.wk[kept], rows(weights.bk, kept))
        copy_linear(self.value, weights.wv[order], rows(weights.bv, order))
        copy_linear(self.proj, weights.wo[:, order], weights.bo)
        if self.prefix_rows is not None:
            copy_linear(self.prefix_rows.query, weights.wq[replaced], rows(weights.bq, replaced))
            copy_linear(self.prefix_rows.key, weights.wk[replaced], rows(weights.bk, replaced))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, replaced={self.replaced}, grid={self.grid}, "
            f"num_prefix={self.num_prefix}"
        )


def _check_heads(heads: list[int], num_heads: int) -> list[int]:
    replaced = sorted(set(heads))
    if not replaced or len(replaced) != len(heads) or replaced[0] < 0 or replaced[-1] >= num_heads:
        raise DwattnError(f"heads={heads} must be distinct indices between 0 and {num_heads - 1}.")
    if len(replaced) == num_heads:
        raise DwattnError(
            f"All {num_heads} heads are listed; use FusedDWAttention, which never forms attention at all."
        )
    return replaced
