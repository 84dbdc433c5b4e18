"""The narrow layer in Triton against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import functional
from dwattn.geometry import Geometry
from support.operators import error
from support.triton_cases import (
    DEVICE,
    DTYPES,
    SIZES,
    agree,
    lowrank,
    lowrank_arguments,
    runs_kernels,
    share,
    strided_views,
    written_into,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_lowrank(layer: dict[str, Tensor | Geometry], backend: str) -> Tensor:
    names = ("x", "wv", "bv", "kernel", "geometry", "kappa", "mu", "beta")
    inner = functional.dw_attention(*(layer[name] for name in names), backend=backend)
    y = F.linear(inner, layer["wo"], layer["bo"])
    y = y if layer["scale"] is None else y * layer["scale"]
    return y if layer["residual"] is None else layer["residual"] + y


def in_fp64(layer: dict[str, Tensor | Geometry]) -> dict[str, Tensor | Geometry]:
    return {k: t.double() if isinstance(t, Tensor) else t for k, t in layer.items()}


#: rank 129 and more: two chunks of inner channels and more; 300: two projections of x
RANKS = (1, 8, 129, 72, 33, 300)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_is_as_exact_as_pytorch(dtype: torch.dtype, rank: int) -> None:
    cases = list(zip(SIZES, (5, 16, 70, 20, 130, 33), strict=True))
    part = RANKS.index(rank) + (dtype == torch.float16)
    for (height, width, _, num_prefix, batch), dim in share(cases, part, 3):
        layer = lowrank_arguments(dtype, height, width, rank, num_prefix, batch, dim)
        exact = plain_lowrank(in_fp64(layer), "reference")
        result, plain = lowrank(layer), plain_lowrank(layer, "torch")
        assert result.dtype == dtype
        # Outputs share the errors of a few inner channels: PyTorch's own may be small by luck.
        floor = torch.finfo(dtype).eps
        assert error(result, exact) <= 2 * max(error(plain, exact), floor)


@runs_kernels
@pytest.mark.parametrize("absent", ["bv", "bo", "residual", "scale", "mu", "context"])
def test_lowrank_without_a_term(absent: str) -> None:
    layer = lowrank_arguments(torch.float32, 5, 7, 24, 2, 2)
    gone = ("kappa", "mu", "beta") if absent == "context" else (absent,)
    layer.update(dict.fromkeys(gone))
    assert error(lowrank(layer), plain_lowrank(in_fp64(layer), "reference")) < 1e-6


@runs_kernels
def test_lowrank_in_place_and_with_strides() -> None:
    layer = lowrank_arguments(torch.float32, 5, 7, 24, 2, 2)
    expected = lowrank(layer)
    stream = torch.full((2, 40, 23), 7.0, device=DEVICE)
    rows = stream[:, 3:-2, 1:-2]
    rows.copy_(layer["residual"])
    lowrank(layer, residual=rows, out=rows)
    written_into(stream, rows, expected)
    for name, x in strided_views(layer["x"]).items():
        strided = lowrank(layer, x=x, wo=layer["wo"].t().contiguous().t())
        assert agree(strided, expected), name


@runs_kernels
def test_lowrank_with_gradients() -> None:
    layer = lowrank_arguments(torch.float32, 3, 4, 8, 1, 2)
    exact = in_fp64(layer)
    for one in (layer, exact):
        for name in ("x", "wo", "scale", "mu"):
            one[name].requires_grad_()
    lowrank(layer).square().sum().backward()
    plain_lowrank(exact, "reference").square().sum().backward()
    for name in ("x", "wo", "scale", "mu"):
        assert error(layer[name].grad, exact[name].grad) < 1e-6
