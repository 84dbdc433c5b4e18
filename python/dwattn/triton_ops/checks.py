"""Checks of the arguments: a kernel that is given wrong shapes reads memory that is not its own."""

from __future__ import annotations

import torch
from torch import Tensor

from dwattn.errors import DwattnError
from dwattn.geometry import Geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tokens(name: str, t: Tensor, geometry: Geometry) -> None:
    """``(B, N, channels)`` in a dtype of the kernels, N as the geometry says."""
    if t.dim() != 3:
        raise DwattnError(
            f"{name} must have the three dimensions (batch, tokens, channels), got shape "
            f"{tuple(t.shape)}."
        )
    geometry.check(t.shape[1])
    _dtype(name, t)


def coefficients(
    like: Tensor,
    channels: int,
    geometry: Geometry,
    kernel: Tensor,
    kappa: Tensor | None,
    mu: Tensor | None,
    beta: Tensor | None,
) -> None:
    """``kernel (C, 3, 3)``, ``kappa (P, C)``, ``mu (C)``, ``beta (C)``."""
    tensor("kernel", kernel, (channels, 3, 3), like)
    tensor("kappa", kappa, (geometry.num_prefix, channels), like)
    tensor("mu", mu, (channels,), like)
    tensor("beta", beta, (channels,), like)


def projection(name: str, weight: Tensor, bias: Tensor | None, inputs: int, like: Tensor) -> None:
    """``weight (outputs, inputs)`` and ``bias (outputs)`` in the dtype of ``like``."""
    if weight.dim() != 2 or weight.shape[1] != inputs or weight.shape[0] < 1:
        raise DwattnError(
            f"{name} must have shape (outputs, {inputs}) to project {inputs} channels, got "
            f"{tuple(weight.shape)}."
        )
    tensor(name, weight, tuple(weight.shape), like, same_dtype=True)
    tensor(f"the bias of {name}", bias, (weight.shape[0],), like, same_dtype=True)


def tensor(
    name: str, t: Tensor | None, shape: tuple[int, ...], like: Tensor, *, same_dtype: bool = False
) -> None:
    """A tensor of this shape on the device of ``like``, or None."""
    if t is None:
        return
    if tuple(t.shape) != shape:
        raise DwattnError(f"{name} must have shape {shape}, got {tuple(t.shape)}.")
    if t.device != like.device:
        raise DwattnError(
            f"{name} is on {t.device} but the tokens are on {like.device}; move the layer and its "
            f"input to one device."
        )
    _dtype(name, t)
    if same_dtype and t.dtype != like.dtype:
        raise DwattnError(
            f"{name} is {t.dtype} but the tokens are {like.dtype}; convert it with "
            f".to({like.dtype})."
        )


def maps(
    q: Tensor,
    k: Tensor,
    mean: Tensor,
    m2: Tensor,
    v: Tensor | None,
    prefix_mean: Tensor | None,
    num_prefix: int,
    seen: int,
) -> None:
    """Queries, keys, values and a state that fit together."""
    if q.dim() != 4 or q.shape != k.shape or 0 in q.shape:
        raise DwattnError(
            f"q and k must have one shape (B, n_h, N, d_h) with no zero in it, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    _dtype("q", q)
    tensor("k", k, tuple(k.shape), q, same_dtype=True)
    if v is not None:
        if v.dim() != 4 or v.shape[3] < 1:
            raise DwattnError(f"v must have shape (B, n_h, N, d_v), got {tuple(v.shape)}.")
        tensor("v", v, (*q.shape[:3], v.shape[3]), q, same_dtype=True)
    size = q.shape[2] - num_prefix
    if num_prefix < 0 or size < 1 or seen < 0:
        raise DwattnError(
            f"num_prefix={num_prefix} of N={q.shape[2]} tokens and seen={seen} images are not "
            f"possible."
        )
    states = [("mean", mean, size), ("m2", m2, size)]
    if prefix_mean is not None:
        states.append(("prefix_mean", prefix_mean, num_prefix))
    for name, state, columns in states:
        expected = (q.shape[1], size, columns)
        if tuple(state.shape) != expected or state.device != q.device:
            raise DwattnError(
                f"{name} must have shape {expected} on {q.device}, got {tuple(state.shape)} on "
                f"{state.device}."
            )
        if state.dtype not in (torch.float32, torch.float64):
            raise DwattnError(f"{name} must be fp32 or fp64, got {state.dtype}.")


def _dtype(name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES:
        raise DwattnError(
            f"{name} is {t.dtype}; the Triton kernels take fp32, fp16 and bf16. Convert it with "
            f".float()."
        )
