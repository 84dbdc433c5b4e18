"""The rows of the prefix tokens (CLS, registers) in a replaced layer, in three modes.

``exact``: prefix queries keep true softmax attention, without keys or values of all tokens being formed.
``static``: ``Y_t = a V_t + b mean_patches(V)``.
``drop``: the model has no prefix tokens (``P = 0``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn import backends, library
from dwattn.projections import is_plain_linear
from dwattn.reference import merge_heads, split_heads
from dwattn.rotary import Rotary

PREFIX_MODES = ("exact", "static", "drop")

#: Most prefix queries times heads of bf16 rows that the compiled operator takes: at D=1024 on a CPU with AMX it was faster
#: up to 64 at batch 1 and 8, and from 80 on slower at batch 8. fp32, fp16 and fp64 were faster wherever they were measured.
_BF16_LANES = 64


class ExactPrefixRows(nn.Module):
    """Softmax attention of ``P`` prefix queries over all tokens: ``(B, N, D) -> (B, P, C)``, before Wo.

    ``q_t Wk`` is absorbed into one D-vector a head (``O(n_h N D)``, no K, no V of all tokens; a key bias cancels in the
    softmax). A key norm is not linear and a rotation differs from token to token, so with ``k_norm`` or ``rotary`` the
    keys of all tokens are formed: one more ``(N, D) x (D, C)`` product.

    Args:
        dim: ``D``; num_heads: ``n_h``; head_dim: ``d_h``; num_prefix: ``P``.
        scale: logit factor, default ``1 / sqrt(d_h)``.
        q_norm, k_norm: modules on ``(B, n_h, N, d_h)``, or None.
        rotary: whether calls come with a rotation of the keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        num_prefix: int,
        *,
        scale: float | None = None,
        qkv_bias: bool = True,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rotary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_prefix = num_heads, head_dim, num_prefix
        self.scale = head_dim**-0.5 if scale is None else scale
        channels = num_heads * head_dim
        self.query = nn.Linear(dim, channels, bias=qkv_bias, device=device, dtype=dtype)
        formed = k_norm is not None or rotary
        self.key = nn.Linear(dim, channels, bias=formed and qkv_bias, device=device, dtype=dtype)
        self.q_norm, self.k_norm, self.rotary = q_norm, k_norm, rotary

    def forward(
        self,
        x: Tensor,
        value_weight: Tensor,
        value_bias: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """``x (B, N, D)``, ``value_weight (C, D)``, ``value_bias (C,)`` -> rows ``(B, P, C)`` before Wo."""
        pooled = self.attention(x, rotary).flatten(1, 2) @ x
        pooled = pooled.unflatten(1, (self.num_heads, self.num_prefix))
        value = value_weight.unflatten(0, (self.num_heads, self.head_dim))
        rows = merge_heads(pooled @ value.transpose(1, 2))
        return rows if value_bias is None else rows + value_bias

    def projected(self, x: Tensor, value: nn.Module, proj: nn.Module) -> Tensor | None:
        """The rows after ``proj``, ``(B, P, D_out)``, by one compiled operator; None where it cannot run.

        It runs where the compiled kernels run ``dw_layer`` on the CPU, without gradients and autocast, on
        projections that are weights only.
        """
        if not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        if self.q_norm is not None or self.k_norm is not None or self.rotary:
            return None
        if x.dtype == torch.bfloat16 and self.num_heads * self.num_prefix > _BF16_LANES:
            return None
        query, key = self.query, self.key
        if not (is_plain_linear(query) and is_plain_linear(key)):
            return None
        if not (is_plain_linear(value) and is_plain_linear(proj)):
            return None
        wq, wk, wv, wo = query.weight, key.weight, value.weight, proj.weight
        bq, bv, bo = query.bias, value.bias, proj.bias
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, wq, wk, wv, wo, bq, bv, bo)
        ):
            return None
        if backends.choose("dw_layer", device="cpu", dtype=x.dtype) != "cpp":
            return None
        return library.prefix_rows(
            x, wq, bq, wk, wv, bv, wo, bo, self.num_heads, self.num_prefix, self.scale
        )

    def of_values(self, x: Tensor, v: Tensor, rotary: Rotary | None = None) -> Tensor:
        """The same rows from the values ``v (B, N, C)`` of all tokens, where these exist anyway."""
        return merge_heads(self.attention(x, rotary) @ split_heads(v, self.num_heads))

    def attention(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Softmax weights of the prefix queries on all tokens: ``(B, n_h, P, N)``."""
        q = split_heads(self.query(x[:, : self.num_prefix]), self.num_heads)
        q = (q if self.q_norm is None else self.q_norm(q)) * self.scale
        return torch.softmax(self._logits(q, x, rotary), dim=-1).to(x.dtype)

    def _logits(self, q: Tensor, x: Tensor, rotary: Rotary | None) -> Tensor:
        """``(B, n_h, P, N)`` logits of the scaled prefix queries."""
        formed = self.k_norm is not None or rotary is not None
        if formed or not is_plain_linear(self.key):
            keys = split_heads(self.key(x), self.num_heads)
            keys = keys if self.k_norm is None else self.k_norm(keys)
            keys = keys if rotary is None else rotary.rotate(keys)
            return q @ keys.transpose(-2, -1)
        absorbed = q @ self.key.weight.unflatten(0, (self.num_heads, self.head_dim))
        logits = absorbed.flatten(1, 2) @ x.transpose(1, 2)
        return logits.unflatten(1, (self.num_heads, self.num_prefix))

    def extra_repr(self) -> str:
        return f"num_prefix={self.num_prefix}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class StaticPrefixRows(nn.Module):
    """``Y_t = a V_t + b mean_patches(V)`` for the prefix tokens: ``(B, N, D) -> (B, P, C)``, before Wo.

    Parameters ``a`` and ``b`` are ``(P, C)``. The default ``a = 0, b = 1`` attends evenly to the patches. There are no
    queries and keys that a ``rotary`` embedding could turn.
    """

    def __init__(
        self,
        num_prefix: int,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.a = nn.Parameter(torch.zeros(num_prefix, channels, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.ones(num_prefix, channels, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        value_weight: Tensor,
        value_bias: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """``mean(V) = mean(x) Wv^T + bv``, so only ``P + 1`` rows are projected."""
        prefix = x[:, : self.num_prefix]
        mean = x[:, self.num_prefix :].mean(1, keepdim=True)
        values = F.linear(torch.cat([prefix, mean], 1), value_weight, value_bias)
        return self.a * values[:, : self.num_prefix] + self.b * values[:, self.num_prefix :]

    def of_values(self, x: Tensor, v: Tensor, rotary: Rotary | None = None) -> Tensor:
        """The same rows from the values ``v (B, N, C)`` of all tokens, where these exist anyway."""
        prefix, patches = v[:, : self.num_prefix], v[:, self.num_prefix :]
        return self.a * prefix + self.b * patches.mean(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"num_prefix={self.num_prefix}, channels={self.a.shape[1]}"
