"""The processes of ``torch.distributed`` that work on one call together; a single process is the
case of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dwattn.errors import DwattnError, ScoreError


@dataclass(frozen=True)
class Ranks:
    """``size`` processes, of which this is number ``rank``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def find(cls, distributed: bool | None) -> Ranks:
        """The default process group, or this process alone.

        Args:
            distributed: None uses the group if there is one, False never.

        Raises:
            ScoreError: ``True`` without an initialised process group.
        """
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and not ready:
            raise ScoreError(
                "distributed=True needs a process group: call "
                "torch.distributed.init_process_group first, or start the script with torchrun."
            )
        if distributed is False or not ready:
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def share(self, images: int) -> int:
        """How many of ``images`` this process takes: as even as possible, the first ones one more."""
        return images // self.size + (self.rank < images % self.size)

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Run the body in every process; if it failed in one of them, raise in all instead of
        hanging.

        Raises:
            DwattnError: of another process, with its number and message; the own error is raised as
                it is.
        """
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # re-raised below, after the other processes know
            own = error
        messages: list[str | None] = [None] * self.size
        torch.distributed.all_gather_object(
            messages, None if own is None else f"{type(own).__name__}: {own}"
        )
        if own is not None:
            raise own
        for rank, message in enumerate(messages):
            if message is not None:
                raise DwattnError(f"Process {rank} of {self.size} failed with {message}")

    def require_equal(self, value: object, what: str) -> None:
        """Raise :class:`ScoreError` in every process unless ``value`` is the same in all of them."""
        if self.size == 1:
            return
        values: list[object] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            listed = "; ".join(f"process {rank}: {other}" for rank, other in enumerate(values))
            raise ScoreError(
                f"The processes have different {what} and cannot be merged ({listed})."
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor
