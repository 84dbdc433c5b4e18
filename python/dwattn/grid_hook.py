"""The hook at a converted model's patch embedding, which tells the replaced layers the grid of the current images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from dwattn.errors import GeometryError
from dwattn.token_grid import Grid, GridSource


class GridHook:
    """Forward pre-hook that writes the grid of the incoming images to ``source``, and refuses images of
    another grid than ``fixed`` if that is given.

    Without it, a layer converted for 3x4 patches would silently accept the tokens of a 4x3 image, which
    are as many. It is an instance of a class, not a closure, so that a deep copy of the model gets its own
    hook and source.

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
                "with dynamic_grid=True (--dynamic-grid) for images of varying size; restore a model that is converted "
                "already first."
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
