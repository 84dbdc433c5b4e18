"""Loads the compiled modules and teaches PyTorch about the operators: fake tensors here, autograd in
:mod:`dwattn.gradients`.

``torch.ops.dwattn.dw_aggregate``, its backward, ``dw_attention``, ``dw_layer``, ``prefix_rows`` and
``attention_variance_`` come from ``_C.so``, which uses LibTorch's stable ABI and holds no Python symbol. The package works without it: :data:`AVAILABLE` is then false,
:func:`load_error` says why, and other backends run. ``DWATTN_DISABLE_NATIVE=1`` simulates that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from dwattn import gradients

DISABLE_VARIABLE = "DWATTN_DISABLE_NATIVE"
_BUILD_HINT = (
    "Reinstall dwattn with a C++17 compiler at hand (pip install .) to get the compiled kernels."
)

#: Largest width of a head that the CUDA kernel of attention_variance_ takes.
CUDA_HEAD_DIM = 128


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


def prefix_rows(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    num_prefix: int,
    scale: float,
) -> Tensor:
    """The compiled operator ``x (B, N, D) -> (B, P, D_out)``, CPU only and without gradients.

    :class:`dwattn.prefix.ExactPrefixRows` and the output projection of its rows.
    """
    out: Tensor = torch.ops.dwattn.prefix_rows.default(
        x, wq, bq, wk, wv, bv, wo, bo, num_heads, num_prefix, scale
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
    """Add the attention maps of a batch to a running state, in place; attend on the way.

    ``E = softmax(scale q k^T)`` never exists in memory; its moments over the batch meet the state by
    Chan's formula.

    Args:
        q, k, v: ``(B, n_h, N, d_h)`` of one dtype (fp32, fp16, bf16); on CUDA ``d_h <= 128``. NaN
            in q or k makes NaN in the state: check before.
        mean, m2: contiguous fp64 (on CUDA also fp32) ``(n_h, N - num_prefix, N - num_prefix)``: mean
            and sum of squared deviations of E over ``seen`` images; for ``seen=0`` what they hold
            does not matter.
        prefix_mean: ``(n_h, N - num_prefix, num_prefix)``, alike: mean mass of patch queries on the
            prefix tokens.
        num_prefix: tokens that mean and m2 leave out (0 keeps all entries).
        scale: factor of the logits, default ``1 / sqrt(d_h)``.

    Returns:
        The attention output ``E v``, ``(B, n_h, N, d_h)`` laid out as ``(B, N, n_h, d_h)``, or None
        without v. The state now holds ``seen + B`` images.

    Raises:
        RuntimeError: shapes and dtypes do not fit, or no kernel was built for the device of q.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.dwattn.attention_variance_.default(
        q, k, mean, m2, prefix_mean, seen, v, num_prefix, scale
    )
    return None if v is None else out


def allow_tf32() -> bool:
    """Whether PyTorch takes products of fp32 CUDA tensors in TF32; then the CUDA kernels do so too.

    ``torch.backends.cuda.matmul.allow_tf32`` and ``torch.set_float32_matmul_precision`` set it as
    well, but only this one can always be read.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


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


def _fake_aggregate_backward(
    grad: Tensor,
    v: Tensor | None,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    height: int,
    width: int,
    num_prefix: int,
    values: bool,
) -> gradients.Results:
    channels, wide = grad.shape[2], torch.promote_types(grad.dtype, torch.float32)
    _check_fake("grad", grad, channels, (kernel, None, mu, None), height, width, 0)
    _check_fake_like("kappa", kappa, (num_prefix, channels), grad)
    tokens = (grad.shape[0], num_prefix + height * width, channels)
    _check_fake_like("v", v, tokens, grad)

    def result(wanted: bool, *shape: int) -> Tensor:
        return grad.new_empty(shape if wanted else (0,), dtype=wide)

    return (
        grad.new_empty(tokens if values else (0,)),
        result(v is not None, channels, 3, 3),
        result(v is not None and kappa is not None, num_prefix, channels),
        result(v is not None and mu is not None, channels),
        result(True, channels),
    )


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


def _fake_prefix_rows(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    num_heads: int,
    num_prefix: int,
    scale: float,
) -> Tensor:
    channels, out = wq.shape[0], wo.shape[0]
    for name, weight in (("wq", wq), ("wk", wk), ("wv", wv)):
        _check_fake_like(name, weight, (channels, x.shape[2]), x)
    _check_fake_like("wo", wo, (out, channels), x)
    for name, bias, size in (("bq", bq, channels), ("bv", bv, channels), ("bo", bo, out)):
        _check_fake_like(name, bias, (size,), x)
    return x.new_empty(x.shape[0], num_prefix, out)


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
    if v is None:
        return q.new_empty(0)
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


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


def _register() -> str:
    """Register fake and autograd implementations; returns why that failed, or an empty string."""
    try:
        for name, fake in (
            ("dw_aggregate", _fake_aggregate),
            ("dw_aggregate_backward", _fake_aggregate_backward),
            ("dw_attention", _fake_attention),
            ("dw_layer", _fake_layer),
            ("prefix_rows", _fake_prefix_rows),
            ("attention_variance_", _fake_variance),
        ):
            torch.library.register_fake(f"dwattn::{name}", fake)
        torch.library.impl("dwattn::_allow_tf32", "default", allow_tf32)
        gradients.register()
    except RuntimeError as error:
        return f"The compiled operators do not fit this version of dwattn ({error}). {_BUILD_HINT}"
    return ""


if AVAILABLE:
    _operator_error = _register()
    AVAILABLE = not _operator_error
