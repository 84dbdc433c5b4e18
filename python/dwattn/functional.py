"""The operators as functions, on whichever backend runs them best.

Both are differentiable in every tensor argument, follow autocast (tokens and value projection take
the autocast dtype, the coefficients keep theirs) and trace under ``torch.compile(fullgraph=True)``,
``torch.export`` and ``torch.onnx``. The equations are those of :mod:`dwattn.reference`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import backends, library, reference, triton_ops
from dwattn.errors import DwattnError
from dwattn.geometry import Geometry


def dw_aggregate(
    v: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """3x3 depthwise aggregation of the patch values plus ``ctx``: the patch rows ``Y (B, H*W, C)``.

    ``Y[b, (i,j), c] = sum_{r,s in -1..1} kernel[c, r+1, s+1] V[b, (i+r, j+s), c] + ctx[b, c]``,
    zero outside the grid, with ``ctx = sum_t kappa[t] V[t] + mu * mean_patches(V) + beta``.

    Args:
        v: ``(B, N, C)`` values of all tokens, prefix first; fp32, fp64, fp16 or bf16; any strides.
        kernel: ``(C, 3, 3)``; it and the other coefficients may be fp32 while ``v`` has 16 bits.
        geometry: grid and number of prefix tokens; ``N`` must be ``P + H*W``.
        kappa: ``(P, C)``; mu: ``(C,)``; beta: ``(C,)``.
        backend: force one of :data:`dwattn.backends.NAMES`.

    Returns:
        ``(B, H*W, C)`` in the dtype of ``v``, accumulated in fp32 (fp64 for fp64).

    Raises:
        GeometryError: token count and geometry do not agree.
        DwattnError: a tensor has the wrong shape, device or dtype.
        BackendError: a forced backend cannot run the call.
    """
    coefficients = (kernel, kappa, mu, beta)
    device = _device(v)
    name = backends.choose("dw_aggregate", device=device, dtype=v.dtype, backend=backend)
    if name in _COMPILED:
        return _run_compiled(
            library.dw_aggregate,
            (v, *coefficients, *_sizes(geometry)),
            lambda: _check_aggregate(v, geometry, *coefficients),
        )
    _check_aggregate(v, geometry, *coefficients)
    with _autocast_off(device):
        return _PYTHON[name](v, geometry, *coefficients)


def dw_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Value projection ``V = x wv^T + bv`` and :func:`dw_aggregate` in one: ``Y (B, H*W, C)``.

    Args:
        x: ``(B, N, D)`` tokens, prefix first.
        wv: ``(C, D)``; bv: ``(C,)``; both in the dtype of ``x`` unless autocast is on.
        kernel, geometry, kappa, mu, beta, backend: as in :func:`dw_aggregate`.

    Returns:
        ``(B, H*W, C)`` in the dtype of ``x``, or in the autocast dtype.

    Raises:
        GeometryError, DwattnError, BackendError: as :func:`dw_aggregate`.
    """
    device = _device(x)
    if _autocast_enabled(device):
        x, wv, bv = _cast(device, x, wv, bv)
    coefficients = (kernel, kappa, mu, beta)
    name = backends.choose("dw_attention", device=device, dtype=x.dtype, backend=backend)
    needs_grad = torch.is_grad_enabled() and _requires_grad(x, wv, bv, *coefficients)
    if name in _COMPILED and not needs_grad:
        return _run_compiled(
            library.dw_attention,
            (x, wv, bv, *coefficients, *_sizes(geometry)),
            lambda: _check_attention(x, wv, bv, geometry, *coefficients),
        )
    _check_attention(x, wv, bv, geometry, *coefficients)
    with _autocast_off(device):
        # With gradients, V is kept for the backward pass: to project it again is a third product beside
        # those of dx and dwv, while V is one activation of the width of x among the many of a block
        # (and r / D of one in a narrow layer). The operator itself keeps x alone and projects again.
        v = F.linear(x, wv, bv)
        if name in _COMPILED:
            return library.dw_aggregate(v, *coefficients, *_sizes(geometry))
        return _PYTHON[name](v, geometry, *coefficients)


def dw_layer(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    prefix_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`dw_attention` and the output projection: ``out = concat(prefix_out, Y wo^T + bo)``.

    ``dw`` with ``wv (C, D)``, ``wo (D, C)``; ``lowrank_dw`` with the factors ``A (r, D)``, ``B (D, r)``.

    Args:
        x, wv, bv, kernel, geometry, kappa, mu, beta, backend: as in :func:`dw_attention`.
        wo: ``(D_out, C)``; bo: ``(D_out,)``; in the dtype of ``x`` unless autocast is on.
        prefix_out: ``(B, P, D_out)`` finished prefix rows; without them the result has none.

    Returns:
        ``(B, N, D_out)``, or ``(B, H*W, D_out)`` without ``prefix_out``; in the dtype of ``x``, or in
        the autocast dtype.

    Raises:
        GeometryError, DwattnError, BackendError: as :func:`dw_aggregate`.
    """
    device = _device(x)
    if _autocast_enabled(device):
        x, wv, bv, wo, bo, prefix_out = _cast(device, x, wv, bv, wo, bo, prefix_out)
    coefficients = (kernel, kappa, mu, beta)
    name = backends.choose("dw_layer", device=device, dtype=x.dtype, backend=backend)

    def check() -> None:
        _check_attention(x, wv, bv, geometry, *coefficients)
        _check_output(x, wv, wo, bo, prefix_out, geometry)

    needs_grad = torch.is_grad_enabled() and _requires_grad(
        x, wv, bv, *coefficients, wo, bo, prefix_out
    )
    if name in _COMPILED and not needs_grad:
        return _run_compiled(
            library.dw_layer,
            (x, wv, bv, *coefficients, wo, bo, prefix_out, *_sizes(geometry)),
            check,
        )
    check()
    with _autocast_off(device):
        if name == "triton" and wv.shape[0] <= _TRITON_FUSED_WIDTH and not needs_grad:
            return _triton_dw_layer(x, wv, bv, geometry, *coefficients, wo, bo, prefix_out)
        y = dw_attention(x, wv, bv, kernel, geometry, kappa, mu, beta, backend=backend)
        out = F.linear(y, wo, bo)
        return out if prefix_out is None else torch.cat([prefix_out, out], dim=1)


def _run_compiled(
    operator: Callable[..., Tensor], arguments: tuple[Any, ...], check: Callable[[], None]
) -> Tensor:
    """Run a compiled operator, which checks its arguments itself.

    Checking them here too would take as long as a small kernel, so it is done only to give the
    operator's error its type, and under tracing, where it is free.
    """
    if torch.compiler.is_compiling():
        check()
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError:
        check()
        raise


def _torch_dw_aggregate(
    v: Tensor,
    geometry: Geometry,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    """Depthwise convolution of a channels-last view of the patches: no copies of V."""
    height, width, num_prefix = _sizes(geometry)
    channels = v.shape[2]
    image = v[:, num_prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    weight = kernel.to(v.dtype).unsqueeze(1)
    y = F.conv2d(image, weight, padding=1, groups=channels).permute(0, 2, 3, 1).flatten(1, 2)
    wide = _accumulation_dtype(v.dtype)
    kappa, mu, beta = (None if t is None else t.to(wide) for t in (kappa, mu, beta))
    ctx = reference.context(v.to(wide), geometry, kappa, mu, beta)
    return y if ctx is None else y + ctx.to(y.dtype)


def _reference_dw_aggregate(
    v: Tensor,
    geometry: Geometry,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    """The specification, evaluated in the accumulation dtype and rounded once."""
    wide = _accumulation_dtype(v.dtype)
    kappa, mu, beta = (None if t is None else t.to(wide) for t in (kappa, mu, beta))
    y = reference.dw_aggregate(v.to(wide), kernel.to(wide), geometry, kappa, mu, beta)
    return y.to(v.dtype)


def _triton_dw_aggregate(
    v: Tensor,
    geometry: Geometry,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    return triton_ops.dw_aggregate(v, kernel, geometry, kappa, mu, beta)


#: Widest inner width of the fused Triton layer; beyond it x is read more often than two products do.
_TRITON_FUSED_WIDTH = 512


def _triton_dw_layer(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    geometry: Geometry,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    prefix_out: Tensor | None,
) -> Tensor:
    """Patch rows straight into the output, after the finished prefix rows."""
    prefix = 0 if prefix_out is None else prefix_out.shape[1]
    out = x.new_empty(x.shape[0], prefix + geometry.num_patches, wo.shape[0])
    if prefix_out is not None:
        out[:, :prefix] = prefix_out
    triton_ops.lowrank_dw_attention(
        x, wv, bv, kernel, geometry, wo, bo, kappa, mu, beta, out=out[:, prefix:]
    )
    return out


#: Backends behind the torch operators of ``_C.so``.
_COMPILED = ("cpp", "cuda")
_PYTHON = {
    "torch": _torch_dw_aggregate,
    "reference": _reference_dw_aggregate,
    "triton": _triton_dw_aggregate,
}


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sizes(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.height, geometry.width, geometry.num_prefix


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _device(x: Tensor) -> str:
    """The type of its device; a small layer on a CPU feels what ``x.device`` costs."""
    try:
        return "cpu" if x.is_cpu else x.device.type
    except AttributeError:
        found = f"{type(x).__module__}.{type(x).__qualname__}"
        raise DwattnError(
            f"The tokens must be a torch.Tensor, got {found}; convert them with torch.as_tensor()."
        ) from None


def _autocast_enabled(device: str) -> bool:
    """torch raises for devices that have no autocast, of which only meta computes shapes here."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(device: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast does for a linear layer: every floating dtype but fp64."""
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Tensor | None:
        narrow = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if t is not None and narrow else t

    return tuple(cast(t) for t in tensors)


def _autocast_off(device: str) -> contextlib.AbstractContextManager[Any]:
    """Everything has been cast already; entering autocast costs more than a small kernel."""
    if _autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _check_aggregate(v: Tensor, geometry: Geometry, *coefficients: Tensor | None) -> None:
    _check_tokens("v", v, geometry)
    _check_coefficients(v, v.shape[-1], geometry, *coefficients)


def _check_attention(
    x: Tensor, wv: Tensor, bv: Tensor | None, geometry: Geometry, *coefficients: Tensor | None
) -> None:
    _check_tokens("x", x, geometry)
    _check_projection(x, wv, bv)
    _check_coefficients(x, wv.shape[0], geometry, *coefficients)


def _check_tokens(name: str, t: Tensor, geometry: Geometry) -> None:
    if t.dim() != 3:
        raise DwattnError(
            f"{name} must have the three dimensions (batch, tokens, channels), got shape "
            f"{tuple(t.shape)}."
        )
    if not t.is_floating_point():
        raise DwattnError(
            f"{name} must be a floating-point tensor, got {t.dtype}; use {name}.float()."
        )
    geometry.check(t.shape[1])


def _check_projection(x: Tensor, wv: Tensor, bv: Tensor | None) -> None:
    if wv.dim() != 2 or wv.shape[1] != x.shape[2]:
        raise DwattnError(
            f"wv must have shape (C, {x.shape[2]}) to project the {x.shape[2]} features of x, "
            f"got {tuple(wv.shape)}."
        )
    _check_like_tokens("wv", wv, tuple(wv.shape), x)
    _check_like_tokens("bv", bv, tuple(wv.shape[:1]), x)


def _check_output(
    x: Tensor,
    wv: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    prefix_out: Tensor | None,
    geometry: Geometry,
) -> None:
    if wo.dim() != 2 or wo.shape[1] != wv.shape[0]:
        raise DwattnError(
            f"wo must have shape (D, {wv.shape[0]}) to project the {wv.shape[0]} aggregated "
            f"channels, got {tuple(wo.shape)}."
        )
    _check_like_tokens("wo", wo, tuple(wo.shape), x)
    _check_like_tokens("bo", bo, tuple(wo.shape[:1]), x)
    rows = (x.shape[0], geometry.num_prefix, wo.shape[0])
    _check_like_tokens("prefix_out", prefix_out, rows, x)


def _check_like_tokens(name: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if t is None:
        return
    _check_tensor(name, t, shape, x)
    if t.dtype != x.dtype:
        raise DwattnError(
            f"{name} is {t.dtype} but x is {x.dtype}; convert the layer with .to({x.dtype}) or "
            f"run it under torch.autocast({x.device.type!r})."
        )


def _check_coefficients(
    tokens: Tensor, channels: int, geometry: Geometry, *coefficients: Tensor | None
) -> None:
    shapes = ((channels, 3, 3), (geometry.num_prefix, channels), (channels,), (channels,))
    for name, t, shape in zip(("kernel", "kappa", "mu", "beta"), coefficients, shapes, strict=True):
        if t is not None:
            _check_tensor(name, t, shape, tokens)


def _check_tensor(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(t.shape) != shape:
        raise DwattnError(f"{name} must have shape {shape}, got {tuple(t.shape)}.")
    if t.device != like.device:
        raise DwattnError(
            f"{name} is on {t.device} but the tokens are on {like.device}; move the layer and its "
            f"input to one device."
        )
    if not t.is_floating_point():
        raise DwattnError(f"{name} must be a floating-point tensor, got {t.dtype}.")
