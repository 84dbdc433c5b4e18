"""Batches of a training run: read in the run's order, by this process or by workers, and split into micro-batches."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dwattn.errors import DataError, DwattnError
from dwattn.finetune.views import Key, Order, Views, collate
from dwattn.ranks import Ranks

#: What :func:`dwattn.finetune.views.collate` makes of views.
Collated = dict[str, Any]


def read_batches(
    data: Views, order: Order, *, workers: int = 0, pin: bool = False
) -> Iterator[Collated]:
    """The batches of ``order``, each :func:`dwattn.finetune.views.collate` of its views.

    Args:
        workers: processes that decode images; 0 for this one.
        pin: put them into memory from which a GPU can copy.

    Raises:
        DataError: an image that cannot be read, in the same words with workers and without.
    """
    loader = DataLoader(
        _Batches(data), sampler=_Sampler(order), batch_size=None, collate_fn=_unchanged,
        num_workers=workers, pin_memory=pin, worker_init_fn=partial(_end_without, os.getpid()),
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, DwattnError):
            raise batch
        yield batch


def in_step(
    batches: Iterator[Collated], ranks: Ranks, agreed: Callable[[bool], bool]
) -> Iterator[Collated]:
    """The batches of each process; if one of them cannot read its next one, all processes raise before that step.

    Args:
        agreed: whether something is so in any process.

    Raises:
        DwattnError: of another process; the own error is raised as it is.
    """
    while True:
        batch, failed = None, None
        try:
            batch = next(batches, None)
        except Exception as error:  # raised below, after the other processes know
            failed = error
        if agreed(failed is not None):
            with ranks.agreement():
                if failed is not None:
                    raise failed
        if batch is None:
            return
        yield batch


class _Batches(Dataset["Collated | DwattnError"]):
    """Batches by their keys. An error is returned: a worker's would be raised as the text of its traceback."""

    def __init__(self, data: Views) -> None:
        self.data = data

    def __getitem__(self, keys: list[Key]) -> Collated | DwattnError:
        try:
            return collate([self.data[key] for key in keys])
        except DwattnError as error:
            return error


class _Sampler:
    """The order as a sampler."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def _end_without(parent: int, _: int) -> None:
    """End a forked worker whose parent was killed while it started.

    PyTorch's own watch begins after this and takes whatever adopted the worker for its parent: it would wait for ever, and
    with it the lock on the run's folder would stay.
    """
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)


def _unchanged(batch: Any) -> Any:
    return batch


def micro_batches(
    batch: dict[str, Any], size: int | None
) -> Iterator[tuple[dict[str, Any], float]]:
    """Parts of a batch and their shares of it."""
    total = len(batch["keys"])
    if not total:
        raise DataError("A batch holds no images.")
    step = total if size is None else min(size, total)
    for start in range(0, total, step):
        part = {name: value[start : start + step] for name, value in batch.items()}
        yield part, len(part["keys"]) / total


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }
