"""What a replacement layer must compute, straight from the reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import reference
from dwattn.geometry import Geometry


def expected_patches(m: Any, x: Tensor, geometry: Geometry) -> Tensor:
    """Patch rows after Wo, straight from the reference."""
    v, o = m.value, m.proj
    extra = {"kappa": m.kappa, "mu": m.mu, "beta": m.beta}
    if m.variant in ("dw", "lowrank_dw"):
        y = reference.dw_attention(x, v.weight, v.bias, m.kernel, geometry, **extra)
        return F.linear(y, o.weight, o.bias)
    if m.variant == "conv":
        y = reference.conv_attention(x, v.weight, v.bias, m.kernel, geometry)
        context = reference.context(F.linear(x, v.weight, v.bias), geometry, **extra)
        return F.linear(y if context is None else y + context, o.weight, o.bias)
    if m.variant == "ens_dw":
        return reference.ens_dw_attention(
            x, v.weight, v.bias, m.kernel, o.weight, o.bias, m.gamma, geometry, **extra
        )
    return reference.spvit_attention(x, v.weight, v.bias, o.weight, o.bias, m.logits, geometry)


def expected_prefix(m: Any, x: Tensor, geometry: Geometry) -> Tensor:
    """Prefix rows after Wo, straight from the reference."""
    value, proj = m.prefix_value or m.value, m.prefix_proj or m.proj
    if m.prefix == "static":
        v = F.linear(x, value.weight, value.bias)
        rows = reference.static_prefix_rows(v, geometry, m.prefix_rows.a, m.prefix_rows.b)
    else:
        q, k = m.prefix_rows.query, m.prefix_rows.key
        rows = reference.exact_prefix_rows(
            x,
            geometry.num_prefix,
            q.weight,
            k.weight,
            value.weight,
            m.num_heads,
            bq=q.bias,
            bv=value.bias,
            scale=m.scale,
        )
    return F.linear(rows, proj.weight, proj.bias)


def expected_output(m: Any, x: Tensor, geometry: Geometry) -> Tensor:
    """All rows after Wo."""
    patches = expected_patches(m, x, geometry)
    if not geometry.num_prefix:
        return patches
    return torch.cat([expected_prefix(m, x, geometry), patches], dim=1)
