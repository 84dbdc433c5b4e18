"""Transforms of ``torch.func`` and forward-mode differentiation: right for every layer, whatever requires gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dwattn import backends, functional
from dwattn.attention import (
    ConvAttention,
    EnsembleDWAttention,
    FusedDWAttention,
    LowRankDWAttention,
    SPViTAttention,
)
from dwattn.errors import BackendError
from dwattn.scattered import ScatteredDWAttention
from support.operators import make_case

DIM, GRID = 8, (2, 3)
EXACT, STATIC = {"num_prefix": 2}, {"num_prefix": 1, "prefix": "static"}
OWN = {"num_prefix": 1, "own_prefix_value": True, "own_prefix_proj": True}
RANK, CONTEXT, HEADS = {"rank": 3}, {"context": True}, {"heads": [1]}
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dw": (FusedDWAttention, {}),
    "dw exact": (FusedDWAttention, EXACT),
    "dw own": (FusedDWAttention, OWN),
    "dw static": (FusedDWAttention, STATIC),
    "lowrank_dw": (LowRankDWAttention, RANK),
    "lowrank_dw exact": (LowRankDWAttention, RANK | EXACT),
    "lowrank_dw static": (LowRankDWAttention, RANK | STATIC),
    "conv": (ConvAttention, {}),
    "conv exact": (ConvAttention, EXACT),
    "conv static": (ConvAttention, STATIC),
    "ens_dw": (EnsembleDWAttention, {}),
    "ens_dw exact": (EnsembleDWAttention, EXACT),
    "ens_dw static": (EnsembleDWAttention, STATIC),
    "spvit": (SPViTAttention, CONTEXT),
    "spvit exact": (SPViTAttention, CONTEXT | EXACT),
    "spvit static": (SPViTAttention, CONTEXT | STATIC),
    "scattered": (ScatteredDWAttention, HEADS),
    "scattered exact": (ScatteredDWAttention, HEADS | EXACT),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
frozen_or_not = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "training"])


@pytest.fixture(autouse=True)
def _plain_softmax() -> Iterator[None]:
    """PyTorch's fused softmax attention, of the heads that scattered layers keep, has no tangents."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def make(name: str, *, frozen: bool = False, batch: int = 1) -> tuple[nn.Module, Tensor]:
    cls, options = LAYERS[name]
    torch.manual_seed(len(name))
    module = cls(DIM, 2, grid=GRID, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(batch, 6 + options.get("num_prefix", 0), DIM, dtype=torch.float64)
    return module.requires_grad_(not frozen), x


def energy(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).pow(2).sum()


@frozen_or_not
@every_layer
def test_forward_mode(name: str, frozen: bool) -> None:
    module, x = make(name, frozen=frozen)
    jacobian = torch.autograd.functional.jacobian(module, x)
    direction = torch.randn_like(x)
    expected = torch.einsum("bnd...,...->bnd", jacobian, direction)
    torch.testing.assert_close(torch.func.jvp(module, (x,), (direction,))[1], expected)
    torch.testing.assert_close(torch.func.jacfwd(module)(x), jacobian)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(out.tangent, expected)


@frozen_or_not
@every_layer
def test_reverse_mode(name: str, frozen: bool) -> None:
    module, x = make(name, frozen=frozen, batch=2)
    f = energy(module)
    leaf = x.clone().requires_grad_()
    f(leaf).backward()
    torch.testing.assert_close(torch.func.grad(f)(x), leaf.grad)
    torch.testing.assert_close(torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0], leaf.grad)
    torch.testing.assert_close(torch.func.jacrev(f)(x), leaf.grad)

    def of_images(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda image: module(image[None]))(x).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(of_images)(x), leaf.grad)


@every_layer
def test_gradients_of_every_image(name: str) -> None:
    module, x = make(name, batch=3)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (image[None],)).pow(2).sum()

    parameters = {n: p.detach() for n, p in module.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        module.zero_grad()
        energy(module)(image[None]).backward()
        for n, p in module.named_parameters():
            torch.testing.assert_close(found[n][i], p.grad, msg=n)


@every_layer
def test_hessian(name: str) -> None:
    module, x = make(name, frozen=True)
    f = energy(module)
    torch.testing.assert_close(
        torch.func.hessian(f)(x), torch.autograd.functional.hessian(f, x, vectorize=True)
    )


def test_the_functions() -> None:
    case = make_case(num_prefix=2, dtype=torch.float64)
    wo = torch.randn(5, case.wv.shape[0], dtype=torch.float64)

    def layer(x: Tensor) -> Tensor:
        return functional.dw_layer(
            x, case.wv, case.bv, case.kernel, wo, None, case.geometry, *case.coefficients
        )

    def attention(x: Tensor) -> Tensor:
        return functional.dw_attention(
            x, case.wv, case.bv, case.kernel, case.geometry, *case.coefficients
        )

    def aggregate(v: Tensor) -> Tensor:
        return functional.dw_aggregate(v, case.kernel, case.geometry, *case.coefficients)

    for function, t in ((layer, case.x), (attention, case.x), (aggregate, case.v)):
        direction = torch.randn_like(t)
        expected = function(t + direction) - function(t)  # they are affine
        torch.testing.assert_close(torch.func.jvp(function, (t,), (direction,))[1], expected)


@pytest.mark.parametrize("name", ["dw exact", "conv exact"])
def test_compiled_without_a_break(name: str) -> None:
    module, x = make(name, frozen=True)
    torch._dynamo.reset()

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(module, (x,), (x,))[1]

    compiled = torch.compile(tangent, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), tangent(x))
    layer = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(layer(x), module(x))
    compiles_tangents = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        if not compiles_tangents:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="dual tensor"):
                layer(dual)
            return
        out = forward_ad.unpack_dual(layer(dual))  # by another graph than that without tangents
    torch.testing.assert_close(out.tangent, tangent(x))


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("op", backends.OPS)
def test_what_runs_inside_transforms(op: str, device: str) -> None:
    question: dict[str, Any] = {"device": device, "dtype": torch.float32}
    outside = backends.choose(op, **question)

    def chosen(x: Tensor) -> Tensor:
        assert backends.choose(op, **question) == "torch"
        for own in ("cpp", "cuda", "triton"):
            with pytest.raises(BackendError, match=rf"'{own}' cannot run {op}.*torch\.func"):
                backends.choose(op, **question, backend=own)
        return x

    x = torch.ones(2)
    torch.func.vmap(chosen)(x)
    torch.func.jvp(chosen, (x,), (x,))
    with forward_ad.dual_level():
        chosen(x)
    assert backends.choose(op, **question) == outside
