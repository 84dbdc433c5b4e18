"""The token streams of the original and of the converted model, block by block.

Calibration does not run the whole model for each block: the tokens that enter block ``i`` are kept for all calibration
images, once those of the original model and once those of the converted one, and both are moved through one block at
a time. Blocks are run as private fp32 copies, so the user's model stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dwattn.adapters import BackboneLayout, BlockSite, CallConvention
from dwattn.amp import Amp, autocast
from dwattn.errors import CalibrationError
from dwattn.rotary import Rotary
from dwattn.untouched import deep_copy


class _Captured(Exception):
    """Ends a forward pass early once what it was run for is known."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments, besides the tokens, with which the model calls a block: recorded and replayed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    token_key: str | None

    @classmethod
    def noted(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """The tokens ``(B, N, D)`` that a block was called with, and the rest of the call."""
        args, key = tuple(map(_only, args)), None
        if not args:
            key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        tokens: Tensor = kwargs[key] if key else args[0]
        return tokens, cls(args[1:], {k: v for k, v in kwargs.items() if k != key}, key)

    def for_any_images(self, images: int) -> BlockCall:
        """The same call for any number of images; it was recorded with ``images``.

        Raises:
            CalibrationError: an argument has a different value for each image.
        """
        args = tuple(_for_any_images(value, images) for value in self.args)
        kwargs = {k: _for_any_images(v, images) for k, v in self.kwargs.items()}
        return BlockCall(args, kwargs, self.token_key)

    def __call__(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.token_key is None:
            result = block(tokens, *self.args, **self.kwargs)
        else:
            result = block(*self.args, **{**self.kwargs, self.token_key: tokens})
        output: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return output


def embed(
    model: nn.Module, layout: BackboneLayout, run: Callable[[nn.Module], Any]
) -> tuple[Tensor, BlockCall]:
    """The tokens that enter the first block and the way blocks are called, for one batch.

    ``run(model)`` calls the user's whole model; the pass is ended at the first block.
    """
    seen: list[tuple[Tensor, BlockCall]] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, call = BlockCall.noted(args, kwargs)
        seen.append((tokens, call.for_any_images(len(tokens))))
        raise _Captured

    handle = layout.blocks[0].module.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        run(model)
    except _Captured:
        return seen[0]
    finally:
        handle.remove()
    raise CalibrationError(
        f"The model finished without calling its first block {layout.blocks[0].name!r}; calibration cannot follow it."
    )


def _for_any_images(value: Any, images: int) -> Any:
    """An argument of the blocks for any number of images: of one equal value per image a single one is kept."""
    if not isinstance(value, Tensor) or value.dim() != 1 or len(value) != images or images == 1:
        return value
    if (value != value[0]).any():
        raise CalibrationError(
            f"The model calls its blocks with another value for each image, {value.tolist()}; calibrate on images that "
            "have one value in common."
        )
    return value[:1]


def _only(argument: Any) -> Any:
    """The tokens in a list of one: DINOv3's blocks take lists (of images of several sizes) or tokens alone."""
    return argument[0] if isinstance(argument, list) and len(argument) == 1 else argument


class BlockRunner:
    """A private fp32 copy of one block, in eval mode, with its attention layer exchangeable.

    Args:
        site: the block; call: how the model calls its blocks.
        attention: replaces the block's attention layer in the copy.
        amp: dtype in which the block computes; what it takes and returns is fp32.
    """

    def __init__(
        self,
        site: BlockSite,
        call: BlockCall,
        attention: nn.Module | None = None,
        *,
        amp: Amp = "no",
    ) -> None:
        self.call, self.amp = call, amp
        self.block = _private_copy(site).float().eval()
        self.path = site.attention_name.removeprefix(site.name + ".")
        if attention is not None:
            self._attend_by(attention)
        self._paths = {id(module): name for name, module in site.module.named_modules()}

    @property
    def attention(self) -> nn.Module:
        return self.block.get_submodule(self.path)

    def counterpart(self, module: nn.Module) -> nn.Module:
        """The copy's module that corresponds to ``module`` of the original block."""
        return self.block.get_submodule(self._paths[id(module)])

    def __call__(self, tokens: Tensor) -> Tensor:
        """One block: ``(B, N, D) -> (B, N, D)``."""
        with autocast(self.amp, tokens.device.type, cache=False):
            return self.call(self.block, tokens).float()

    def run_noting_attention(
        self, tokens: Tensor, unpack: Callable[[Any], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the block; its output and what its attention layer returned, both ``(B, N, D)``."""
        seen: list[Tensor] = []
        handle = self.attention.register_forward_hook(
            lambda _, __, result: seen.append(unpack(result).float())
        )
        try:
            return self(tokens), seen[0]
        finally:
            handle.remove()

    def watch(self, tokens: Tensor, *watched: nn.Module) -> tuple[Tensor, list[Tensor]]:
        """Run the block; also the input of each module in ``watched``."""
        inputs: dict[int, Tensor] = {}
        with _input_hooks(watched, lambda module, x: inputs.__setitem__(id(module), x.float())):
            output = self(tokens)
        return output, [inputs[id(module)] for module in watched]

    def attention_input(self, tokens: Tensor) -> Tensor:
        """What the attention layer sees, ``norm(t)``; the block is not run further."""
        return _tokens(*self._attention_call(tokens)).float()

    def rotary(self, tokens: Tensor, convention: CallConvention) -> Rotary | None:
        """The rotary embedding with which the block calls its attention layer for such tokens."""
        return convention.rotary(self._attention_call(tokens)[1])

    def _attention_call(self, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the attention layer; the block is not run further."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Captured

        handle = self.attention.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self(tokens)
        except _Captured:
            return seen[0]
        finally:
            handle.remove()
        raise CalibrationError(f"The block never called its attention layer {self.path!r}.")

    def attend(self, tokens: Tensor, unpack: Callable[[Any], Tensor]) -> Tensor:
        """What the attention layer returns, ``(B, N, D)`` after Wo; the block is not run further."""
        outputs: list[Tensor] = []

        def stop(_: nn.Module, __: Any, result: Any) -> None:
            outputs.append(unpack(result).float())
            raise _Captured

        handle = self.attention.register_forward_hook(stop)
        try:
            self(tokens)
        except _Captured:
            return outputs[0]
        finally:
            handle.remove()
        raise CalibrationError(f"The block never called its attention layer {self.path!r}.")

    def after_attention(
        self, tokens: Tensor, attention: Tensor, convention: CallConvention, *watched: nn.Module
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`watch` with the output of the attention layer given, ``(B, N, D)``."""
        layer = self.attention
        self._attend_by(_Given(attention, convention))
        try:
            return self.watch(tokens, *watched)
        finally:
            self._attend_by(layer)

    def _attend_by(self, layer: nn.Module) -> None:
        parent, _, leaf = self.path.rpartition(".")
        setattr(self.block.get_submodule(parent), leaf, layer)


def _private_copy(site: BlockSite) -> nn.Module:
    try:
        return deep_copy(site.module)
    except Exception as error:
        raise CalibrationError(
            f"{site.name} could not be copied for calibration ({error}). Remove from its modules what cannot be "
            "copied: handles, locks, tensors with a history in lists or dictionaries."
        ) from error


class _Given(nn.Module):
    """An attention layer whose output is known."""

    def __init__(self, output: Tensor, convention: CallConvention) -> None:
        super().__init__()
        self.output, self.convention = output, convention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.convention.pack(self.output)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tokens: Tensor = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    return tokens


@contextmanager
def _input_hooks(
    modules: tuple[nn.Module, ...], record: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(module, _tokens(args, kwargs))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
