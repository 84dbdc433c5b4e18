"""What dwattn needs to know of a library's Vision Transformer, as data and two small interfaces.

An :class:`AttentionAdapter` knows one attention class: its weights, why it may have to be refused,
how it is called. A :class:`BackboneAdapter` knows one model class: its blocks in depth order and
its patch grid. Everything else in the package works on :class:`BackboneLayout` and never sees a
library's classes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from dwattn.adapters.unsupported import is_attention_name
from dwattn.errors import DataError, UnsupportedAttentionError
from dwattn.geometry import Geometry
from dwattn.projections import AttentionWeights, is_sharded, is_wrapped
from dwattn.rotary import Rotary
from dwattn.token_grid import Grid
from dwattn.variants import Replacement


def defined_in(module: nn.Module, package: str, *class_names: str) -> bool:
    """Whether the module's class, or a base of it, is ``package...class_name``."""
    return any(
        cls.__name__ in class_names
        and (cls.__module__ == package or cls.__module__.startswith(package + "."))
        for cls in type(module).__mro__
    )


def kind(module: nn.Module) -> str:
    """The name of the module's class, also where FSDP2 (``fully_shard``) put a subclass of its own in the class's place."""
    name = type(module).__name__
    sharded = any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
    return name.removeprefix("FSDP") if sharded else name


def in_repository(module: nn.Module, name: str) -> bool:
    """Whether the class lives in a package such as ``name.layers`` or ``some_model.name_layers``: code of a repository
    that is no installed library.
    """
    parts = type(module).__module__.split(".")
    return parts[0] not in ("transformers", "timm") and any(p.startswith(name) for p in parts)


#: Where wrappers of single layers keep what they wrap, and what does the same without wrapping.
_WRAPPERS = {
    "_orig_mod": "block.compile() compiles in place and needs no wrapper",
    "_checkpoint_wrapped_module": "set_grad_checkpointing() of timm and gradient_checkpointing_enable() of transformers "
    "need no wrapper",
    "_fsdp_wrapped_module": "or convert the model before it is sharded",
}


def wrapped_layer(path: str, backbone: nn.Module) -> str | None:
    """A sentence where a part of the backbone with an attention layer is in a wrapper (``torch.compile(block)``, activation
    checkpointing): reading goes through it, but what is set stays on it and never runs.

    Args:
        path: of the backbone in the user's model.
    """
    for name, module in backbone.named_modules(prefix=path):
        inner = next((key for key in _WRAPPERS if name != path and key in module._modules), None)
        if inner and any(is_attention_name(type(m).__name__) for m in module.modules()):
            return (
                f"{name} is in the wrapper {type(module).__name__}, behind which no layer can be exchanged. Put {name}.{inner} "
                f"in its place, and wrap it again afterwards; {_WRAPPERS[inner]}."
            )
    return None


def refuse_projections(*layers: object) -> str | None:
    """A sentence unless all are plain linear layers: LoRA and quantised layers compute something
    else.
    """
    for layer in layers:
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            return (
                f"One of its projections is a {kind} instead of a plain nn.Linear; "
                "merge adapters or dequantise it first."
            )
        if is_sharded(layer.weight):
            return (
                "The weight of one of its projections is a DTensor, of which this process has a part; score and replace "
                "before the model is sharded (fully_shard)."
            )
        if is_wrapped(layer.weight):
            return (
                f"The weight of one of its projections is a {type(layer.weight).__name__} instead of plain "
                "numbers; replace its layers first and quantise then, or dequantise it."
            )
        if layer.weight.is_meta:
            return "Its weights are on the meta device; load the model's weights first."
    return None


class CallConvention:
    """How a block calls its attention layer: tokens in, tensor out. Subclasses change what they
    must.
    """

    #: Keyword arguments that carry a mask or bias; they must be absent or None.
    mask_arguments: tuple[str, ...] = (
        "attn_mask",
        "attention_mask",
        "causal_attention_mask",
        "attn_bias",
        "head_mask",
    )
    #: Keyword arguments that carry a rotary embedding which this convention cannot read.
    foreign_rotary: tuple[str, ...] = ("position_embeddings", "rope")
    #: Of models whose configuration may ask for attention weights in place of the call.
    config: Any = None
    #: Whether the library gives every layer a mask while a model is exported, whoever asked for one.
    masks_exports: bool = False

    def rotary(self, kwargs: dict[str, Any]) -> Rotary | None:
        """The rotary position embedding of a call, or None."""
        return None

    def rotary_arguments(self, patches: int, head_dim: int, like: Tensor) -> dict[str, Any]:
        """Keyword arguments with some rotary embedding of so many patches, to call a layer alone; for
        most none. ``like`` has device and dtype.
        """
        return {}

    def call(self, attention: nn.Module, tokens: Tensor, **kwargs: Any) -> Any:
        """Call an attention layer alone, as its block does."""
        return attention(tokens, **kwargs)

    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The ``(B, N, D)`` tokens of a call.

        Raises:
            UnsupportedAttentionError: the call has a mask, a bias or a rotary embedding, is causal,
                or asks for the attention weights.
        """
        for name in self.mask_arguments:
            if self._may_hide(kwargs.get(name)):
                if type(kwargs[name]).__name__ == "BlockMask":
                    raise cannot(
                        f"with {name}=..., a block mask of flex attention",
                        "cannot apply masks; transformers makes one at every call, also where nothing is "
                        "masked, until model.set_attn_implementation('sdpa')",
                    )
                raise cannot(
                    f"with {name}=...",
                    "aggregates a fixed 3x3 neighbourhood and cannot apply masks",
                )
        if kwargs.get("is_causal"):
            raise cannot("with is_causal=True", "has no causal order")
        if any(kwargs.get(name) is not None for name in self.foreign_rotary):
            raise cannot(
                "with a rotary position embedding", "does not know its form from this class"
            )
        if kwargs.get("output_attentions"):
            raise cannot("with output_attentions=True", "forms no attention weights")
        tokens, rest = (
            (args[0], args[1:]) if args else (kwargs.get("hidden_states", kwargs.get("x")), ())
        )
        # Positions after the tokens are masks, biases and flags in every library: only None and
        # False are neutral.
        hiding = [argument for argument in rest if self._may_hide(argument)]
        if hiding:
            raise cannot(
                f"with a {type(hiding[0]).__name__} after the tokens",
                "cannot apply a mask, bias or causal flag",
            )
        if not isinstance(tokens, Tensor):
            raise UnsupportedAttentionError(
                f"A replaced layer expects one tensor of tokens, got {type(tokens).__name__}; "
                "nested or packed inputs are not supported."
            )
        return tokens

    def _may_hide(self, argument: Any) -> bool:
        """Whether an argument in the place of a mask, bias or flag may keep tokens from each other."""
        if argument is None or argument is False:
            return False
        if not (
            self.masks_exports and isinstance(argument, Tensor) and torch.compiler.is_exporting()
        ):
            return True
        # Its values are not known yet. The exported program looks at them when it runs.
        kept = argument if argument.dtype == torch.bool else argument == 0
        torch._assert_async(kept.all(), "A replaced layer cannot apply masks.")
        return False

    def pack(self, output: Tensor) -> Any:
        """Wrap the layer's output as the block expects it."""
        return output

    def unpack(self, result: Any) -> Tensor:
        """The inverse of :meth:`pack`, for results of the original layer."""
        tensor: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return tensor


def cannot(how: str, why: str) -> UnsupportedAttentionError:
    """The error for a call that a replaced layer cannot compute."""
    return UnsupportedAttentionError(
        f"The layer was called {how}: a replaced layer {why}. Call the model without it, or leave "
        "this block out of the plan."
    )


class TupleConvention(CallConvention):
    """The block expects ``(output, attention weights)``; there are no weights to give."""

    def pack(self, output: Tensor) -> Any:
        return output, None


class ConvertedAttention(nn.Module):
    """A replacement layer that is called, and answers, like the attention layer it replaces."""

    def __init__(self, layer: Replacement, convention: CallConvention) -> None:
        super().__init__()
        self.layer = layer
        self.convention = convention
        # What dwattn.fingerprint knew of the replaced layer: a converted model keeps its identity.
        self.original_print: dict[str, Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        traced = next((a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
        if traced is not None:
            return self._as_leaf(traced.tracer, args, kwargs)
        tokens, rotary = self.convention.tokens(args, kwargs), self.convention.rotary(kwargs)
        configured = getattr(self.convention.config, "output_attentions", False)
        if kwargs.get("output_attentions", configured):
            raise cannot("with config.output_attentions=True", "forms no attention weights")
        turned = {} if rotary is None else {"rotary": rotary}
        return self.convention.pack(self.layer(tokens, **turned))

    def _as_leaf(self, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node of a graph of ``torch.fx``, which cannot look into a layer that checks its call."""
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)


class AttentionAdapter(ABC):
    """One attention class of one library."""

    #: Shown in tables and errors, for example ``"timm Attention"``.
    name: str

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is this adapter's class (exactly: a subclass may compute something
        else).
        """

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
    """One transformer block, ``mid = t + s1 * attention(norm(t)); out = mid + s2 *
    mlp(norm(mid))``.

    Args:
        name, attention_name: dotted paths from the model's root.
        attention_scale, mlp_scale: LayerScale ``(D,)`` or None for 1.
        mlp_out: the linear layer that writes the MLP's result to the residual stream, or None if
            unknown.
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


class RasterOverride(Protocol):
    """A callable that takes the place of one method of one module instance."""

    attribute: str

    @property
    def __call__(self) -> Callable[..., Any]: ...


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
        final_norm: the norm after the last block, or None.
        padded: whether images are padded up to whole patches, instead of cut down to them.
        raster_order: ``(module, override)`` of a model whose patches would otherwise arrive in
            another order: while ``override`` is set on the module as its attribute
            ``override.attribute``, they do not.
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
    padded: bool = False
    raster_order: tuple[nn.Module, RasterOverride] | None = None

    @property
    def patch_convolution(self) -> nn.Conv2d | None:
        """The convolution that makes patches of pixels, where the model has one."""
        return next((m for m in self.patch_embed.modules() if isinstance(m, nn.Conv2d)), None)

    @property
    def image_channels(self) -> int:
        """Channels of the images that the patch embedding takes."""
        convolution = self.patch_convolution
        return 3 if convolution is None else convolution.in_channels

    @contextlib.contextmanager
    def in_raster_order(self) -> Iterator[None]:
        """Hold the patches in row-major order while the model is observed; a no-op for nearly every
        model.
        """
        if self.raster_order is None or self.raster_order[1].attribute in vars(
            self.raster_order[0]
        ):
            yield
            return
        module, override = self.raster_order
        setattr(module, override.attribute, override)
        try:
            yield
        finally:
            delattr(module, override.attribute)

    def grid_of(self, height: int, width: int) -> Grid:
        """Patch grid of an image of ``height`` x ``width`` pixels.

        Raises:
            DataError: the image is smaller than one patch.
        """
        rows, columns = self.patch_size
        if self.padded:
            height, width = height + rows - 1, width + columns - 1
        grid = (height // rows, width // columns)
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
                f"{self.family} fixes no image size; pass grid=(height, width) in patches, or "
                "dynamic_grid=True."
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
            UnsupportedAttentionError: by name and with the reason, when nothing in it can be
                replaced.
        """
