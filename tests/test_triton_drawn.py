"""The Triton kernels on drawn sizes, strides and options, judged by the reference in fp64.

``make fuzz`` draws new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dwattn import reference, triton_ops
from dwattn.geometry import Geometry
from support.fuzzing import LAYOUTS, SEEDS, Draw, assert_within_rounding, fuzz
from support.triton_cases import DEVICE, ON_GPU, runs_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = st.sampled_from([torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])])
#: Around the tiles of the kernels: 8 rows, 8 columns, 64 channels, 16 of anything in a product.
SIDES = st.sampled_from([1, 2, 3, 7, 8, 9, 13, 17])
SIZES = st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64, 65, 80, 130])

Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Layer:
    tensors: Tensors
    geometry: Geometry

    def named(self, *names: str) -> Tensors:
        return {name: self.tensors[name] for name in (*names, "kernel", "kappa", "mu", "beta")}

    @property
    def terms(self) -> int:
        x, wv = self.tensors["x"], self.tensors["wv"]
        assert x is not None
        assert wv is not None
        return x.shape[2] + wv.shape[0] + x.shape[0] * self.geometry.num_tokens + 9


@st.composite
def layers(draw: Any) -> Layer:
    make = Draw(draw(SEEDS), draw(DTYPES))
    geometry = Geometry(draw(SIDES), draw(SIDES), draw(st.sampled_from([0, 1, 5])))
    batch, dim, rank, dim_out = draw(st.integers(1, 3)), draw(SIZES), draw(SIZES), draw(SIZES)
    tokens, patches = geometry.num_tokens, geometry.num_patches
    wide = torch.float32 if draw(st.booleans()) else make.dtype  # coefficients may be fp32

    def tensor(*shape: int, **options: Any) -> Tensor:
        return make(*shape, layout=draw(LAYOUTS), **options).to(DEVICE)

    def maybe(*shape: int, **options: Any) -> Tensor | None:
        return tensor(*shape, **options) if draw(st.booleans()) else None

    return Layer(
        {
            "x": tensor(batch, tokens, dim),
            "wv": tensor(rank, dim, scale=dim**-0.5),
            "bv": maybe(rank),
            "v": tensor(batch, tokens, rank),
            "grad": tensor(batch, patches, rank),
            "kernel": tensor(rank, 3, 3, scale=0.3, dtype=wide),
            "kappa": maybe(geometry.num_prefix, rank, dtype=wide),
            "mu": maybe(rank, dtype=wide),
            "beta": maybe(rank, dtype=wide),
            "wo": tensor(dim_out, rank, scale=rank**-0.5),
            "bo": maybe(dim_out),
            "residual": maybe(batch, patches, dim_out),
            "scale": maybe(dim_out),
        },
        geometry,
    )


def exact(tensors: Tensors, *, positive: bool = False) -> Tensors:
    """In fp64; or all positive, which bounds every intermediate result."""
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    return {k: t if t is None or not positive else t.abs() for k, t in wide.items()}


@runs_kernels
@fuzz(15, layer=layers())
def test_aggregation(layer: Layer) -> None:
    tensors = layer.named("v")
    found = triton_ops.dw_aggregate(**tensors, geometry=layer.geometry)
    truth, bound = (
        reference.dw_aggregate(**exact(tensors, positive=p), geometry=layer.geometry)
        for p in (False, True)
    )
    assert_within_rounding(found, truth, bound, layer.terms)


def layer_of(t: Tensors, geometry: Geometry) -> Tensor:
    inner = {name: t[name] for name in ("x", "wv", "bv", "kernel", "kappa", "mu", "beta")}
    y = reference.dw_attention(**inner, geometry=geometry)
    out = torch.nn.functional.linear(y, t["wo"], t["bo"])
    out = out if t["scale"] is None else out * t["scale"]
    return out if t["residual"] is None else out + t["residual"]


@runs_kernels
@fuzz(15, layer=layers())
def test_narrow_layers(layer: Layer) -> None:
    tensors = layer.named("x", "wv", "bv", "wo", "bo", "residual", "scale")
    found = triton_ops.lowrank_dw_attention(**tensors, geometry=layer.geometry)
    truth, bound = (layer_of(exact(tensors, positive=p), layer.geometry) for p in (False, True))
    assert_within_rounding(found, truth, bound, layer.terms)


@runs_kernels
@fuzz(10, layer=layers(), needs=st.tuples(*[st.booleans()] * 5))
def test_gradients(layer: Layer, needs: tuple[bool, ...]) -> None:
    tensors, grad = layer.named("v"), layer.tensors["grad"]
    assert grad is not None
    found = triton_ops.dw_aggregate_backward(grad, **tensors, geometry=layer.geometry, needs=needs)

    def gradients(*, positive: bool) -> list[Tensor | None]:
        leaves = exact(tensors, positive=positive)
        given = [t.requires_grad_() for t in leaves.values() if t is not None]
        y = reference.dw_aggregate(**leaves, geometry=layer.geometry)
        made = iter(torch.autograd.grad(y, given, exact({"": grad}, positive=positive)[""]))
        return [None if t is None else next(made) for t in leaves.values()]

    for ours, truth, bound, wanted in zip(
        found, gradients(positive=False), gradients(positive=True), needs, strict=True
    ):
        if truth is None or not wanted:
            assert ours is None
        else:
            assert ours is not None
            assert bound is not None
            assert_within_rounding(ours, truth, bound, layer.terms)


@dataclass(frozen=True)
class Maps:
    q: Tensor
    k: Tensor
    v: Tensor | None
    num_prefix: int
    state: torch.dtype


@st.composite
def maps(draw: Any) -> Maps:
    make = Draw(draw(SEEDS), draw(DTYPES))
    num_prefix = draw(st.sampled_from([0, 1, 5]))
    tokens = num_prefix + draw(st.sampled_from([1, 7, 16, 31, 33, 65]))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    width, values = draw(st.sampled_from([1, 7, 32, 64, 80, 128])), draw(SIZES)

    def tensor(*shape: int) -> Tensor:
        return make(*shape, layout=draw(LAYOUTS)).to(DEVICE)

    q, k = (tensor(batch, heads, tokens, width) for _ in range(2))
    v = tensor(batch, heads, tokens, values) if draw(st.booleans()) else None
    return Maps(q, k, v, num_prefix, draw(st.sampled_from([torch.float32, torch.float64])))


@runs_kernels
@fuzz(15, one=maps())
def test_statistics(one: Maps) -> None:
    batch, heads, tokens, width = one.q.shape
    size = tokens - one.num_prefix
    mean, m2 = (
        torch.full((heads, size, size), float("nan"), dtype=one.state, device=DEVICE)
        for _ in range(2)
    )
    prefix = torch.full((heads, size, one.num_prefix), float("nan"), dtype=one.state, device=DEVICE)
    first = (batch + 1) // 2  # in two calls, where there are images for two
    outs = []
    for begin, end in ((0, first), (first, batch)):
        if begin < end:
            images = slice(begin, end)
            v = None if one.v is None else one.v[images]
            outs.append(
                triton_ops.attention_variance(
                    one.q[images], one.k[images], mean, m2, begin, v=v,
                    prefix_mean=prefix, num_prefix=one.num_prefix,
                )
            )  # fmt: skip
    logits = one.q.double() @ one.k.double().mT * width**-0.5
    e = torch.softmax(logits, -1)
    # An error of the logits, in fp32, is a relative error of E.
    size_of_logits = one.q.double().abs() @ one.k.double().abs().mT * width**-0.5
    relative = float((width + 8) * torch.finfo(torch.float32).eps * (1 + size_of_logits.amax()))
    patches = e[:, :, one.num_prefix :, one.num_prefix :]
    torch.testing.assert_close(mean.double(), patches.mean(0), rtol=relative, atol=1e-30)
    torch.testing.assert_close(
        prefix.double(), e[:, :, one.num_prefix :, : one.num_prefix].mean(0),
        rtol=relative, atol=1e-30,
    )  # fmt: skip
    squares = (patches - patches.mean(0)).square().sum(0)
    allowed = relative * (squares + squares.sqrt() * patches.amax(0) + patches.amax(0).square())
    assert ((m2.double() - squares).abs() <= 4 * batch * allowed).all()
    if one.v is not None:
        found = torch.cat([out for out in outs if out is not None])
        bound = e @ one.v.double().abs()
        room = relative + 2 * torch.finfo(one.v.dtype).eps
        assert ((found.double() - e @ one.v.double()).abs() <= room * bound + 1e-7).all()
