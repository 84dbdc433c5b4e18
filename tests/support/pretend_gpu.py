"""A GPU that is not there: tensors that compute on the CPU, say that they are on ``cuda:0``, and refuse what CUDA refuses.

It says nothing about kernels. What it finds is Python that forgets where its tensors are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda:0")
#: What PyTorch's own code takes the tensors for: it has no code for CUDA here, and for ``lazy`` it asks nothing of a device.
_BENEATH = "lazy"
aten = torch.ops.aten
#: Operators that take tensors of both devices: copies, and indices on the CPU.
_BOTH = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # fmt: skip
_STAND_INS = {
    "_lazy_init": lambda: None,
    "get_device_name": lambda device=None: "pretended",
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
    "synchronize": lambda device=None: None,
}


@contextlib.contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Within, ``cuda:0`` is such a device."""
    with contextlib.ExitStack() as stack:
        for name, stand_in in _STAND_INS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(_BelowTheDispatcher())
        stack.enter_context(_Factories())
        yield GPU


class OnGpu(Tensor):
    """A tensor on that device; its numbers are in ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=_BENEATH,
        )  # fmt: skip
        return made

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.held!r})"

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Catches calls that make tensors on the device out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _BelowTheDispatcher(TorchFunctionMode):
    """Calls that make tensors on the device where a dispatch mode does not see them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on what the tensors hold."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, OnGpu)]
    here = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
    if there and here and func.overloadpacket not in _BOTH:
        shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}: {shapes}"
        )
    device = kwargs.get("device")
    wanted = device is not None and torch.device(device).type in (GPU.type, _BENEATH)
    if wanted:
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    result = func(*held[0], **held[1])
    if func.overloadpacket is aten.copy_:
        return args[0]
    if wanted or (there and device is None):
        with torch.inference_mode(False):  # in which views of other tensors are made too
            result = tree_map_only(Tensor, OnGpu, result)
    if there and device is None:
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result
