"""Using a model without a trace: whatever happens inside these contexts, the model is as it was
afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

P = ParamSpec("P")
R = TypeVar("R")
_ABSENT = object()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode and the random state are as
    before.

    The modes are set as attributes: ``eval()`` of a module may do more than that (merge adapters,
    for example).
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {
        tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda
    }
    indices = sorted(device.index or 0 for device in devices)
    with torch.random.fork_rng(devices=indices), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def ordinary_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the tensors that ``function(model, ...)`` makes can be trained, even if it is called inside
    ``torch.inference_mode``, because that mode is left for the call. A model that was itself made inside that mode is the
    exception: its tensors may be overwritten only there. Where the meta device is the default
    (``torch.set_default_device``), which keeps no values, new tensors are made on the CPU.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        own = model.parameters() if isinstance(model, nn.Module) else ()
        with contextlib.ExitStack() as stack:
            if torch.get_default_device().type == "meta":
                stack.enter_context(torch.device("cpu"))
            if torch.is_inference_mode_enabled() and not any(p.is_inference() for p in own):
                stack.enter_context(torch.inference_mode(False))
            return function(*args, **kwargs)

    return outside


def deep_copy(module: nn.Module) -> nn.Module:
    """A deep copy that also works for modules with computed weights. ``copy.deepcopy`` refuses tensors with a history; here
    they are detached, since pruning and the older weight and spectral norms recompute them from their parts at every call.
    """
    computed = (
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})


@contextlib.contextmanager
def instance_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` stand in for the forward of this instance; its class and its hooks are not
    touched.
    """
    before = module.__dict__.get("forward", _ABSENT)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is _ABSENT:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, the data-parallel wrappers and averages of weights, whose layer
    names it keeps.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
