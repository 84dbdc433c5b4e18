"""What is timed of the operators on a GPU: every backend, the fastest plain PyTorch forms, and the floors.

A case is a dict of sizes; a part turns it into calls by name:

- values: value projection and aggregation; floor: the projection alone;
- layers: a whole layer of an inner width; floors: its two products, or a copy of the tokens; and softmax
  attention with its projections on every SDPA backend;
- backward: the gradients of both; floor: the products among them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dwattn import backends, functional, library
from dwattn.geometry import Geometry
from dwattn.reference import merge_heads, split_heads

#: fp32 as PyTorch computes it by default, or with its products in TF32.
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
#: Backends that are timed where they run; ``best PyTorch`` below is among those without a name here.
BACKENDS = ("cuda", "cpp", "triton")
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Case = dict[str, Any]


def case(side: int, dim: int, heads: int, batch: int, dtype: str, width: int, **more: Any) -> Case:
    """``compile``: time compiled PyTorch too, which takes seconds to build."""
    return {
        "tokens": side * side, "side": side, "dim": dim, "heads": heads, "batch": batch,
        "dtype": dtype, "width": width, "compile": False, **more,
    }  # fmt: skip


#: By part. The acceptances of the project need those of D=1024 in bf16; the others show the way there.
CASES: dict[str, tuple[Case, ...]] = {
    "values": (
        case(24, 1024, 16, 8, "bf16", 1024, compile=True),
        case(24, 1024, 16, 64, "bf16", 1024, compile=True),
        case(24, 1024, 16, 8, "fp16", 1024),
        case(24, 1024, 16, 8, "fp32", 1024),
        case(24, 1024, 16, 8, "tf32", 1024),
        case(24, 1024, 16, 1, "bf16", 1024),
        case(37, 1024, 16, 64, "bf16", 1024),
        case(16, 384, 6, 64, "bf16", 384),
    ),
    "layers": (
        case(24, 1024, 16, 64, "bf16", 1024),
        case(37, 1024, 16, 64, "bf16", 1024),
        case(24, 1024, 16, 64, "fp32", 1024),
        *(case(24, 1024, 16, 64, "bf16", width) for width in (64, 128, 256, 512)),
        *(case(37, 1024, 16, 64, "bf16", width) for width in (64, 128)),
        *(case(24, 1024, 16, 1, "bf16", width) for width in (64, 1024)),
        case(24, 1024, 16, 64, "fp32", 64),
        case(24, 1024, 16, 64, "tf32", 64),
    ),
    "backward": (
        case(24, 1024, 16, 8, "bf16", 1024),
        case(24, 1024, 16, 64, "bf16", 1024),
        case(24, 1024, 16, 8, "fp32", 1024),
        case(24, 1024, 16, 64, "bf16", 64),
    ),
}
#: That everything runs, not how fast.
QUICK = {
    "values": (case(4, 32, 2, 2, "fp32", 32, compile=False),),
    "layers": (case(4, 32, 2, 2, "fp32", 32), case(4, 32, 2, 2, "fp32", 8)),
    "backward": (case(4, 32, 2, 2, "fp32", 32), case(4, 32, 2, 2, "fp32", 8)),
}


class Layer:
    """The tensors of a case, and the ways to compute with them."""

    def __init__(self, sizes: Case, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[sizes["dtype"]]

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device)
            return (values * scale).to(dtype)

        dim, width = sizes["dim"], sizes["width"]
        self.side, self.heads, self.dim, self.width = sizes["side"], sizes["heads"], dim, width
        self.geometry = Geometry(self.side, self.side, 0)
        self.x = draw(sizes["batch"], sizes["tokens"], dim)
        self.wv, self.bv = draw(width, dim, scale=dim**-0.5), draw(width)
        self.wo, self.bo = draw(dim, width, scale=width**-0.5), draw(dim)
        self.kernel = draw(width, 3, 3, scale=0.1).float()
        self.mu, self.beta = draw(width).float(), draw(width).float()
        self.wqkv = draw(3 * dim, dim, scale=dim**-0.5)
        self.bqkv = draw(3 * dim)

    @property
    def narrow(self) -> bool:
        return self.width < self.dim

    def values(self, backend: str) -> Tensor:
        return functional.dw_attention(
            self.x, self.wv, self.bv, self.kernel, self.geometry, None, self.mu, self.beta,
            backend=backend,
        )  # fmt: skip

    def layer(self, backend: str) -> Tensor:
        return functional.dw_layer(
            self.x, self.wv, self.bv, self.kernel, self.wo, self.bo, self.geometry, None, self.mu,
            self.beta, backend=backend,
        )  # fmt: skip

    def convolution(self, channels_last: bool) -> Tensor:
        """What most people write: linear and a depthwise conv2d, without context."""
        v = F.linear(self.x, self.wv, self.bv)
        image = v.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if not channels_last:
            image = image.contiguous()
        weight = self.kernel.to(v.dtype).unsqueeze(1)
        return F.conv2d(image, weight, padding=1, groups=self.width).flatten(2).transpose(1, 2)

    def eager_values(self) -> Tensor:
        """The same function as :meth:`values`, on contiguous NCHW images."""
        y = self.convolution(channels_last=False)
        mean = F.linear(self.x.mean(1), self.wv, self.bv)
        return y + (self.mu * mean + self.beta).to(y.dtype)[:, None]

    def attention(self, backend: SDPBackend) -> Tensor:
        parts = F.linear(self.x, self.wqkv, self.bqkv).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return F.linear(merge_heads(mixed), self.wproj, self.bo)

    @property
    def wproj(self) -> Tensor:
        return self.wqkv[: self.dim]


def runnable(device: str, dtype: torch.dtype, op: str = "dw_layer") -> list[str]:
    verdicts = backends.explain(op, device=device, dtype=dtype)
    return [name for name in BACKENDS if any(v and v.backend == name for v in verdicts)]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products of fp32 tensors in TF32 for the cases that say so, and for no other."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = dtype == "tf32"  # also what the compiler reads
    try:
        yield
    finally:
        settings.allow_tf32 = before


def values_calls(sizes: Case, device: str) -> Calls:
    layer = Layer(sizes, device)
    calls: dict[str, Callable[[], object]] = {
        "value product": lambda: F.linear(layer.x, layer.wv, layer.bv),
        "eager": layer.eager_values,
        "channels-last": lambda: layer.values("torch"),
    }
    if sizes["compile"]:
        compiled = torch.compile(layer.values)
        calls["compiled"] = lambda: compiled("torch")
    for name in runnable(device, layer.x.dtype):
        calls[name] = lambda name=name: layer.values(name)
    if sizes.get("hopper") and "cuda" in calls:
        calls["cuda, Hopper's kernel"] = lambda: _asking_for_hopper(lambda: layer.values("cuda"))
    return calls


def _asking_for_hopper(call: Callable[[], Tensor]) -> Tensor:
    """The kernel reads the variable at every call; it is off by default."""
    os.environ["DWATTN_CUDA_HOPPER"] = "1"
    try:
        return call()
    finally:
        del os.environ["DWATTN_CUDA_HOPPER"]


def layers_calls(sizes: Case, device: str) -> Calls:
    layer = Layer(sizes, device)
    out = torch.empty_like(layer.x)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(layer.x),
        "two products": lambda: F.linear(F.linear(layer.x, layer.wv, layer.bv), layer.wo, layer.bo),
        "torch": lambda: layer.layer("torch"),
    }
    for name, backend in SDPA.items():
        calls[f"attention {name}"] = lambda backend=backend: layer.attention(backend)
    for name in runnable(device, layer.x.dtype):
        calls[name] = lambda name=name: layer.layer(name)
    return calls


def backward_calls(sizes: Case, device: str) -> Calls:
    """Backward passes alone, each of a graph that is kept; the context is left away, which conv2d lacks."""
    layer = Layer(sizes, device)
    layer.mu = layer.beta = None  # type: ignore[assignment]
    leaves = [t.requires_grad_() for t in (layer.x, layer.wv, layer.bv, layer.kernel)]
    if layer.narrow:
        leaves += [t.requires_grad_() for t in (layer.wo, layer.bo)]

    def backward_of(form: Callable[[], Tensor]) -> Callable[[], object]:
        @functools.cache  # formed by the first call: a forward pass that fails is that call's failure
        def graph() -> tuple[Tensor, Tensor]:
            y = form()
            return y, torch.randn_like(y)

        def call() -> object:
            y, grad = graph()
            return torch.autograd.grad(y, leaves, grad, retain_graph=True)

        return call

    def whole(y: Tensor) -> Tensor:
        return F.linear(y, layer.wo, layer.bo) if layer.narrow else y

    def operator() -> Tensor:
        y = library.dw_attention(
            layer.x, layer.wv, layer.bv, layer.kernel, None, None, None, layer.side, layer.side, 0
        )
        return whole(y)

    calls = {
        "conv2d": backward_of(lambda: whole(layer.convolution(channels_last=False))),
        "conv2d channels-last": backward_of(lambda: whole(layer.convolution(channels_last=True))),
        "products": _gradient_products(layer),
    }
    for name in runnable(device, layer.x.dtype):
        form = layer.layer if layer.narrow else layer.values
        calls[name] = backward_of(lambda name=name, form=form: form(name))
        if name in ("cuda", "cpp"):
            calls[f"{name}, V again"] = backward_of(operator)
    return calls


def _gradient_products(layer: Layer) -> Callable[[], object]:
    """The matrix products that any backward pass has: two, or four with an output projection."""
    x, wv, wo = (t.detach() for t in (layer.x, layer.wv, layer.wo))
    dv = torch.randn(*x.shape[:2], layer.width, device=x.device).to(x.dtype)
    dy = torch.randn_like(x)

    def products() -> object:
        outer = (dy @ wo, dy.flatten(0, 1).t() @ dv.flatten(0, 1)) if layer.narrow else ()
        return (*outer, dv @ wv, dv.flatten(0, 1).t() @ x.flatten(0, 1))

    return products


PARTS: dict[str, Callable[[Case, str], Calls]] = {
    "values": values_calls,
    "layers": layers_calls,
    "backward": backward_calls,
}
