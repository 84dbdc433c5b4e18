"""Loads the compiled modules and teaches PyTorch about the operators: fake tensors and autograd.

``torch.ops.dwattn.dw_aggregate``, ``dw_attention``, ``dw_layer`` and ``attention_variance_`` come from
``_C.so``, which uses LibTorch's stable ABI and holds no Python symbol. The package works without it: :data:`AVAILABLE` is then false,
:func:`load_error` says why, and other backends run. ``DWATTN_DISABLE_NATIVE=1`` simulates that.

Gradients of ``Y = aggregate(V; K, kappa, mu, beta)`` for ``G = dL/dY``, ``S[c] = sum_patches G``:

- ``dV_patches = aggregate(G; K flipped, mu)``: the mean term of the forward pass, ``mu * mean(V)``,
  hands ``mu * S / (H*W)`` to every patch, which is again a mean term;
- ``dV[t] = kappa[t] S`` for prefix tokens; ``dkappa[t] = sum_b V[t] S``;
  ``dmu = sum_b mean(V) S``; ``dbeta = sum_b S``;
- ``dK`` is the weight gradient of a depthwise convolution.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DISABLE_VARIABLE = "DWATTN_DISABLE_NATIVE"
_BUILD_HINT = (
    "Reinstall dwattn with a C++17 compiler at hand (pip install .) to get the compiled kernels."
)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _load_operators() -> str:
    """Load ``_C.so``; returns why it could not be loaded, or an empty string."""
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
        return f"The compiled kernels are switched off by {DISABLE_VARIABLE}."
    # find_spec instead of a path next to this file: an editable install keeps binaries elsewhere.
    spec = importlib.util.find_spec("dwattn._C")
    if spec is None or spec.origin is None:
        return f"The compiled operators (_C.so) are not installed. {_BUILD_HINT}"
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        return f"The compiled operators could not be loaded ({spec.origin}: {error}). {_BUILD_HINT}"
    return ""


def _load_native() -> tuple[ModuleType | None, str]:
    """Import the pybind11 module; returns it, or why it could not be imported."""
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
        return None, f"The compiled kernels are switched off by {DISABLE_VARIABLE}."
    try:
        return importlib.import_module("dwattn._native"), ""
    except ImportError as error:
        return None, f"The module dwattn._native could not be imported ({error}). {_BUILD_HINT}"


_operator_error = _load_operators()
AVAILABLE = not _operator_error
#: The pybind11 module (build information, kernels over numpy arrays), or None.
native, _native_error = _load_native()


def load_error() -> str:
    """Why the torch operators are not available, as a sentence; empty when they are."""
    return _operator_error


def cuda_error() -> str:
    """Why the CUDA kernels are not available, as a sentence; empty when they are."""
    if not AVAILABLE or native is None:
        return _operator_error or _native_error
    build = native.build_info()
    if build["cuda_architectures"]:
        return ""
    return f"dwattn was built without CUDA kernels: {build['cuda']}."


def native_error() -> str:
    """Why :data:`native` is None, as a sentence; empty when it is not."""
    return _native_error


def dw_aggregate(
    v: Tensor,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
) -> Tensor:
    """The compiled operator ``v (B, N, C) -> (B, H*W, C)``; see :mod:`dwattn.functional`."""
    out: Tensor = torch.ops.dwattn.dw_aggregate.default(
        v, kernel, kappa, mu, beta, height, width, num_prefix
    )
    return out


def dw_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
) -> Tensor:
    """The compiled operator ``x (B, N, D) -> (B, H*W, C)``; see :mod:`dwattn.functional`."""
    out: Tensor = torch.ops.dwattn.dw_attention.default(
        x, wv, bv, kernel, kappa, mu, beta, height, width, num_prefix
    )
    return out


def dw_layer(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    prefix_out: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
) -> Tensor:
    """The compiled operator ``x (B, N, D) -> (B, N or H*W, D_out)``; see :mod:`dwattn.functional`."""
    out: Tensor = torch.ops.dwattn.dw_layer.default(
        x, wv, bv, kernel, kappa, mu, beta, wo, bo, prefix_out, height, width, num_prefix
    )
    return out


@torch.no_grad()
def attention_variance_(
    q: Tensor,
    k: Tensor,
    mean: Tensor,
    m2: Tensor,
    seen: int,
    *,
    v: Tensor | None = None,
    prefix_mean: Tensor | None = None,
    num_prefix: int = 0,
    scale: float | None = None,
) -> Tensor | None:
    """Add the attention maps of a batch to a running state, in place; attend on the way. CUDA only.

    ``E = softmax(scale q k^T)`` never exists in memory; its moments over the batch meet the state by
    Chan's formula.

    Args:
        q, k, v: ``(B, n_h, N, d_h)`` of one dtype (fp32, fp16, bf16), ``d_h <= 128``.
        mean, m2: contiguous fp32 or fp64 ``(n_h, N - num_prefix, N - num_prefix)``: mean and sum of
            squared deviations of E over ``seen`` images; for ``seen=0`` what they hold does not
            matter.
        prefix_mean: ``(n_h, N - num_prefix, num_prefix)``, alike: mean mass of patch queries on the
            prefix tokens.
        num_prefix: tokens that mean and m2 leave out (0 keeps all entries).
        scale: factor of the logits, default ``1 / sqrt(d_h)``.

    Returns:
        The attention output ``E v``, ``(B, n_h, N, d_h)``, or None without v. The state now holds
        ``seen + B`` images.

    Raises:
        RuntimeError: q is not on a CUDA device, or shapes and dtypes do not fit.
    """
    if q.device.type != "cuda":
        raise RuntimeError(
            f"attention_variance_ runs on CUDA devices only and q is on {q.device}; "
            "dwattn.variance.AttentionVariance runs on every device."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.dwattn.attention_variance_.default(
        q, k, mean, m2, prefix_mean, seen, v, num_prefix, scale
    )
    return None if v is None else out


def _fake_aggregate(
    v: Tensor,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
) -> Tensor:
    _check_fake("v", v, v.shape[-1], (kernel, kappa, mu, beta), height, width, num_prefix)
    return v.new_empty(v.shape[0], height * width, v.shape[2])


def _fake_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
) -> Tensor:
    torch._check(wv.dim() == 2, lambda: f"wv must have shape (C, D), got {tuple(wv.shape)}.")
    _check_fake("x", x, wv.shape[0], (kernel, kappa, mu, beta), height, width, num_prefix)
    _check_fake_like("wv", wv, (wv.shape[0], x.shape[2]), x)
    _check_fake_like("bv", bv, (wv.shape[0],), x)
    return x.new_empty(x.shape[0], height * width, wv.shape[0])


def _fake_layer(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    prefix_out: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
) -> Tensor:
    y = _fake_attention(x, wv, bv, kernel, kappa, mu, beta, height, width, num_prefix)
    torch._check(
        wo.dim() == 2 and wo.shape[1] == y.shape[2],
        lambda: f"wo must have shape (D, {y.shape[2]}), got {tuple(wo.shape)}.",
    )
    _check_fake_like("wo", wo, (wo.shape[0], y.shape[2]), x)
    _check_fake_like("bo", bo, (wo.shape[0],), x)
    _check_fake_like("prefix_out", prefix_out, (x.shape[0], num_prefix, wo.shape[0]), x)
    rows = y.shape[1] + (0 if prefix_out is None else num_prefix)
    return x.new_empty(x.shape[0], rows, wo.shape[0])


def _fake_variance(
    q: Tensor,
    k: Tensor,
    mean: Tensor,
    m2: Tensor,
    prefix_mean: Tensor | None,
    seen: int,
    v: Tensor | None,
    num_prefix: int,
    scale: float,
) -> Tensor:
    return q.new_empty(0) if v is None else q.new_empty(q.shape)


def _check_fake(
    name: str,
    t: Tensor,
    channels: int,
    coefficients: tuple[Tensor | None, ...],
    height: int,
    width: int,
    num_prefix: int,
) -> None:
    torch._check(
        t.dim() == 3, lambda: f"{name} must be (batch, tokens, channels), got {tuple(t.shape)}."
    )
    torch._check(
        t.shape[1] == num_prefix + height * width,
        lambda: (
            f"The sequence has N={t.shape[1]} tokens, but num_prefix={num_prefix} and a grid of "
            f"height={height} x width={width} make {num_prefix + height * width}."
        ),
    )
    shapes = ((channels, 3, 3), (num_prefix, channels), (channels,), (channels,))
    for label, one, shape in zip(
        ("kernel", "kappa", "mu", "beta"), coefficients, shapes, strict=True
    ):
        _check_fake_like(label, one, shape, t)


def _check_fake_like(name: str, t: Tensor | None, shape: tuple[int, ...], tokens: Tensor) -> None:
    """A fake implementation also answers calls in which only some tensors are on the meta device."""
    if t is None:
        return
    torch._check(
        t.device == tokens.device,
        lambda: f"{name} is on {t.device} but the tokens are on {tokens.device}.",
    )
    torch._check(
        tuple(t.shape) == shape, lambda: f"{name} must have shape {shape}, got {tuple(t.shape)}."
    )


def _save_aggregate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, kernel, kappa, mu, _beta, *ctx.sizes = inputs
    ctx.save_for_backward(v, kernel, kappa, mu)


def _backward_aggregate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    v, kernel, kappa, mu = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    return (*_aggregate_gradients(grad, v, kernel, kappa, mu, ctx.sizes, needs), None, None, None)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, wv, bv, kernel, kappa, mu, _beta, *ctx.sizes = inputs
    ctx.save_for_backward(x, wv, bv, kernel, kappa, mu)


def _backward_attention(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """V is projected again rather than kept: callers that train keep it (functional.py)."""
    x, wv, bv, kernel, kappa, mu = ctx.saved_tensors
    needs_x, needs_wv, needs_bv, *needs = ctx.needs_input_grad[:7]
    needs_v = needs_x or needs_wv or needs_bv
    v = F.linear(x, wv, bv)
    dv, *coefficients = _aggregate_gradients(
        grad, v, kernel, kappa, mu, ctx.sizes, (needs_v, *needs)
    )
    dx = dwv = dbv = None
    if dv is not None:
        dx = dv @ wv if needs_x else None
        dwv = dv.flatten(0, 1).t() @ x.flatten(0, 1) if needs_wv else None
        dbv = dv.sum((0, 1)) if needs_bv else None
    return (dx, dwv, dbv, *coefficients, None, None, None)


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, wv, bv, kernel, kappa, mu, beta, wo, bo, prefix_out, *ctx.sizes = inputs
    ctx.has_bias, ctx.has_prefix = bo is not None, prefix_out is not None
    ctx.save_for_backward(x, wv, bv, kernel, kappa, mu, beta, wo)


def _backward_layer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Through the composite of :func:`dw_attention` and the output projection, formed again."""
    *inputs, wo = ctx.saved_tensors
    prefix = ctx.sizes[2] if ctx.has_prefix else 0
    rows = grad[:, prefix:]
    needs = ctx.needs_input_grad
    dwo = dbo = None
    if needs[7]:
        y = dw_attention(*inputs, *ctx.sizes)
        dwo = rows.flatten(0, 1).t() @ y.flatten(0, 1)
    if ctx.has_bias and needs[8]:
        dbo = rows.sum((0, 1))
    kept = _Kept((*inputs[:6],), needs[:7], ctx.sizes)
    gradients = _backward_attention(kept, rows @ wo)[:7]
    return (*gradients, dwo, dbo, grad[:, :prefix] if prefix else None, None, None, None)


class _Kept(NamedTuple):
    """What :func:`_backward_attention` reads of its context."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    sizes: list[int]


def _aggregate_gradients(
    grad: Tensor,
    v: Tensor,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    sizes: list[int],
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of v, kernel, kappa, mu and beta, None where not needed; equations on top."""
    height, width, num_prefix = sizes
    needs_v, needs_kernel, needs_kappa, needs_mu, needs_beta = needs
    prefix, patches = v[:, :num_prefix], v[:, num_prefix:]
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    total = grad.sum(1, dtype=wide)  # S (B, C)
    dv = dkernel = dkappa = dmu = dbeta = None
    if needs_v:
        dv = dw_aggregate(grad, kernel.flip(1, 2), None, mu, None, height, width, 0)
        if num_prefix:
            rows = v.new_zeros(prefix.shape) if kappa is None else kappa * total[:, None]
            dv = torch.cat([rows.to(v.dtype), dv], 1)
    if needs_kernel:
        dkernel = _kernel_gradient(grad, patches, height, width).to(kernel.dtype)
    if needs_kappa and kappa is not None:
        dkappa = (prefix * total[:, None]).sum(0).to(kappa.dtype)
    if needs_mu and mu is not None:
        dmu = (patches.mean(1, dtype=wide) * total).sum(0).to(mu.dtype)
    if needs_beta:
        dbeta = total.sum(0)
    return dv, dkernel, dkappa, dmu, dbeta


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


def _register() -> str:
    """Register fake and autograd implementations; returns why that failed, or an empty string."""
    try:
        for name, fake, backward, save in (
            ("dwattn::dw_aggregate", _fake_aggregate, _backward_aggregate, _save_aggregate),
            ("dwattn::dw_attention", _fake_attention, _backward_attention, _save_attention),
            ("dwattn::dw_layer", _fake_layer, _backward_layer, _save_layer),
        ):
            torch.library.register_fake(name, fake)
            torch.library.register_autograd(name, backward, setup_context=save)
        torch.library.register_fake("dwattn::attention_variance_", _fake_variance)
    except RuntimeError as error:
        return f"The compiled operators do not fit this version of dwattn ({error}). {_BUILD_HINT}"
    return ""


if AVAILABLE:
    _operator_error = _register()
    AVAILABLE = not _operator_error
