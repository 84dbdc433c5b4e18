"""What dwattn needs to know of a library's Vision Transformer, as data and two small interfaces.

An :class:`AttentionAdapter` knows one attention class: its weights, why it may have to be refused, how it is
called. A :class:`BackboneAdapter` knows one model class: its blocks in depth order and its patch grid.
Everything else in the package works on :class:`BackboneLayout` and never sees a library's classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dwattn.errors import DataError, UnsupportedAttentionError
from dwattn.geometry import Geometry
from dwattn.projections import AttentionWeights
from dwattn.token_grid import Grid
from dwattn.variants import Replacement


class CallConvention:
    """How a block calls its attention layer: tokens in, tensor out. Subclasses change what they must."""

    #: Keyword arguments (and positions after the tokens) that carry a mask or bias; they must be absent.
    mask_arguments: tuple[str, ...] = ("attn_mask", "attention_mask", "attn_bias", "head_mask")

    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The ``(B, N, D)`` tokens of a call.

        Raises:
            UnsupportedAttentionError: the call has a mask, a bias or asks for causal attention.
        """
        for name in self.mask_arguments:
            if kwargs.get(name) is not None:
                raise UnsupportedAttentionError(
                    f"The layer was called with {name}=...: a replaced layer aggregates a fixed 3x3 neighbourhood "
                    f"and cannot apply masks. Call the model without masks, or leave this block out of the plan."
                )
        if kwargs.get("is_causal") or any(argument is True for argument in args[1:]):
            raise UnsupportedAttentionError(
                "The layer was called with is_causal=True: causal attention cannot be replaced. Leave this block "
                "out of the plan."
            )
        if any(isinstance(argument, Tensor) for argument in args[1:]):
            raise UnsupportedAttentionError(
                "The layer was called with a mask or bias tensor after the tokens: a replaced layer cannot apply "
                "it. Call the model without masks, or leave this block out of the plan."
            )
        tokens = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if not isinstance(tokens, Tensor):
            raise UnsupportedAttentionError(f"Expected one tensor of tokens, got {type(tokens).__name__}.")
        return tokens

    def pack(self, output: Tensor) -> Any:
        """Wrap the layer's output as the block expects it."""
        return output

    def unpack(self, result: Any) -> Tensor:
        """The inverse of :meth:`pack`, for results of the original layer."""
        tensor: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return tensor


class TupleConvention(CallConvention):
    """The block expects ``(output, attention weights)``; there are no weights to give."""

    def pack(self, output: Tensor) -> Any:
        return output, None


class ConvertedAttention(nn.Module):
    """A replacement layer behind the calling convention of the attention layer it replaces."""

    def __init__(self, layer: Replacement, convention: CallConvention) -> None:
        super().__init__()
        self.layer = layer
        self.convention = convention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.convention.pack(self.layer(self.convention.tokens(args, kwargs)))


class AttentionAdapter(ABC):
    """One attention class of one library."""

    #: Shown in tables and errors, for example ``"timm Attention"``.
    name: str

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is this adapter's class (exactly: a subclass may compute something else)."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why this instance cannot be replaced, as a sentence, or None."""
        return None

    @abstractmethod
    def weights(self, module: nn.Module) -> AttentionWeights:
        """The layer's projections."""

    def convention(self, module: nn.Module) -> CallConvention:
        """How the layer is called."""
        return CallConvention()


@dataclass(frozen=True)
class BlockSite:
    """One transformer block, ``mid = t + s1 * attention(norm(t)); out = mid + s2 * mlp(norm(mid))``.

    Args:
        name, attention_name: dotted paths from the model's root.
        attention_scale, mlp_scale: LayerScale ``(D,)`` or None for 1.
        mlp_out: the linear layer that writes the MLP's result to the residual stream, or None if unknown.
        pre_norm: whether the equation above holds; error compensation needs it.
    """

    name: str
    module: nn.Module
    attention_name: str
    attention: nn.Module
    attention_scale: Tensor | None = None
    mlp_out: nn.Linear | None = None
    mlp_scale: Tensor | None = None
    pre_norm: bool = True


@dataclass(frozen=True)
class BackboneLayout:
    """A Vision Transformer as dwattn sees it.

    Args:
        family: for tables, for example ``"timm VisionTransformer"``.
        name: dotted path of the backbone inside the user's model, ``""`` for the model itself.
        blocks: in depth order.
        num_prefix: CLS and register tokens ``P``.
        grid: patch grid ``(H, W)`` of the configured image size, or None where there is none.
        patch_size: ``(rows, columns)`` of a patch in pixels.
        patch_embed: the module that is called with the pixel tensor.
        final_norm: the norm behind the last block, or None.
    """

    family: str
    name: str
    module: nn.Module
    blocks: tuple[BlockSite, ...]
    num_prefix: int
    grid: Grid | None
    patch_size: tuple[int, int]
    patch_embed: nn.Module
    final_norm: nn.Module | None = None

    def grid_of(self, height: int, width: int) -> Grid:
        """Patch grid of an image of ``height`` x ``width`` pixels.

        Raises:
            DataError: the image is smaller than one patch.
        """
        grid = (height // self.patch_size[0], width // self.patch_size[1])
        if min(grid) < 1:
            raise DataError(
                f"An image of {height} x {width} pixels is smaller than one {self.patch_size[0]} x "
                f"{self.patch_size[1]} patch."
            )
        return grid

    def geometry(self) -> Geometry:
        """Geometry of the configured image size.

        Raises:
            UnsupportedAttentionError: the model fixes no image size.
        """
        if self.grid is None:
            raise UnsupportedAttentionError(
                f"{self.family} fixes no image size; pass grid=(height, width) in patches, or dynamic_grid=True."
            )
        return Geometry(self.grid[0], self.grid[1], self.num_prefix)


class BackboneAdapter(ABC):
    """One model class of one library."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is a backbone this adapter can describe."""

    @abstractmethod
    def layout(self, name: str, module: nn.Module) -> BackboneLayout:
        """Describe the backbone; ``name`` is its dotted path in the user's model.

        Raises:
            UnsupportedAttentionError: by name and with the reason, when nothing in it can be replaced.
        """
