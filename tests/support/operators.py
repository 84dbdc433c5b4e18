"""Random cases of the three operators, and the judge of every kernel: the reference in fp64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from dwattn import functional
from dwattn.geometry import Geometry


@dataclass(frozen=True)
class OperatorCase:
    """Arguments of ``dw_attention``; ``dw_aggregate`` takes ``v`` for ``x``, ``dw_layer`` also an :func:`output_of`."""

    geometry: Geometry
    x: Tensor
    wv: Tensor
    bv: Tensor | None
    v: Tensor
    kernel: Tensor
    kappa: Tensor | None
    mu: Tensor | None
    beta: Tensor | None

    @property
    def coefficients(self) -> tuple[Tensor | None, ...]:
        return self.kappa, self.mu, self.beta

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.geometry.height, self.geometry.width, self.geometry.num_prefix

    def attention(self, backend: str | None = None) -> Tensor:
        return functional.dw_attention(
            self.x,
            self.wv,
            self.bv,
            self.kernel,
            self.geometry,
            *self.coefficients,
            backend=backend,
        )

    def aggregate(self, backend: str | None = None) -> Tensor:
        return functional.dw_aggregate(
            self.v, self.kernel, self.geometry, *self.coefficients, backend=backend
        )

    def layer(self, output: dict[str, Tensor | None], backend: str | None = None) -> Tensor:
        return functional.dw_layer(
            self.x, self.wv, self.bv, self.kernel, output["wo"], output["bo"], self.geometry,
            *self.coefficients, prefix_out=output["prefix_out"], backend=backend,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> OperatorCase:
        """The same values, rounded where the dtype is narrower."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: t.to(dtype) for k, t in tensors.items() if isinstance(t, Tensor)}
        )


def make_case(
    height: int = 3,
    width: int = 5,
    channels: int = 8,
    *,
    num_prefix: int = 1,
    batch: int = 2,
    dim: int = 12,
    dtype: torch.dtype = torch.float32,
    context: bool = True,
    bias: bool = True,
    seed: int = 0,
) -> OperatorCase:
    """A random case; ``context=False`` leaves kappa, mu and beta away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    geometry = Geometry(height, width, num_prefix)
    return OperatorCase(
        geometry,
        draw(batch, geometry.num_tokens, dim),
        draw(channels, dim) / dim**0.5,
        draw(channels) if bias else None,
        draw(batch, geometry.num_tokens, channels),
        draw(channels, 3, 3),
        draw(num_prefix, channels) if context else None,
        draw(channels) if context else None,
        draw(channels) if context else None,
    )


def output_of(case: OperatorCase, width: int) -> dict[str, Tensor | None]:
    """An output projection and finished prefix rows that fit ``case``, in its dtype."""
    channels = case.wv.shape[0]
    generator = torch.Generator().manual_seed(channels + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.x.dtype)

    return {
        "wo": draw(width, channels) / channels**0.5,
        "bo": draw(width),
        "prefix_out": draw(case.x.shape[0], case.geometry.num_prefix, width),
    }


def to_numpy(t: Tensor) -> np.ndarray:
    """The numbers, of bfloat16 their bits as uint16, as the kernels over arrays take them."""
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def from_numpy(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`to_numpy`."""
    return torch.from_numpy(array).view(dtype)


def error(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact result."""
    scale = exact.square().mean().sqrt().clamp_min(1e-300)
    return ((result.double() - exact).square().mean().sqrt() / scale).item()


def assert_as_exact(result: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """A kernel may have twice the error that plain PyTorch has in the same dtype."""
    assert result.shape == exact.shape
    assert result.dtype == same_dtype.dtype
    epsilon = torch.finfo(result.dtype).eps
    # On a handful of numbers PyTorch's error can be nearly 0 by luck; in fp64 the judge rounds too.
    uncertain = exact.numel() < 100 or result.dtype == torch.float64
    floor = epsilon if uncertain else epsilon / 4
    assert error(result, exact) <= 2 * max(error(same_dtype, exact), floor)
    worst, plain_worst = ((t.double() - exact).abs().max() for t in (result, same_dtype))
    assert worst <= 2 * (plain_worst + epsilon * exact.abs().max())
