"""How a layer that is called with tokens alone learns the patch grid they lie on."""

from __future__ import annotations

from torch import Tensor, nn

from dwattn.errors import DwattnError, GeometryError
from dwattn.geometry import Geometry

Grid = tuple[int, int]


class GridSource:
    """The patch grid of the input that is passing through the model, shared by its replaced layers.

    Models call their attention layers with tokens alone; when the resolution varies, a hook at the patch
    embedding writes the grid here. Not a buffer: it never enters a state dict.
    """

    def __init__(self) -> None:
        self.grid: Grid | None = None


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
        if head_dim is None:
            if num_heads < 1 or dim % num_heads:
                raise DwattnError(
                    f"dim={dim} is not a multiple of num_heads={num_heads}; pass head_dim=."
                )
            head_dim = dim // num_heads
        if num_prefix < 0:
            raise GeometryError(f"num_prefix={num_prefix} must be 0 or more.")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.num_prefix = num_prefix
        self.scale = head_dim**-0.5 if scale is None else scale
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        if self.grid is not None:
            Geometry(*self.grid, num_prefix)
        self.grid_source: GridSource | None = None

    def geometry(self, x: Tensor, grid: Grid | None = None) -> Geometry:
        """Geometry of this call: the argument, else the fixed grid, else the grid source; checked against N.

        Raises:
            GeometryError: tokens of another width, no known grid, or ``N != P + H * W``.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise GeometryError(
                f"Expected tokens of shape (batch, N, {self.dim}), got {tuple(x.shape)}."
            )
        source = self.grid_source.grid if self.grid_source is not None else None
        chosen = grid or self.grid or source
        if chosen is None:
            raise GeometryError(
                f"This layer has no fixed grid and the call gave none; N={x.shape[1]} tokens alone do not say "
                f"height and width. Call it as layer(x, grid=(height, width))."
            )
        geometry = Geometry(chosen[0], chosen[1], self.num_prefix)
        geometry.check(x.shape[1])
        return geometry
