"""What all launches share: the interpreter, autotuning and the sizes of launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from dwattn import library

#: Triton runs kernels as NumPy code on CPU tensors (``TRITON_INTERPRET=1``). It decides this while
#: a kernel is defined, so the variable must be set before triton is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: make it that of the first argument, a tensor."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if first.device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    return guarded


def tuned(kernel: Any, configs: Sequence[Any], key: list[str], **options: Any) -> Any:
    """``kernel`` with the fastest of ``configs``, measured at the first call for every ``key``.

    The choice is kept on disk. Under the interpreter there is nothing to measure: the first
    configuration runs.
    """
    if INTERPRETED:
        configs = configs[:1]
    return triton.autotune(
        configs=list(configs), key=key, cache_results=not INTERPRETED, **options
    )(kernel)


def config(num_warps: int, num_stages: int = 2, **sizes: int) -> Any:
    """A configuration: tile sizes by the names of the kernel's constants."""
    return triton.Config(sizes, num_warps=num_warps, num_stages=num_stages)


def cdiv(size: int, step: int) -> int:
    return -(-size // step)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size``; ``tl.dot`` needs at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a small number under the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """TF32 for fp32 products only where torch allows it for its own."""
    return "tf32" if dtype == torch.float32 and library.allow_tf32() else "ieee"


def strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of a tensor, zeros for None."""
    return (0,) * count if t is None else t.stride()
