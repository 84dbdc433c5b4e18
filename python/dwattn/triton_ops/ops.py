"""The Triton operators as PyTorch operators: gradients, and ``torch.compile`` without graph breaks.

The compiler sees ``torch.ops.dwattn_triton.*`` as opaque. Gradients of gradients are not defined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dwattn.geometry import Geometry
from dwattn.triton_ops import aggregate, lowrank

_GEOMETRY = "SymInt height, SymInt width, SymInt num_prefix"
_COEFFICIENTS = "Tensor kernel, Tensor? kappa, Tensor? mu, Tensor? beta"


def _aggregate(
    v: Tensor, kernel: Tensor, kappa: Tensor | None, mu: Tensor | None, beta: Tensor | None,
    height: int, width: int, num_prefix: int,
) -> Tensor:  # fmt: skip
    return aggregate.forward(v, kernel, Geometry(height, width, num_prefix), kappa, mu, beta)


def _aggregate_backward(
    grad: Tensor, v: Tensor, kernel: Tensor, kappa: Tensor | None, mu: Tensor | None,
    beta: Tensor | None, height: int, width: int, num_prefix: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    geometry = Geometry(height, width, num_prefix)
    found = aggregate.backward(grad, v, kernel, geometry, kappa, mu, beta, tuple(needs))
    # An operator cannot return None: empty tensors stand for it.
    return [v.new_empty(0) if gradient is None else gradient for gradient in found]


def _lowrank(
    x: Tensor, wv: Tensor, bv: Tensor | None, kernel: Tensor, kappa: Tensor | None,
    mu: Tensor | None, beta: Tensor | None, wo: Tensor, bo: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, height: int, width: int, num_prefix: int,
) -> Tensor:  # fmt: skip
    geometry = Geometry(height, width, num_prefix)
    return lowrank.forward(
        x, wv, bv, kernel, geometry, wo, bo, kappa, mu, beta, residual, scale, None
    )


dw_aggregate = torch.library.custom_op(
    "dwattn_triton::dw_aggregate",
    _aggregate,
    mutates_args=(),
    schema=f"(Tensor v, {_COEFFICIENTS}, {_GEOMETRY}) -> Tensor",
)
dw_aggregate_backward = torch.library.custom_op(
    "dwattn_triton::dw_aggregate_backward",
    _aggregate_backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor v, {_COEFFICIENTS}, {_GEOMETRY}, bool[] needs) -> Tensor[]",
)
lowrank_dw_attention = torch.library.custom_op(
    "dwattn_triton::lowrank_dw_attention",
    _lowrank,
    mutates_args=(),
    schema=(
        f"(Tensor x, Tensor wv, Tensor? bv, {_COEFFICIENTS}, Tensor wo, Tensor? bo, "
        f"Tensor? residual, Tensor? scale, {_GEOMETRY}) -> Tensor"
    ),
)


@dw_aggregate.register_fake
def _fake_aggregate(
    v: Tensor, kernel: Tensor, kappa: Tensor | None, mu: Tensor | None, beta: Tensor | None,
    height: int, width: int, num_prefix: int,
) -> Tensor:  # fmt: skip
    return v.new_empty(v.shape[0], v.shape[1] - num_prefix, v.shape[2])


@dw_aggregate_backward.register_fake
def _fake_backward(
    grad: Tensor, v: Tensor, kernel: Tensor, kappa: Tensor | None, mu: Tensor | None,
    beta: Tensor | None, height: int, width: int, num_prefix: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (v, kernel, kappa, mu, beta)
    return [
        v.new_empty(0) if t is None or not needed else t.new_empty(t.shape)
        for t, needed in zip(inputs, needs, strict=True)
    ]


@lowrank_dw_attention.register_fake
def _fake_lowrank(
    x: Tensor, wv: Tensor, bv: Tensor | None, kernel: Tensor, kappa: Tensor | None,
    mu: Tensor | None, beta: Tensor | None, wo: Tensor, bo: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, height: int, width: int, num_prefix: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], x.shape[1] - num_prefix, wo.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, height, width, num_prefix = inputs
    ctx.sizes = height, width, num_prefix
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = [
        bool(needed) and t is not None
        for t, needed in zip(tensors, ctx.needs_input_grad, strict=False)
    ]
    found = dw_aggregate_backward(grad, *tensors, *ctx.sizes, needs)
    gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
    return (*gradients, None, None, None)


dw_aggregate.register_autograd(_backward, setup_context=_save)
