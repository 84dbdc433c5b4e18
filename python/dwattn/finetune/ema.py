"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Averages of a module's trainable parameters; other parameters and buffers are not touched.

    Args:
        module: whose parameters are averaged.
        decay: of the average; in the first steps less, ``(1 + n) / (10 + n)``, so that the start is forgotten.

    Attributes:
        whole: False where an exchange of weights and averages was interrupted: the module then holds some of each.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.whole = decay, True
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step``, the first being 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._live.items():
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with their averages."""
        self.whole = False
        for name, parameter in self._live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = kept
        self.whole = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with averaged weights, for evaluation."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
