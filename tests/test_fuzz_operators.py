"""Every operator and backend on drawn shapes, dtypes, strides and options, judged by the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dwattn import functional, library, reference
from dwattn.errors import DwattnError
from dwattn.geometry import Geometry
from support.fuzzing import DTYPES, LAYOUTS, SEEDS, Draw, assert_within_rounding, fuzz

BACKENDS = ["torch", "reference", *(["cpp"] if library.AVAILABLE else [])]
ISAS = library.native.cpu_info()["usable_isas"] if library.native else []


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Call:
    """Arguments of ``dw_layer`` by name; the other operators take some of them."""

    tensors: dict[str, Tensor | None]
    geometry: Geometry

    def run(self, op: str, backend: str) -> Tensor:
        return getattr(functional, op)(**self._named(op), geometry=self.geometry, backend=backend)

    def exact(self, op: str, *, positive: bool = False) -> Tensor:
        """The reference in fp64, of the operands or of their absolute values."""
        wide = {k: None if t is None else t.double() for k, t in self._named(op).items()}
        if positive:
            wide = {k: None if t is None else t.abs() for k, t in wide.items()}
        prefix = wide.pop("prefix_out", None)
        out: Tensor = getattr(reference, op)(**wide, geometry=self.geometry)
        return out if prefix is None else torch.cat([prefix, out], dim=1)

    def _named(self, op: str) -> dict[str, Tensor | None]:
        own = {
            "dw_aggregate": ("v",),
            "dw_attention": ("x", "wv", "bv"),
            "dw_layer": ("x", "wv", "bv", "wo", "bo", "prefix_out"),
        }[op]
        return {name: self.tensors[name] for name in (*own, "kernel", "kappa", "mu", "beta")}

    @property
    def terms(self) -> int:
        x, wv = self.tensors["x"], self.tensors["wv"]
        assert x is not None
        assert wv is not None
        return x.shape[2] + wv.shape[0] + self.geometry.num_tokens + 9


@st.composite
def calls(draw: Any) -> Call:
    """Small sizes around the vector widths, every optional argument there or not."""
    dtype, generator = draw(DTYPES), draw(SEEDS)
    geometry = Geometry(
        draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 5, 0, 2]))
    )
    batch = draw(st.integers(0, 3))
    dim, channels, dim_out = (draw(st.integers(1, 70)) for _ in range(3))
    tokens, prefix = geometry.num_tokens, geometry.num_prefix
    make = Draw(generator, dtype)
    narrow = dtype in (torch.float16, torch.bfloat16)
    wide = draw(st.booleans()) and narrow  # fp32 coefficients beside 16-bit tokens
    coefficients = torch.float32 if wide else dtype

    def tensor(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return make(*shape, layout=draw(LAYOUTS), scale=scale, dtype=dtype)

    def maybe(*shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return tensor(*shape, dtype=dtype) if draw(st.booleans()) else None

    return Call(
        {
            "v": tensor(batch, tokens, channels),
            "x": tensor(batch, tokens, dim),
            "wv": tensor(channels, dim, scale=dim**-0.5),
            "bv": maybe(channels),
            "kernel": tensor(channels, 3, 3, dtype=coefficients),
            "wo": tensor(dim_out, channels, scale=channels**-0.5),
            "bo": maybe(dim_out),
            "kappa": maybe(prefix, channels, dtype=coefficients),
            "mu": maybe(channels, dtype=coefficients),
            "beta": maybe(channels, dtype=coefficients),
            "prefix_out": maybe(batch, prefix, dim_out),
        },
        geometry,
    )


OPERATORS = st.sampled_from(["dw_aggregate", "dw_attention", "dw_layer"])


@fuzz(
    250,
    call=calls(),
    op=OPERATORS,
    backend=st.sampled_from(BACKENDS),
    threads=st.sampled_from([1, 1, 2]),
)
def test_operators(call: Call, op: str, backend: str, threads: int) -> None:
    torch.set_num_threads(threads)
    result = call.run(op, backend)
    exact, magnitude = call.exact(op), call.exact(op, positive=True)
    assert result.dtype == call.tensors["x"].dtype  # type: ignore[union-attr]
    assert_within_rounding(result, exact, magnitude, call.terms)


@fuzz(80, call=calls(), op=OPERATORS, backend=st.sampled_from(BACKENDS), seed=SEEDS)
def test_gradients(call: Call, op: str, backend: str, seed: int) -> None:
    torch.set_num_threads(1)
    leaves = {
        name: None if t is None else t.double().detach().requires_grad_()
        for name, t in call.tensors.items()
    }
    wide = Call(leaves, call.geometry)
    used = [t for t in wide._named(op).values() if t is not None]
    exact = wide.exact(op)
    weight = Draw(seed, torch.float64)(*exact.shape)
    expected = torch.autograd.grad(exact, used, weight, allow_unused=True)
    found = torch.autograd.grad(wide.run(op, backend), used, weight, allow_unused=True)
    for tensor, one, other in zip(used, found, expected, strict=True):
        # Without prefix tokens kappa is empty, and whether it takes part is nobody's business.
        if tensor.numel() and other is not None:
            scale = 1 + other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * scale * call.terms)


def bits(t: Tensor) -> np.ndarray:
    """As the module over numpy arrays takes it: bfloat16 as its bits."""
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


@pytest.mark.skipif(not ISAS, reason="The module over numpy arrays is not built.")
@fuzz(
    80,
    call=calls(),
    op=st.sampled_from(["dw_aggregate", "dw_attention"]),
    isa=st.sampled_from(["auto", *ISAS]),
    threads=st.integers(1, 3),
)
def test_operators_over_numpy_arrays(call: Call, op: str, isa: str, threads: int) -> None:
    arrays = {
        name: None if t is None else (t.double().numpy() if name in COEFFICIENTS else bits(t))
        for name, t in call._named(op).items()
    }
    height, width, num_prefix = (*call.geometry.grid, call.geometry.num_prefix)
    result = getattr(library.native, op)(
        **arrays, height=height, width=width, num_prefix=num_prefix, num_threads=threads, isa=isa
    )
    dtype = call.tensors["x"].dtype  # type: ignore[union-attr]
    found = torch.from_numpy(result.view(np.int16) if result.dtype == np.uint16 else result)
    found = found.view(dtype) if dtype == torch.bfloat16 else found
    assert_within_rounding(found, call.exact(op), call.exact(op, positive=True), call.terms)


COEFFICIENTS = ("kernel", "kappa", "mu", "beta")


def broken(t: Tensor, how: str) -> Tensor:
    """A tensor that does not fit any more."""
    return {
        "longer": lambda: torch.cat([t, t[-1:]], 0) if len(t) else t.new_zeros(1, *t.shape[1:]),
        "wider": lambda: torch.cat([t, t[..., -1:]], -1),
        "another dimension": lambda: t[None],
        "flat": lambda: t.flatten() if t.dim() > 1 else t[:, None],
        "integers": lambda: t.to(torch.int64),
        "complex": lambda: t.to(torch.complex64),
        "meta": lambda: t.to("meta"),
    }[how]()


WAYS = ["longer", "wider", "another dimension", "flat", "integers", "complex", "meta"]


@fuzz(
    150,
    call=calls(),
    op=OPERATORS,
    backend=st.sampled_from(BACKENDS),
    pick=st.integers(0, 20),
    how=st.sampled_from(WAYS),
)
def test_mistakes(call: Call, op: str, backend: str, pick: int, how: str) -> None:
    given = {name: t for name, t in call._named(op).items() if t is not None}
    name = sorted(given)[pick % len(given)]
    # One more image, or one more output channel, is no mistake where nothing else has that size.
    tied = {"v": set(), "x": {"prefix_out"}, "wo": {"bo", "prefix_out"}}
    if how == "longer" and name in tied and tied[name].isdisjoint(given):
        return
    changed = broken(given[name], how)
    wrong = Call({**call.tensors, name: changed}, call.geometry)
    with pytest.raises(DwattnError):
        wrong.run(op, backend)


@fuzz(
    60,
    call=calls(),
    op=OPERATORS,
    backend=st.sampled_from(BACKENDS),
    change=st.tuples(st.integers(-2, 3), st.integers(-2, 3), st.integers(-2, 3)),
)
def test_wrong_geometries(call: Call, op: str, backend: str, change: tuple[int, int, int]) -> None:
    sizes = (*call.geometry.grid, call.geometry.num_prefix)
    other = [size + step for size, step in zip(sizes, change, strict=True)]
    if other[2] < 0 or min(other[:2]) < 1:
        with pytest.raises(DwattnError):
            Geometry(*other)
        return
    geometry = Geometry(*other)
    # Another grid of as many tokens is no mistake that anybody could find.
    if geometry.num_tokens != call.geometry.num_tokens:
        with pytest.raises(DwattnError):
            Call(call.tensors, geometry).run(op, backend)
