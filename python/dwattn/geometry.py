"""How a token sequence maps onto the patch grid: ``N = num_prefix + height * width``.

The geometry is always explicit. Nothing in the package recovers a grid from a token count with a square
root: 3x4 and 4x3 grids have the same count, and register tokens would silently become a grid row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dwattn.errors import GeometryError


@dataclass(frozen=True)
class Geometry:
    """A patch grid after ``num_prefix`` prefix tokens (CLS first, then registers).

    Args:
        height: patch rows ``H >= 1``.
        width: patch columns ``W >= 1``.
        num_prefix: tokens before the patches, ``P >= 0``.

    Raises:
        GeometryError: if a number is out of range.
    """

    height: int
    width: int
    num_prefix: int = 0

    def __post_init__(self) -> None:
        # Symbolic sizes (torch.export with a dynamic resolution) are checked by the tokens they must
        # add up to; comparing them here would specialise the graph on one size.
        sizes = (self.height, self.width, self.num_prefix)
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return
        if self.height < 1 or self.width < 1 or self.num_prefix < 0:
            raise GeometryError(
                f"A patch grid needs height >= 1, width >= 1 and num_prefix >= 0, got height={self.height}, "
                f"width={self.width}, num_prefix={self.num_prefix}."
            )

    @property
    def num_patches(self) -> int:
        """``H * W``."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """``N = P + H * W``."""
        return self.num_prefix + self.num_patches

    @property
    def grid(self) -> tuple[int, int]:
        """``(H, W)``."""
        return (self.height, self.width)

    def check(self, tokens: int) -> None:
        """Raise :class:`GeometryError` with all four numbers unless ``tokens == P + H * W``."""
        if tokens != self.num_tokens:
            raise GeometryError(
                f"The sequence has N={tokens} tokens, but num_prefix={self.num_prefix} and a grid of "
                f"height={self.height} x width={self.width} make {self.num_tokens}. Pass the grid of this input "
                f"as grid=(height, width) and the number of CLS and register tokens as num_prefix; for images "
                f"of varying size convert the model with replace(..., dynamic_grid=True). A model that drops patches "
                f"while it trains has to keep them: make it with patch_drop_rate=0."
            )
