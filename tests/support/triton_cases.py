"""Where the Triton kernels can run, and the cases they run on."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from dwattn import triton_ops
from dwattn.geometry import Geometry
from support.operators import OperatorCase, make_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
BROKEN_INTERPRETER = (
    INSTALLED
    and importlib.metadata.version("triton").startswith("3.6.")
    and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
)

runs_kernels = pytest.mark.skipif(
    not INSTALLED or not (INTERPRETED or ON_GPU),
    reason="Triton is not installed."
    if not INSTALLED
    else "No GPU: run by test_under_the_interpreter in a process with TRITON_INTERPRET=1.",
)
bf16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not ON_GPU, reason="Triton's interpreter is silently wrong for bf16 (tl.dot)."
    ),
)
DTYPES = (torch.float32, torch.float16, bf16)
#: height, width, channels, prefix tokens, batch
SIZES = (
    (1, 1, 1, 0, 1),
    (1, 7, 3, 1, 2),
    (5, 1, 8, 2, 1),
    (2, 2, 80, 0, 2),
    (3, 5, 129, 5, 1),
    (11, 9, 16, 1, 1),
)

Entry = TypeVar("Entry")


def share(entries: Sequence[Entry], part: int, parts: int) -> Sequence[Entry]:
    """All of ``entries`` on a GPU. The interpreter is slow: each of ``parts`` tests takes every ``parts``-th."""
    return entries if ON_GPU else entries[part % parts :: parts]


def on_device(case: OperatorCase) -> OperatorCase:
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in vars(case).items()
    }
    return OperatorCase(**moved)


def aggregate(case: OperatorCase, **options: Tensor) -> Tensor:
    return triton_ops.dw_aggregate(
        case.v, case.kernel, case.geometry, *case.coefficients, **options
    )


def attention(case: OperatorCase, **options: Tensor) -> Tensor:
    return triton_ops.dw_attention(
        case.x, case.wv, case.bv, case.kernel, case.geometry, *case.coefficients, **options
    )


def cases(dtype: torch.dtype, part: int = 0, **options: bool) -> Iterator[OperatorCase]:
    """Every size on a GPU, every second one under the interpreter; ``part`` says which."""
    for height, width, channels, num_prefix, batch in share(SIZES, part, 2):
        case = make_case(
            height, width, channels, num_prefix=num_prefix, batch=batch, dtype=dtype, **options
        )
        yield on_device(case)


def written_into(out: Tensor, rows: Tensor, result: Tensor) -> None:
    """``rows`` is the view of ``out`` that was to be written; all else must still be 7."""
    assert torch.equal(rows, result)
    rows.fill_(7)
    assert (out == 7).all()


def agree(found: Tensor, expected: Tensor) -> bool:
    """The same values behind other strides: equal to the bit under the interpreter. For a GPU other strides are another
    kernel, whose sums may be in another order.
    """
    if not ON_GPU:
        return torch.equal(found, expected)
    bound = 1e-5 if found.dtype == torch.float32 else 4e-3
    return torch.allclose(found.float(), expected.float(), rtol=bound, atol=bound)


def strided_views(t: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides, with NaN in every gap."""
    batch, rows, channels = t.shape

    def filled(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=t.dtype, device=t.device)

    views = {
        "inside": filled(batch + 2, rows + 5, channels + 7)[1:-1, 2:-3, 4:-3],
        "every second token": filled(batch, 2 * rows, channels)[:, ::2],
        "every third channel": filled(batch, rows, 3 * channels)[:, :, ::3],
        "channels first": filled(batch, channels, rows).transpose(1, 2),
        "tokens first": filled(rows, batch, channels).transpose(0, 1),
    }
    for view in views.values():
        view.copy_(t)
    return views


def lowrank(layer: dict[str, Tensor | Geometry], **options: Tensor) -> Tensor:
    return triton_ops.lowrank_dw_attention(**{**layer, **options})


def lowrank_arguments(
    dtype: torch.dtype, height: int, width: int, rank: int, num_prefix: int, batch: int,
    dim: int = 20,
) -> dict[str, Tensor | Geometry]:  # fmt: skip
    case = on_device(
        make_case(height, width, rank, num_prefix=num_prefix, batch=batch, dim=dim, dtype=dtype)
    )

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(DEVICE, dtype)

    return {
        "x": case.x, "wv": case.wv, "bv": case.bv, "kernel": case.kernel,
        "geometry": case.geometry, "wo": draw(dim, rank) / rank**0.5, "bo": draw(dim),
        "kappa": case.kappa, "mu": case.mu, "beta": case.beta,
        "residual": draw(batch, height * width, dim), "scale": draw(dim),
    }  # fmt: skip


def draw_heads(
    dtype: torch.dtype, batch: int, heads: int, tokens: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as attention layers have them: views of one product."""
    fused = torch.randn(batch, tokens, 3, heads, width).to(DEVICE, dtype)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    return q * 1.5, k, v
