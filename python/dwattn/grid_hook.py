"""The hook at a converted model's patch embedding: it knows the grid of the images that pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from dwattn.errors import GeometryError
from dwattn.token_grid import Grid, GridSource


class GridHook:
    """Forward pre-hook that writes the grid of the incoming images to ``source``, or holds it to a
    fixed one.

    Without it a layer converted for 3x4 patches would take the same number of tokens of a 4x3
    image. A class instance, so that a deep copy of the model gets a hook and a source of its own.

    Args:
        source: shared with the replaced layers.
        patch_size: ``(rows, columns)`` in pixels.
        padded: whether the model pads images up to whole patches.
        fixed: the only grid the replaced layers accept, or None for any.
    """

    def __init__(
        self, source: GridSource, patch_size: Grid, padded: bool = False, fixed: Grid | None = None
    ) -> None:
        self.source, self.patch_size, self.padded, self.fixed = source, patch_size, padded, fixed

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(pixels, Proxy) and self.fixed is None:
            raise GeometryError(
                "A model that was converted with dynamic_grid=True cannot be traced symbolically (torch.fx): the "
                "traced one would not know the patch grid of its images. Replace with a fixed grid for that."
            )
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            return
        rows, columns = self.patch_size
        height, width = pixels.shape[-2:]
        if self.padded:
            grid = ((height + rows - 1) // rows, (width + columns - 1) // columns)
        else:
            grid = (height // rows, width // columns)
        if self.fixed is not None and grid != self.fixed:
            raise GeometryError(
                f"Images of {height} x {width} pixels make a patch grid of {grid[0]} x {grid[1]}, but the model is "
                f"converted for {self.fixed[0]} x {self.fixed[1]}. Replace with grid={grid} (--size {height}x{width}), or "
                "with dynamic_grid=True (--dynamic-grid) for images of varying size; a model that is converted already, "
                "restore before."
            )
        self.source.grid = grid

    def install(self, module: nn.Module) -> None:
        """Register on the patch embedding."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self, module: nn.Module) -> None:
        """Take the hook off again. By identity: a handle would not survive a deep copy of the
        model.
        """
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is self:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
