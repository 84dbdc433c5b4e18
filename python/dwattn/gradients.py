"""Gradients of the compiled operators.

For ``Y = aggregate(V; K, kappa, mu, beta)``, ``G = dL/dY`` and ``S[b,c] = sum_patches G``:

- ``dV_patches = aggregate(G; K flipped, mu)``: the mean term of the forward pass, ``mu * mean(V)``,
  hands ``mu * S / (H*W)`` to every patch, which is again a mean term;
- ``dV[t] = kappa[t] S`` for prefix tokens; ``dkappa[t] = sum_b V[t] S``;
  ``dmu = sum_b mean(V) S``; ``dbeta = sum_b S``;
- ``dK`` is the weight gradient of a depthwise convolution.

They are one operator, ``torch.ops.dwattn.dw_aggregate_backward``: on CUDA a kernel that reads G and V
once (``csrc/kernels/cuda/dw_backward.cu``), on the CPU the sum of the parts above. Gradients of
gradients are formed from the parts, which are differentiable.

``dw_attention`` and ``dw_layer`` keep their inputs and project V again, so that they cost no memory;
callers that train keep V (:mod:`dwattn.functional` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: dV, dkernel, dkappa, dmu and dbeta; all but dV in the accumulation dtype, and empty where not asked for.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Optional = tuple[Tensor | None, ...]


def register() -> None:
    """Register autograd of the operators, and the backward operator on the CPU.

    Raises:
        RuntimeError: an operator does not exist.
    """
    for name, backward, save in (
        ("dw_aggregate", _backward_aggregate, _save_aggregate),
        ("dw_attention", _backward_attention, _save_attention),
        ("dw_layer", _backward_layer, _save_layer),
    ):
        torch.library.register_autograd(f"dwattn::{name}", backward, setup_context=save)
    torch.library.impl("dwattn::dw_aggregate_backward", "cpu", _from_parts)


def aggregate_backward(
    grad: Tensor,
    v: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    sizes: tuple[int, int, int],
    *,
    values: bool,
) -> Results:
    """All gradients of the aggregation for ``grad = dL/dY (B, H*W, C)``.

    Args:
        v: ``(B, N, C)``; None leaves out the gradients of kernel, kappa and mu, which alone need it.
        sizes: height, width and number of prefix tokens.
        values: whether dV is wanted.
    """
    if torch.is_grad_enabled():  # create_graph=True
        return _from_parts(grad, v, kernel, kappa, mu, *sizes, values)
    results: Results = torch.ops.dwattn.dw_aggregate_backward.default(
        grad, v, kernel, kappa, mu, *sizes, values
    )
    return results


def _from_parts(
    grad: Tensor,
    v: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
    values: bool,
) -> Results:
    """The operator, from other operators; equations on top."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.sum(1, dtype=wide)  # S (B, C)
    dv = dkernel = dkappa = dmu = None
    if values:
        dv = _value_gradient(grad, kernel, kappa, mu, total, (height, width, num_prefix))
    if v is not None:
        prefix, patches = v[:, :num_prefix], v[:, num_prefix:]
        dkernel = _kernel_gradient(grad, patches, height, width).to(wide)
        if kappa is not None:
            dkappa = (prefix * total[:, None]).sum(0)
        if mu is not None:
            dmu = (patches.mean(1, dtype=wide) * total).sum(0)

    def present(t: Tensor | None) -> Tensor:
        return grad.new_empty(0, dtype=wide) if t is None else t

    return (
        grad.new_empty(0) if dv is None else dv,
        present(dkernel),
        present(dkappa),
        present(dmu),
        total.sum(0),
    )


def _value_gradient(
    grad: Tensor,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    total: Tensor,
    sizes: tuple[int, int, int],
) -> Tensor:
    """``dV (B, N, C)``."""
    height, width, num_prefix = sizes
    dv: Tensor = torch.ops.dwattn.dw_aggregate.default(
        grad, kernel.flip(1, 2), None, mu, None, height, width, 0
    )
    if num_prefix == 0:
        return dv
    shape = (grad.shape[0], num_prefix, grad.shape[2])
    rows = grad.new_zeros(shape) if kappa is None else kappa * total[:, None]
    return torch.cat([rows.to(grad.dtype), dv], 1)


def _kernel_gradient(grad: Tensor, patches: Tensor, height: int, width: int) -> Tensor:
    """``dK[c, r, s] = sum G[b, (i, j), c] V[b, (i+r-1, j+s-1), c]``: ``(C, 3, 3)``."""
    channels = grad.shape[2]
    if grad.dtype == torch.float16 and grad.device.type == "cpu":  # fp16 convolutions crawl there
        grad, patches = grad.float(), patches.float()

    def image(t: Tensor) -> Tensor:
        return t.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    like = grad.new_empty(channels, 1, 3, 3)
    no_bias, one, zero = None, [1, 1], [0, 0]
    gradients = torch.ops.aten.convolution_backward(
        image(grad), image(patches), like, no_bias, one, one, one, False, zero, channels,
        [False, True, False],
    )  # fmt: skip
    dkernel: Tensor = gradients[1].squeeze(1)
    return dkernel


# ---- Autograd of the three operators


def _save_aggregate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, kernel, kappa, mu, _beta, *sizes = inputs
    ctx.sizes = tuple(sizes)
    ctx.save_for_backward(v, kernel, kappa, mu)
    ctx.types = _types(inputs)


def _backward_aggregate(ctx: Any, grad: Tensor) -> Optional:
    v, kernel, kappa, mu = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    found = aggregate_backward(
        grad, v if any(needs[1:4]) else None, kernel, kappa, mu, ctx.sizes, values=needs[0]
    )
    return (*_wanted(found, needs, ctx.types), None, None, None)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, wv, bv, kernel, kappa, mu, _beta, *sizes = inputs
    ctx.sizes = tuple(sizes)
    ctx.save_for_backward(x, wv, bv, kernel, kappa, mu)
    ctx.types = _types(inputs)


def _backward_attention(ctx: Any, grad: Tensor) -> Optional:
    needs = ctx.needs_input_grad[:7]
    found = _attention_gradients(grad, ctx.saved_tensors, needs, ctx.sizes)
    return (*_wanted(found, needs, ctx.types), None, None, None)


def _attention_gradients(
    grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool], sizes: tuple[int, int, int]
) -> Optional:
    """Gradients of x, wv, bv, kernel, kappa, mu and beta."""
    x, wv, bv, kernel, kappa, mu = saved
    assert x is not None
    assert wv is not None
    assert kernel is not None
    needs_x, needs_wv, needs_bv, *coefficients = needs
    v = F.linear(x, wv, bv) if any(coefficients[:3]) else None
    dv, *found = aggregate_backward(
        grad, v, kernel, kappa, mu, sizes, values=needs_x or needs_wv or needs_bv
    )
    dx = dv @ wv if needs_x else None
    dwv = dv.flatten(0, 1).t() @ x.flatten(0, 1) if needs_wv else None
    dbv = dv.sum((0, 1)) if needs_bv else None
    return (dx, dwv, dbv, *found)


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, wv, bv, kernel, kappa, mu, beta, wo, bo, prefix_out, *sizes = inputs
    ctx.sizes = tuple(sizes)
    ctx.has_bias, ctx.has_prefix = bo is not None, prefix_out is not None
    ctx.save_for_backward(x, wv, bv, kernel, kappa, mu, beta, wo)
    ctx.types = _types(inputs)


def _backward_layer(ctx: Any, grad: Tensor) -> Optional:
    """Through the composite of ``dw_attention`` and the output projection, formed again."""
    *inputs, wo = ctx.saved_tensors
    prefix = ctx.sizes[2] if ctx.has_prefix else 0
    rows = grad[:, prefix:]
    needs = ctx.needs_input_grad
    dwo = dbo = None
    if needs[7]:
        y = torch.ops.dwattn.dw_attention.default(*inputs, *ctx.sizes)
        dwo = rows.flatten(0, 1).t() @ y.flatten(0, 1)
    if ctx.has_bias and needs[8]:
        dbo = rows.sum((0, 1))
    found = _attention_gradients(rows @ wo, inputs[:6], needs[:7], ctx.sizes)
    gradients = _wanted(found, needs[:7], ctx.types)
    return (*gradients, dwo, dbo, grad[:, :prefix] if prefix else None, None, None, None)


def _types(inputs: Sequence[Any]) -> list[torch.dtype | None]:
    return [t.dtype if isinstance(t, Tensor) else None for t in inputs]


def _wanted(
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
    types: Sequence[torch.dtype | None],
) -> Optional:
    """Those that are needed, in the dtype of their tensor."""
    return tuple(
        t.to(dtype) if t is not None and needed and dtype is not None else None
        for t, needed, dtype in zip(gradients, needs, types, strict=False)
    )
