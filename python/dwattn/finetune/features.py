"""What distillation compares: a model's final tokens, its tokens after chosen blocks, and its output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.adapters import ConvertedAttention, adapter_for, describe
from dwattn.calibration.streams import BlockCall
from dwattn.conversion import find_conversions, restore
from dwattn.data import Batch
from dwattn.errors import TrainingError


@dataclass(frozen=True)
class Features:
    """Of a batch.

    Args:
        tokens: ``(B, N, D)`` after the final norm (after the last block where no norm sees all tokens).
        blocks: ``(B, N, D)`` after each of the chosen blocks.
        output: the model's output as one tensor with ``B`` rows, or None if it was not asked for.
        calls: how the model called its blocks, one after the other: what they got beside the tokens, such as rotary
            positions.
    """

    tokens: Tensor
    blocks: tuple[Tensor, ...] = ()
    output: Tensor | None = None
    calls: tuple[BlockCall, ...] = ()

    def tensors(self) -> list[Tensor]:
        """All of them, tokens first."""
        return [self.tokens, *self.blocks, *([] if self.output is None else [self.output])]

    def like(self, tensors: Sequence[Tensor]) -> Features:
        """The same tensor fields with other tensors, in the order of :meth:`tensors`."""
        count = len(self.blocks)
        return Features(
            tensors[0],
            tuple(tensors[1 : 1 + count]),
            None if self.output is None else tensors[1 + count],
        )


class _Done(Exception):
    """Ends a forward pass once the tokens are known and nothing else is wanted."""


class FeatureReader:
    """Runs a model and notes its features; the model's own code is not changed.

    Args:
        model: a ViT or something that contains one.
        blocks: indices of blocks whose outputs are wanted, negative ones from the end.
        output: gets a tensor out of the model's result, or None if the output is not wanted; the pass
            then ends after the final norm.

    Raises:
        TrainingError: a block that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[int] = (),
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        layout = describe(model)
        self._layout = layout
        depth = len(layout.blocks)
        wrong = [index for index in blocks if not -depth <= index < depth]
        if wrong:
            raise TrainingError(
                f"There are no blocks {wrong}: the model has blocks 0 to {depth - 1}."
            )
        self.num_prefix = layout.num_prefix
        self.patch_size = layout.patch_size
        self._model, self._output = model, output
        self._blocks = [layout.blocks[index].module for index in blocks]
        self._all = [site.module for site in layout.blocks]
        self._norm = layout.final_norm

    def __call__(self, batch: Batch) -> Features:
        """One forward pass, with gradients where they are enabled.

        Raises:
            TrainingError: the model never called its blocks.
        """
        seen: dict[int, Tensor] = {}
        calls: list[BlockCall] = []
        last = self._all[-1]
        handles = [m.register_forward_hook(_note(seen)) for m in {*self._blocks, last}]
        handles += [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append(BlockCall.noted(args, kwargs)[1]),
                with_kwargs=True,
            )
            for block in {*self._all}
        ]
        if self._norm is not None:
            handles.append(self._norm.register_forward_hook(self._note_norm(seen)))
        result = None
        try:
            with self._layout.in_raster_order():
                result = batch.call(self._model)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if id(last) not in seen:
            raise TrainingError("The model finished without calling its last block.")
        tokens = seen.get(id(self._norm), seen[id(last)])
        blocks = tuple(seen[id(block)] for block in self._blocks)
        output = None if self._output is None else self._output(result)
        return Features(tokens, blocks, output, tuple(calls))

    def _note_norm(self, seen: dict[int, Tensor]) -> Callable[..., None]:
        note = _note(seen)

        def hook(module: nn.Module, args: Any, result: Any) -> None:
            # Some models normalise the CLS token alone.
            if isinstance(result, Tensor) and result.dim() == 3:
                note(module, args, result)
                if self._output is None:
                    raise _Done

        return hook


def _note(seen: dict[int, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any, result: Any) -> None:
        seen[id(module)] = result[0] if isinstance(result, (tuple, list)) else result

    return hook


def first_tensor(result: Any) -> Tensor:
    """A model's main output: the tensor itself, ``logits``, or the first tensor of a container.

    Raises:
        TrainingError: there is none.
    """
    if isinstance(result, Tensor):
        return result
    named = (
        result if isinstance(result, dict) else vars(result) if hasattr(result, "__dict__") else {}
    )
    if isinstance(named.get("logits"), Tensor):
        return named["logits"]
    values = named.values() if named else result if isinstance(result, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TrainingError(
        f"The model returns a {type(result).__name__} without tensors; pass output=function to pick one."
    )


def token_width(model: nn.Module) -> int:
    """Width ``D`` of a ViT's tokens."""
    return _sizes(model)[0]


def head_count(model: nn.Module) -> int:
    """Heads of an attention layer."""
    return _sizes(model)[1]


def _sizes(model: nn.Module) -> tuple[int, int]:
    for site in describe(model).blocks:
        if isinstance(site.attention, ConvertedAttention):
            return site.attention.layer.dim, site.attention.layer.num_heads
        adapter = adapter_for(site.attention)
        if adapter is not None and adapter.refusal(site.attention) is None:
            weights = adapter.weights(site.attention)
            return weights.dim, weights.num_heads
    raise TrainingError(f"No attention layer of {type(model).__name__} tells its width.")


def teacher(model: nn.Module) -> nn.Module:
    """A frozen copy of the original of a converted model, in eval mode.

    Take it before training: what :func:`dwattn.replace` changed is undone in the copy, what training changes
    afterwards in layers that were not replaced is not. A model that is not converted is copied as it is.

    Raises:
        TrainingError: the model was loaded from a file, which does not hold the originals.
    """
    records = [record for _, _, record in find_conversions(model)]
    source = next((record.source for record in records if record.source is not None), None)
    if source is not None:
        raise TrainingError(
            f"The model was loaded from {source!r}, which does not hold the original attention weights; "
            f"build the original model anew and pass it as teacher=."
        )
    original = copy.deepcopy(model)
    if records:
        restore(original)
    return original.requires_grad_(False).eval()


@torch.no_grad()
def teach(reader: FeatureReader, batch: Batch) -> Features:
    """Features without gradients."""
    return reader(batch)
