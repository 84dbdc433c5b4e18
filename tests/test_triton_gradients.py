"""Gradients of the Triton kernels, and their operators under the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dwattn import functional, triton_ops
from support.operators import OperatorCase, error, make_case
from support.triton_cases import (
    DEVICE,
    DTYPES,
    agree,
    attention,
    cases,
    lowrank,
    lowrank_arguments,
    on_device,
    runs_kernels,
    strided_views,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(case: OperatorCase, backend: str, weight: Tensor) -> list[Tensor]:
    names = ("v", "kernel", "kappa", "mu", "beta")
    leaves = [getattr(case, name).detach().clone().requires_grad_() for name in names]
    v, *coefficients = leaves
    if backend == "triton":
        y = triton_ops.dw_aggregate(v, coefficients[0], case.geometry, *coefficients[1:])
    else:
        y = functional.dw_aggregate(
            v, coefficients[0], case.geometry, *coefficients[1:], backend=backend
        )
    (y * weight.to(y.dtype)).sum().backward()
    return [leaf.grad for leaf in leaves]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_agree_with_the_reference(dtype: torch.dtype) -> None:
    for case in cases(dtype, dtype == torch.float16):
        if case.geometry.num_prefix == 0:  # PyTorch cannot sum over no prefix tokens in fp16
            continue
        shape = (case.v.shape[0], case.geometry.num_patches, case.v.shape[2])
        weight = torch.randn(shape).to(DEVICE, dtype)
        exact = gradients(case.to(torch.float64), "reference", weight)
        ours, theirs = (gradients(case, backend, weight) for backend in ("triton", "torch"))
        for mine, plain, truth in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype
            floor = 4 * torch.finfo(dtype).eps
            assert error(mine, truth) <= 2 * max(error(plain, truth), floor)


@runs_kernels
def test_gradients_of_a_whole_attention() -> None:
    case = on_device(make_case(4, 6, 16, num_prefix=2))
    exact = case.to(torch.float64)
    for one in (case, exact):
        one.x.requires_grad_()
        one.wv.requires_grad_()
    attention(case).square().sum().backward()
    exact.attention("reference").square().sum().backward()
    assert error(case.x.grad, exact.x.grad) < 1e-6
    assert error(case.wv.grad, exact.wv.grad) < 1e-6


@runs_kernels
def test_gradients_of_many_strips_are_right_repeatable_and_of_any_strides() -> None:
    """12 strips for 8 groups of programs under the interpreter."""
    case = on_device(make_case(9, 10, 5, num_prefix=0, batch=3))
    grad = torch.randn(3, 90, 5).to(DEVICE)

    def run(grad: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return triton_ops.dw_aggregate_backward(
            grad, v, case.kernel, case.geometry, None, case.mu, case.beta
        )

    first = run(grad, case.v)
    assert first[2] is None
    exact = gradients(case.to(torch.float64), "reference", grad)
    for mine, truth in zip((first[0], first[1], *first[3:]), (*exact[:2], *exact[3:]), strict=True):
        assert error(mine, truth) < 1e-6
    again = run(grad, case.v)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    strided = run(strided_views(grad)["channels first"], case.v)
    assert all(agree(a, b) for a, b in zip(first, strided, strict=True) if a is not None)
    only = triton_ops.dw_aggregate_backward(
        grad, case.v, case.kernel, case.geometry, None, case.mu, case.beta,
        needs=(False, True, False, False, False),
    )  # fmt: skip
    assert [g is None for g in only] == [True, False, True, True, True]
    assert torch.equal(only[1], first[1])


@runs_kernels
def test_sums_of_gradients_stay_short() -> None:
    from dwattn.triton_ops.aggregate import gradient_groups

    assert gradient_groups(units=64 * 25, blocks=16, multiprocessors=132) == 33
    assert gradient_groups(units=64 * 256, blocks=16, multiprocessors=16) == 256
    assert gradient_groups(units=3, blocks=1, multiprocessors=132) == 3


@runs_kernels
def test_operators_under_the_compiler() -> None:
    case = make_case(batch=1)
    operator = torch.ops.dwattn_triton.dw_aggregate.default
    assert triton_ops.available()
    arguments = (case.v.requires_grad_(), case.kernel.requires_grad_(), *case.coefficients)
    moved = [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in arguments]
    torch.library.opcheck(operator, (*moved, *case.sizes))

    layer = lowrank_arguments(torch.float32, 3, 4, 8, 1, 1)
    names = ("x", "wv", "bv", "kernel", "kappa", "mu", "beta", "wo", "bo", "residual", "scale")
    torch.library.opcheck(
        torch.ops.dwattn_triton.lowrank_dw_attention.default,
        (*(layer[name] for name in names), 3, 4, 1),
    )

    def both(v: Tensor, kernel: Tensor) -> Tensor:
        return triton_ops.dw_aggregate(v, kernel, case.geometry).sum() + lowrank(layer).sum()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*moved[:2]), both(*moved[:2]))
