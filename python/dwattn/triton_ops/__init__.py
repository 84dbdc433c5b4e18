"""The operators in Triton, for GPUs where the CUDA kernels were not built.

Importing this package needs no Triton; calling its functions does (``pip install dwattn[triton]``).
:func:`reasons_against` says why a call cannot run. All functions take tensors of any strides in
fp32, fp16 or bf16, accumulate in fp32 (in TF32 products only where torch allows them), run on the
caller's stream and use no atomics: the same call gives the same bits within a process. The first
call of a new shape compiles and measures a few configurations; make it before capturing a graph.

**Why dw_attention is two kernels here.** Triton keeps a tile of V in registers and has no indexed
shared memory: a fused kernel can shift the tile only with ``tl.gather``, which becomes warp
shuffles. Four gathers (left and right, then up and down) of a tile of M patches are ``M / 8``
shuffles a value, 16 for M = 128, beside the D multiply-adds that formed it: by the throughput of
the units half the time of the products on an A100 and as long as them on an H100 (D = 1024), while
``2 (W + 1)`` of the M rows are a halo that is computed twice (39% for W = 24). The product by
cuBLAS and one pass of the aggregation cost, by their traffic, 30 to 40% more than the product
alone. Shifting the input instead means nine products, a scratch in L2 nine reads from it. These are
estimates; none of this was measured. ``lowrank_dw_attention`` does fuse, because its V is narrow.
"""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn.errors import BackendError, DwattnError
from dwattn.geometry import Geometry
from dwattn.triton_ops import checks

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@functools.cache
def load_error() -> str:
    """Why Triton cannot be used at all, as a sentence; empty when it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); run pip install 'dwattn[triton]'."
    try:
        importlib.import_module("dwattn.triton_ops.ops")
    except (ImportError, AttributeError) as error:
        return f"The installed Triton does not fit (3.6 or newer is needed): {error}."
    return ""


def available() -> bool:
    """Whether the kernels can be loaded; :func:`load_error` says why not."""
    return not load_error()


def reasons_against(
    *, device: str, dtype: torch.dtype, index: int | None = None
) -> tuple[str, ...]:
    """Why a call on such tensors cannot run, as sentences; empty when it can.

    Args:
        device: its type; index: which of them, by default the current one.
    """
    if not available():
        return (load_error(),)
    reasons = []
    if dtype not in checks.DTYPES:
        reasons.append(f"The Triton kernels take fp32, fp16 and bf16, not {dtype}.")
    if _interpreted():
        if dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes wrong products in bf16.")
    elif device != "cuda":
        reasons.append(f"The Triton kernels run on CUDA devices; the tensors are on {device!r}.")
    elif not torch.cuda.is_available():
        reasons.append("PyTorch finds no CUDA device here.")
    elif torch.cuda.get_device_capability(index) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        reasons.append(f"Triton needs compute capability 8.0, this GPU has {capability}.")
    return tuple(reasons)


def dw_aggregate(
    v: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """3x3 depthwise aggregation of the patch values plus ``ctx``; differentiable.

    Args:
        v: ``(B, N, C)`` values of all tokens, prefix first.
        kernel: ``(C, 3, 3)``; kappa: ``(P, C)``; mu, beta: ``(C,)``; of any of the dtypes.
        out: ``(B, H*W, C)`` in the dtype of v, of any strides, e.g. the patch rows of a larger
            tensor. Without gradients only.

    Returns:
        ``(B, H*W, C)`` in the dtype of v: ``out``, or a new tensor.
    """
    checks.tokens("v", v, geometry)
    checks.coefficients(v, v.shape[2], geometry, kernel, kappa, mu, beta)
    _require(v)
    from dwattn.triton_ops import aggregate, ops

    if _as_operator(out, v, kernel, kappa, mu, beta):
        sizes = geometry.height, geometry.width, geometry.num_prefix
        return _into(out, ops.dw_aggregate(v, kernel, kappa, mu, beta, *sizes))
    checks.tensor("out", out, (v.shape[0], geometry.num_patches, v.shape[2]), v, same_dtype=True)
    with torch.no_grad():
        return aggregate.forward(v, kernel, geometry, kappa, mu, beta, out)


def dw_aggregate_backward(
    grad: Tensor,
    v: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
) -> Gradients:
    """Gradients of ``v, kernel, kappa, mu, beta`` from ``grad (B, H*W, C)``, each in the dtype of
    its tensor; None where the tensor is absent or not in ``needs``.
    """
    checks.tokens("v", v, geometry)
    checks.coefficients(v, v.shape[2], geometry, kernel, kappa, mu, beta)
    checks.tensor("grad", grad, (v.shape[0], geometry.num_patches, v.shape[2]), v)
    _require(v)
    from dwattn.triton_ops import aggregate

    with torch.no_grad():
        return aggregate.backward(grad, v, kernel, geometry, kappa, mu, beta, needs)


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
    out: Tensor | None = None,
) -> Tensor:
    """Value projection ``V = x wv^T + bv`` (torch's matrix product) and :func:`dw_aggregate`.

    V is written and read once, twice with mu; see the top of this module for why. Differentiable.

    Args:
        x: ``(B, N, D)``; wv: ``(C, D)``; bv: ``(C,)``, of one dtype.
        kernel, geometry, kappa, mu, beta, out: as in :func:`dw_aggregate`.

    Returns:
        ``(B, H*W, C)`` in the dtype of x.
    """
    checks.tokens("x", x, geometry)
    checks.projection("wv", wv, bv, x.shape[2], x)
    v = F.linear(x, wv, bv)
    return dw_aggregate(v, kernel, geometry, kappa, mu, beta, out=out)


def lowrank_dw_attention(
    x: Tensor,
    wv: Tensor,
    bv: Tensor | None,
    kernel: Tensor,
    geometry: Geometry,
    wo: Tensor,
    bo: Tensor | None,
    kappa: Tensor | None = None,
    mu: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``residual + scale * (dw_attention(x, wv, ...) wo^T + bo)``: the patch rows ``(B, H*W, D)``.

    Two kernels (and a small one for the context). In elements they read x once, write and read V,
    ``B N r``, and write the output once: ``B (N D + 2 N r + H W D)`` plus ``B H W D`` for a
    residual, where r channels beyond 256 read x once more for each 256. The sums for mu come out of
    the first kernel. Inference only: with gradients it is :func:`dw_attention` and plain PyTorch.

    Args:
        x: ``(B, N, D)``; wv: ``(r, D)``; bv: ``(r,)``; wo: ``(D', r)``; bo: ``(D',)``, of one
            dtype.
        kernel, geometry, kappa, mu, beta: as in :func:`dw_aggregate` for r channels.
        residual: ``(B, H*W, D')``; scale: LayerScale, ``(D',)``.
        out: ``(B, H*W, D')`` in the dtype of x, of any strides; it may be ``residual``.
    """
    checks.tokens("x", x, geometry)
    checks.projection("wv", wv, bv, x.shape[2], x)
    checks.projection("wo", wo, bo, wv.shape[0], x)
    checks.coefficients(x, wv.shape[0], geometry, kernel, kappa, mu, beta)
    shape = (x.shape[0], geometry.num_patches, wo.shape[0])
    checks.tensor("residual", residual, shape, x)
    checks.tensor("scale", scale, shape[2:], x)
    _require(x)
    from dwattn.triton_ops import lowrank, ops

    tensors = (x, wv, bv, kernel, kappa, mu, beta, wo, bo, residual, scale)
    if _needs_grad(*tensors):
        y = F.linear(dw_attention(x, wv, bv, kernel, geometry, kappa, mu, beta), wo, bo)
        y = y if scale is None else y * scale
        y = y if residual is None else residual + y
        return _into(out, y.to(x.dtype))
    if torch.compiler.is_compiling():
        sizes = geometry.height, geometry.width, geometry.num_prefix
        return _into(out, ops.lowrank_dw_attention(*tensors, *sizes))
    checks.tensor("out", out, shape, x, same_dtype=True)
    return lowrank.forward(
        x, wv, bv, kernel, geometry, wo, bo, kappa, mu, beta, residual, scale, out
    )


@torch.no_grad()
def attention_variance(
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

    ``E = softmax(scale q k^T)`` is formed twice in registers and never stored: once for its
    denominators and the output ``E v``, once for Welford's mean and M2 over the batch, which meet
    the state by Chan's formula.

    Args:
        q, k: ``(B, n_h, N, d_h)``; v: ``(B, n_h, N, d_v)``, of one dtype.
        mean, m2: fp32 or fp64 ``(n_h, N - num_prefix, N - num_prefix)``: mean and sum of squared
            deviations of E over ``seen`` images; for ``seen=0`` what they hold does not matter.
        prefix_mean: ``(n_h, N - num_prefix, num_prefix)``: mean mass of patch queries on the prefix
            tokens.
        num_prefix: tokens that mean and m2 leave out (0 keeps all entries).
        scale: factor of the logits, default ``1 / sqrt(d_h)``.

    Returns:
        The attention output ``(B, n_h, N, d_v)`` in the dtype of v, or None without v. The state
        now holds ``seen + B`` images. NaN in q or k makes NaN in the state: check before.
    """
    checks.maps(q, k, mean, m2, v, prefix_mean, num_prefix, seen)
    _require(q)
    from dwattn.triton_ops import variance

    return variance.update(q, k, mean, m2, seen, v, prefix_mean, num_prefix, scale)


def _interpreted() -> bool:
    from dwattn.triton_ops import launch

    return launch.INTERPRETED


def _require(t: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    reasons = reasons_against(device=t.device.type, dtype=t.dtype, index=t.device.index)
    if reasons:
        raise BackendError(" ".join(reasons))


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_operator(out: Tensor | None, *tensors: Tensor | None) -> bool:
    if not _needs_grad(*tensors):
        return torch.compiler.is_compiling()
    if out is not None:
        raise DwattnError("out= cannot be used where gradients are needed; leave it away.")
    return True


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
