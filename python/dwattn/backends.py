"""Which implementation runs a call: what each backend can run, and which of them is preferred.

Every backend has a ``can_run_<name>`` that says yes or gives its reasons. :func:`choose` asks them
in the order of ``backend_rules.json`` (a measured table), :func:`explain` gives the same answers to
``dwattn doctor``, and forcing a backend that cannot run raises :class:`BackendError` with the same
text.

The compiled and the Triton operators differentiate backward alone: inside the transforms of
``torch.func`` and forward-mode differentiation, as in an ONNX export, plain PyTorch runs.

Forcing, strongest first: ``backend=`` of a call, ``with backends.use(name)``, the environment
variable ``DWATTN_BACKEND`` (read when dwattn is imported).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from dwattn import library, triton_ops
from dwattn.errors import BackendError

OPS = ("dw_aggregate", "dw_attention", "dw_layer", "attention_variance")
ENVIRONMENT_VARIABLE = "DWATTN_BACKEND"

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FLOATS_32_16 = (torch.float32, torch.float16, torch.bfloat16)
# Process-wide on purpose: torch.compile and torch.export read it as a constant while they trace.
_forced: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can run a call: true when it can, else the reasons as sentences."""

    backend: str
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons


def can_run_reference(
    op: str, *, device: str, dtype: torch.dtype, raise_error: bool = False
) -> Verdict:
    """The specification: any device, any floating dtype."""
    return _verdict("reference", op, _check_dtype(dtype), raise_error)


def can_run_torch(
    op: str, *, device: str, dtype: torch.dtype, raise_error: bool = False
) -> Verdict:
    """Linear layer and channels-last depthwise convolution: any device, any floating dtype."""
    return _verdict("torch", op, _check_dtype(dtype), raise_error)


def can_run_cpp(op: str, *, device: str, dtype: torch.dtype, raise_error: bool = False) -> Verdict:
    """The compiled CPU kernels: CPU tensors in fp32, fp16 or bf16, layers in fp64 too; outside ONNX
    export and ``torch.func``.
    """
    reasons = _check_dtype(dtype, _FLOATS_32_16 if op == "attention_variance" else _FLOATS)
    if device != "cpu":
        reasons += (f"The compiled kernels run on the CPU; the tensors are on {device!r}.",)
    reasons += _own_operators_only()
    if not library.AVAILABLE:
        reasons += (library.load_error(),)
    return _verdict("cpp", op, reasons, raise_error)


def can_run_cuda(op: str, *, device: str, dtype: torch.dtype, raise_error: bool = False) -> Verdict:
    """The compiled CUDA kernels: CUDA tensors in fp32, fp16 or bf16, outside ONNX export and
    ``torch.func``.
    """
    reasons = _check_dtype(dtype, _FLOATS_32_16)
    if device != "cuda":
        reasons += (f"The CUDA kernels run on CUDA devices; the tensors are on {device!r}.",)
    reasons += _own_operators_only()
    missing = library.cuda_error()
    return _verdict("cuda", op, (*reasons, missing) if missing else reasons, raise_error)


def can_run_triton(
    op: str, *, device: str, dtype: torch.dtype, raise_error: bool = False
) -> Verdict:
    """The Triton kernels: CUDA tensors in fp32, fp16 or bf16, where Triton is installed."""
    reasons = triton_ops.reasons_against(device=device, dtype=dtype)
    return _verdict("triton", op, (*reasons, *_own_operators_only()), raise_error)


class _Backend(NamedTuple):
    name: str
    can_run: Callable[..., Verdict]


BACKENDS: tuple[_Backend, ...] = (
    _Backend("cpp", can_run_cpp),
    _Backend("cuda", can_run_cuda),
    _Backend("triton", can_run_triton),
    _Backend("torch", can_run_torch),
    _Backend("reference", can_run_reference),
)
NAMES = tuple(backend.name for backend in BACKENDS)


class _Rule(NamedTuple):
    device: str
    order: tuple[str, ...]


def _load_rules() -> tuple[_Rule, ...]:
    table = json.loads((Path(__file__).parent / "backend_rules.json").read_text(encoding="utf-8"))
    return tuple(_Rule(rule["device"], tuple(rule["order"])) for rule in table["rules"])


_RULES = _load_rules()


def choose(op: str, *, device: str, dtype: torch.dtype, backend: str | None = None) -> str:
    """Name of the backend that runs ``op`` on tensors of this device type and dtype.

    Args:
        op: one of :data:`OPS`.
        device: device type, e.g. ``"cpu"`` or ``"cuda"``.
        dtype: dtype of the tokens, after autocast.
        backend: force this one.

    Raises:
        BackendError: the forced backend is unknown or cannot run this call (with its reasons), or
            no backend can.
    """
    forced = backend or _forced
    if forced is not None:
        _by_name(forced).can_run(op, device=device, dtype=dtype, raise_error=True)
        return forced
    if (
        torch.compiler.is_compiling()
    ):  # Dynamo cannot look into a cache; it evaluates this once anyway
        return _preferred(op, device, dtype)
    # Asking torch.onnx costs more than all the rest of a call, and no export runs outside of tracing.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    exporting = tracing and torch.onnx.is_in_onnx_export()
    return _cached_preferred(op, device, dtype, exporting or _transformed())


def _preferred(op: str, device: str, dtype: torch.dtype) -> str:
    for name in _order(device):
        if _by_name(name).can_run(op, device=device, dtype=dtype):
            return name
    raise BackendError(
        f"No backend can run {op} on {device!r} tensors of {dtype}; convert them with .float()."
    )


@functools.cache
def _cached_preferred(op: str, device: str, dtype: torch.dtype, own_only: bool) -> str:
    """``own_only`` is part of the key because :func:`_own_operators_only` is what else it depends on."""
    return _preferred(op, device, dtype)


def _order(device: str) -> tuple[str, ...]:
    return next(rule.order for rule in _RULES if rule.device in (device, "*"))


def forced_backend() -> str | None:
    """Backend forced by :func:`use` or by ``DWATTN_BACKEND``, or None."""
    return _forced


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend for the calls inside the block (all threads of the process).

    Raises:
        BackendError: the name is not one of :data:`NAMES`.
    """
    global _forced
    _by_name(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def explain(op: str, *, device: str, dtype: torch.dtype) -> list[Verdict]:
    """The verdict of every backend on such a call, the preferred one first."""
    order = _order(device)
    names = [*order, *(name for name in NAMES if name not in order)]
    return [_by_name(name).can_run(op, device=device, dtype=dtype) for name in names]


def _by_name(name: str) -> _Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise BackendError(
        f"There is no backend {name!r}; choose one of {', '.join(NAMES)} "
        f"(backend=, backends.use() or {ENVIRONMENT_VARIABLE})."
    )


def _own_operators_only() -> tuple[str, ...]:
    """Why only PyTorch's own operators will do now."""
    if torch.onnx.is_in_onnx_export():
        return ("An ONNX export is running and needs standard operators.",)
    if _transformed():
        return (
            "A transform of torch.func or forward-mode differentiation is running, which only "
            "PyTorch's own operators go through.",
        )
    return ()


_innermost_transform = torch._C._functorch.peek_interpreter_stack


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is running.

    Below them ``requires_grad`` says nothing, and operators without a formula of their own for
    tangents drop these in silence.
    """
    # isinstance, because Dynamo takes what stands for an empty stack for an object other than None.
    transform = isinstance(_innermost_transform(), torch._C._functorch.CInterpreter)
    return transform or forward_ad._current_level >= 0


def _check_dtype(
    dtype: torch.dtype, supported: tuple[torch.dtype, ...] = _FLOATS
) -> tuple[str, ...]:
    if dtype in supported:
        return ()
    *most, last = (str(one).removeprefix("torch.") for one in supported)
    return (f"It computes in {', '.join(most)} and {last}, not in {dtype}.",)


def _verdict(backend: str, op: str, reasons: tuple[str, ...], raise_error: bool) -> Verdict:
    if op not in OPS:
        raise BackendError(f"There is no operator {op!r}; choose one of {', '.join(OPS)}.")
    if reasons and raise_error:
        raise BackendError(f"Backend {backend!r} cannot run {op}: {' '.join(reasons)}")
    return Verdict(backend, reasons)
