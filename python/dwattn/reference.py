"""The specification: every layer of dwattn in plain PyTorch, on any device, in any floating dtype.

Each backend is tested against these functions evaluated in fp64. They are written to be read next to the
equations, not to be fast. Equation numbers are those of the depthwise-convolution paper (see README).

Shapes used throughout: ``x (B, N, D)`` with ``N = P + H*W`` tokens, prefix first; ``C`` inner channels
(``n_h * d_h`` for whole heads); weights in PyTorch's ``(out, in)`` layout; biases may be ``None``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.geometry import Geometry


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """``(B, N, n_h*d_h) -> (B, n_h, N, d_h)``."""
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(t: Tensor) -> Tensor:
    """``(B, n_h, N, d_h) -> (B, N, n_h*d_h)``."""
    return t.transpose(1, 2).flatten(2)


def attention_map(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """``E = softmax(q k^T * scale)`` (Eq. 3); ``q (..., N, d_h)``, ``k (..., M, d_h)`` -> ``(..., N, M)``.

    ``scale`` defaults to ``1 / sqrt(d_h)``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)


def mhsa(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    num_heads: int,
    *,
    bq: Tensor | None = None,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
    bo: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention (Eq. 1-4): ``(B, N, D) -> (B, N, D)``."""
    q, k, v = (split_heads(F.linear(x, w, b), num_heads) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    return F.linear(merge_heads(attention_map(q, k, scale) @ v), wo, bo)


def shift(patches: Tensor, geometry: Geometry, dr: int, dc: int) -> Tensor:
    """``out[b, (i, j), c] = patches[b, (i+dr, j+dc), c]``, zero outside the grid; ``(B, H*W, C)``."""
    height, width = geometry.grid
    rows, cols = abs(dr), abs(dc)
    grid = F.pad(patches.unflatten(1, (height, width)), (0, 0, cols, cols, rows, rows))
    return grid[:, rows + dr : rows + dr + height, cols + dc : cols + dc + width].flatten(1, 2)


def context(
    v: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor | None:
    """``ctx = sum_t kappa[t] V[t] + mu * mean_patches(V) + beta``: ``(B, 1, C)``, or None without terms.

    Args:
        v: ``(B, N, C)`` values of all tokens.
        kappa: ``(P, C)``; mu: ``(C,)``; beta: ``(C,)``.
    """
    prefix, patches = v[:, : geometry.num_prefix], v[:, geometry.num_prefix :]
    terms = []
    if kappa is not None:
        terms.append((kappa * prefix).sum(1, keepdim=True))
    if mu is not None:
        terms.append(mu * patches.mean(1, keepdim=True))
    if beta is not None:
        terms.append(beta.expand(v.shape[0], 1, -1))
    return sum(terms[1:], terms[0]) if terms else None


def dw_aggregate(
    v: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """3x3 depthwise aggregation of the patch values plus ``ctx`` (the Y of Eq. 11): ``(B, H*W, C)``.

    ``Y[b, (i,j), c] = sum_{r,s in -1..1} kernel[c, r+1, s+1] V[b, (i+r, j+s), c] + ctx[b, c]``.

    Args:
        v: ``(B, N, C)``, prefix rows included.
        kernel: ``(C, 3, 3)``.
    """
    geometry.check(v.shape[1])
    patches = v[:, geometry.num_prefix :]
    y = sum(
        kernel[:, r + 1, s + 1] * shift(patches, geometry, r, s)
        for r in (-1, 0, 1)
        for s in (-1, 0, 1)
    )
    assert isinstance(y, Tensor)
    ctx = context(v, geometry, kappa, mu, beta)
    return y if ctx is None else y + ctx


def dw_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Value projection followed by :func:`dw_aggregate` (Eq. 11): ``(B, N, D) -> (B, H*W, C)``, before Wo."""
    return dw_aggregate(F.linear(x, wv, bv), kernel, geometry, kappa, mu, beta)


def exact_prefix_rows(
    x: Tensor,
    num_prefix: int,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    num_heads: int,
    *,
    bq: Tensor | None = None,
    bv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """True softmax attention of the prefix queries over all tokens: ``(B, P, C)``, before Wo.

    No key or value of all tokens is formed: ``q_t Wk`` (one D-vector a head) is dotted with ``x``, and
    ``softmax @ x`` is projected by ``Wv``. A key bias shifts all logits of a query alike and cancels.
    """
    scale = (wq.shape[0] // num_heads) ** -0.5 if scale is None else scale
    q = split_heads(F.linear(x[:, :num_prefix], wq, bq), num_heads)
    keys = torch.einsum("bhpc,hcd->bhpd", q * scale, wk.unflatten(0, (num_heads, -1)))
    weights = torch.softmax(torch.einsum("bhpd,bnd->bhpn", keys, x), dim=-1)
    pooled = torch.einsum("bhpn,bnd->bhpd", weights, x)
    rows = merge_heads(torch.einsum("bhpd,hcd->bhpc", pooled, wv.unflatten(0, (num_heads, -1))))
    return rows if bv is None else rows + bv


def static_prefix_rows(v: Tensor, geometry: Geometry, a: Tensor, b: Tensor) -> Tensor:
    """``Y_t = a V_t + b mean_patches(V)`` for ``t < P``: ``(B, P, C)``; ``a``, ``b`` are ``(C,)`` or ``(P, C)``."""
    prefix, patches = v[:, : geometry.num_prefix], v[:, geometry.num_prefix :]
    return a * prefix + b * patches.mean(1, keepdim=True)


def dw_layer(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    geometry: Geometry,
    *,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    prefix_rows: Tensor | None = None,
) -> Tensor:
    """The whole ``dw`` layer, ``out = concat(prefix rows, Y) Wo^T + bo``: ``(B, N, D) -> (B, N, D)``.

    ``lowrank_dw`` is this function with ``wv = A (r, D)`` and ``wo = B (D, r)``. ``prefix_rows (B, P, C)``
    come from :func:`exact_prefix_rows` or :func:`static_prefix_rows`; they may be None only when ``P = 0``.
    """
    y = dw_attention(x, wv, bv, kernel, geometry, kappa, mu, beta)
    if prefix_rows is not None:
        y = torch.cat([prefix_rows, y], dim=1)
    return F.linear(y, wo, bo)


def fold_conv(wv: Tensor, kernel: Tensor) -> Tensor:
    """Eq. 10: per-head ``kernel (n_h, 3, 3)`` times ``wv (n_h*d_h, D)`` -> dense ``(n_h*d_h, D, 3, 3)``."""
    per_channel = kernel.repeat_interleave(wv.shape[0] // kernel.shape[0], dim=0)
    return wv[:, :, None, None] * per_channel[:, None]


def dense_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Eq. 5 over the patch tokens, zero padding: ``x (B, N, D)``, ``weight (C, D, 3, 3)`` -> ``(B, H*W, C)``."""
    geometry.check(x.shape[1])
    patches = x[:, geometry.num_prefix :].unflatten(1, geometry.grid).permute(0, 3, 1, 2)
    return F.conv2d(patches, weight, padding=1).flatten(2).transpose(1, 2)


def conv_attention(
    x: Tensor, wv: Tensor, bv: Tensor | None, kernel: Tensor, geometry: Geometry
) -> Tensor:
    """``conv`` (Eq. 9-10): one dense convolution ``D -> C``, before Wo: ``(B, H*W, C)``.

    ``kernel`` is ``(n_h, 3, 3)``. The value bias goes through the same zero-padded kernel, as it does in
    :func:`dw_attention`, so that ``conv`` equals ``dw`` with the head's kernel on each of its channels.
    """
    y = dense_conv(x, fold_conv(wv, kernel), geometry)
    if bv is None:
        return y
    per_channel = kernel.repeat_interleave(wv.shape[0] // kernel.shape[0], dim=0)
    ones = bv.expand(1, geometry.num_patches, -1)
    return y + dw_aggregate(ones, per_channel, Geometry(geometry.height, geometry.width))


def ensemble_weights(
    wv: Tensor, bv: Tensor | None, wo: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Eq. 12: ``Wve (d_h, D)``, ``bve (d_h)`` and ``Woe (D, d_h)``, heads averaged by ``softmax(gamma)``."""
    share = torch.softmax(gamma, dim=0)
    num_heads = gamma.shape[0]
    wve = torch.einsum("h,hcd->cd", share, wv.unflatten(0, (num_heads, -1)))
    bve = None if bv is None else torch.einsum("h,hc->c", share, bv.unflatten(0, (num_heads, -1)))
    woe = torch.einsum("h,dhc->dc", share, wo.unflatten(1, (num_heads, -1)))
    return wve, bve, woe


def ens_dw_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    gamma: Tensor,
    geometry: Geometry,
    *,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """``ens_dw`` (Eq. 12-13), patch rows after Woe: ``(B, H*W, D)``; ``kernel (d_h, 3, 3)``, ``gamma (n_h)``."""
    wve, bve, woe = ensemble_weights(wv, bv, wo, gamma)
    return F.linear(dw_attention(x, wve, bve, kernel, geometry, kappa, mu, beta), woe, bo)


def spvit_weights(wv: Tensor, wo: Tensor, head_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. A.4: dense ``(d_h, D, 3, 3)`` and ``Woe (D, d_h)`` from ``head_weights (n_h, 3, 3)``.

    ``head_weights`` are the ``K`` of Eq. A.4 after the softmax over heads.
    """
    num_heads = head_weights.shape[0]
    dense = torch.einsum("hrs,hcd->cdrs", head_weights, wv.unflatten(0, (num_heads, -1)))
    woe = torch.einsum("hrs,dhc->dc", head_weights, wo.unflatten(1, (num_heads, -1)))
    return dense, woe


def spvit_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    logits: Tensor,
    geometry: Geometry,
) -> Tensor:
    """``spvit`` (Eq. A.4), patch rows after Woe: ``(B, H*W, D)``; ``logits (n_h, 3, 3)``, softmax over heads.

    The value bias enters with the weight it has in the interior of the grid, ``sum_{r,s} K[h,r,s] bv[h]``.
    """
    head_weights = torch.softmax(logits, dim=0)
    dense, woe = spvit_weights(wv, wo, head_weights)
    y = dense_conv(x, dense, geometry)
    if bv is not None:
        y = y + torch.einsum("hrs,hc->c", head_weights, bv.unflatten(0, (logits.shape[0], -1)))
    return F.linear(y, woe, bo)


def scattered_attention(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    num_heads: int,
    heads: tuple[int, ...],
    kernel: Tensor,
    geometry: Geometry,
    *,
    bq: Tensor | None = None,
    bk: Tensor | None = None,
    bv: Tensor | None = None,
    bo: Tensor | None = None,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scattered ``dw`` (section 2.3): ``heads`` are replaced, the others and all prefix rows keep attention.

    ``kernel``, ``kappa``, ``mu``, ``beta`` cover the ``len(heads) * d_h`` replaced channels, in the order
    of ``heads``. Outputs meet in head order before Wo: ``(B, N, D) -> (B, N, D)``.
    """
    geometry.check(x.shape[1])
    q, k, v = (split_heads(F.linear(x, w, b), num_heads) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    rows = attention_map(q, k, scale) @ v
    index = list(heads)
    replaced = dw_aggregate(merge_heads(v[:, index]), kernel, geometry, kappa, mu, beta)
    rows = rows.clone()
    rows[:, index, geometry.num_prefix :] = split_heads(replaced, len(index))
    return F.linear(merge_heads(rows), wo, bo)
