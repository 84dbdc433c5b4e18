"""How a layer that is called with tokens alone learns the patch grid they lie on."""

from __future__ import annotations

import operator
import threading
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.errors import DwattnError, GeometryError
from dwattn.geometry import Geometry

Grid = tuple[int, int]


class GridSource:
    """The patch grid of the images that are passing through the model, shared by its replaced layers.

    Models call their attention layers with tokens alone; when the resolution varies, a hook at the patch
    embedding writes the grid here. Not a buffer: it never enters a state dict.

    Each thread has a grid of its own, so that several may call one model. Gradient checkpointing calls layers
    again during backward, perhaps in a thread of autograd's and without the patch embedding: of the grids that
    passed with gradients since the backward before, they get the one that has as many patches.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        self._thread = threading.local()
        self._last = grid
        #: Grids of forward passes that backward may ask for, and whether it has asked since.
        self._passed: tuple[Grid, ...] = ()
        self._asked = False

    @property
    def grid(self) -> Grid | None:
        """The grid of the last images of this thread, or of any; None if none have passed."""
        grid: Grid | None = getattr(self._thread, "grid", self._last)
        return grid

    @grid.setter
    def grid(self, grid: Grid) -> None:
        self._thread.grid = self._last = grid
        if torch.compiler.is_compiling():
            self._passed = ()
            return
        self._thread.task = task = _backward()
        if task is not None:
            self._asked = True
        elif torch.is_grad_enabled():
            passed = () if self._asked else self._passed
            self._passed = passed if grid in passed else (*passed, grid)
            self._asked = False

    def of(self, patches: int) -> Grid | None:
        """The grid for a layer that is called now with this many patches.

        Raises:
            GeometryError: called again during backward, and not just one grid that passed has so many.
        """
        task = _backward()
        if task is None:
            return self.grid
        self._asked = True
        if not self._passed or getattr(self._thread, "task", None) == task:
            return self.grid
        fitting = [grid for grid in self._passed if grid[0] * grid[1] == patches]
        if len(fitting) != 1:
            grids = " and ".join(f"{height} x {width}" for height, width in self._passed)
            raise GeometryError(
                f"Gradient checkpointing calls this layer again during backward with {patches} patches, and images with "
                f"patch grids of {grids} have passed since the backward before: it cannot tell whose they are. Call "
                f"backward after each size (and evaluate under torch.no_grad()), or switch checkpointing off."
            )
        return fitting[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the grid of the current thread only."""
        return GridSource, (getattr(self._thread, "grid", self._last),)


def _backward() -> int | None:
    """Number of the backward pass that is running in this thread, or None; compiled code has none."""
    if torch.compiler.is_compiling():
        return None
    task: int = torch._C._current_graph_task_id()
    return None if task == -1 else task


class TokenGridModule(nn.Module):
    """Base of the layers that need ``(H, W, P)``: sizes, and the geometry of each call.

    Args:
        dim: model width ``D``.
        num_heads: heads ``n_h`` of the layer that is replaced.
        grid: patch grid ``(H, W)``; None takes it from the call or from ``grid_source``.
        num_prefix: prefix tokens ``P`` (CLS, registers).
        head_dim: ``d_h``, default ``dim // num_heads``.
        scale: logit factor of softmax rows, default ``1 / sqrt(d_h)``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid | None = None,
        num_prefix: int = 0,
        head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        head_dim = head_width(dim, num_heads, head_dim)
        if num_prefix < 0:
            raise GeometryError(f"num_prefix={num_prefix} must be 0 or more.")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.num_prefix = num_prefix
        self.scale = head_dim**-0.5 if scale is None else scale
        self.grid = None if grid is None else _checked(grid)
        if self.grid is not None:
            Geometry(*self.grid, num_prefix)
        self.grid_source: GridSource | None = None

    def geometry(self, x: Tensor, grid: Grid | None = None) -> Geometry:
        """Geometry of this call: the argument, else the fixed grid, else the grid source; checked against N.

        Raises:
            GeometryError: tokens of another width, a grid that is not two whole numbers or not known, or
                ``N != P + H * W``.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise GeometryError(
                f"Expected tokens of shape (batch, N, {self.dim}), got {tuple(x.shape)}."
            )
        chosen = self.grid if grid is None else _checked(grid)
        if chosen is None and self.grid_source is not None:
            chosen = self.grid_source.of(x.shape[1] - self.num_prefix)
        if chosen is None:
            raise GeometryError(
                f"This layer has no fixed grid and the call gave none; N={x.shape[1]} tokens alone do not say "
                f"height and width. Call it as layer(x, grid=(height, width))."
            )
        geometry = Geometry(chosen[0], chosen[1], self.num_prefix)
        geometry.check(x.shape[1])
        return geometry


def head_width(dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """``d_h``: as given, else ``dim // num_heads``.

    Raises:
        DwattnError: no heads or no channels, or heads that do not divide ``dim``.
    """
    if num_heads < 1 or (head_dim is not None and head_dim < 1):
        raise DwattnError(f"num_heads={num_heads} and head_dim={head_dim} must be 1 or more.")
    if head_dim is not None:
        return head_dim
    if dim % num_heads:
        raise DwattnError(f"dim={dim} is not a multiple of num_heads={num_heads}; pass head_dim=.")
    return dim // num_heads


def _checked(grid: Any) -> Grid:
    """``grid`` as two ints; symbolic sizes (dynamic shapes) stay as they are."""
    try:
        height, width = (
            size if isinstance(size, (int, torch.SymInt)) else operator.index(size) for size in grid
        )
    except (TypeError, ValueError):
        raise GeometryError(
            f"grid={grid!r} must be two whole numbers, (height, width) in patches."
        ) from None
    return height, width  # type: ignore[return-value]  # a SymInt stands for an int
