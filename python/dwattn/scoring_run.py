"""One call of ``score``: the layers it measures, and how it observes a model without changing it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn import data as images
from dwattn.adapters import BackboneLayout, BlockSite, CallConvention, adapter_for, refusal
from dwattn.errors import DataError, DwattnError, ScoreError, UnsupportedAttentionError
from dwattn.finite import all_finite
from dwattn.geometry import Geometry
from dwattn.projections import AttentionWeights, is_wrapped
from dwattn.ranks import Ranks
from dwattn.reference import merge_heads, split_heads
from dwattn.residual import (
    Sample,
    StaticFit,
    image_keys,
    residual_shares,
    sample_positions,
    unexplained,
)
from dwattn.rotary import Rotary, placed
from dwattn.scores import LayerScore, map_statistics
from dwattn.untouched import instance_forward
from dwattn.variance import AttentionVariance


@dataclass(eq=False)
class LayerRun:
    """One layer to be scored, and its statistics."""

    site: BlockSite
    block: int
    weights: AttentionWeights
    convention: CallConvention
    variance: AttentionVariance
    fit: StaticFit | None = None
    #: Sum over images of the mean over patches of ``1 / var_D(t)``, where t is the residual stream that enters the block;
    #: and the number of images.
    stream: tuple[float, int] = (0.0, 0)

    def note_stream(self, tokens: Tensor, num_prefix: int) -> None:
        """Observe the residual stream ``(B, N, D)`` that enters the block."""
        patches = tokens[:, num_prefix:].float()
        # Several times faster than var().
        variance = (patches - patches.mean(-1, keepdim=True)).square_().mean(-1)
        tiny = torch.finfo(variance.dtype).tiny
        inverse = variance.clamp_min(tiny).reciprocal().mean(1)
        self.stream = (self.stream[0] + float(inverse.sum()), self.stream[1] + len(tokens))

    def nbytes(self, tokens: int, residual: bool) -> tuple[int, int]:
        """Bytes of its statistics: maps and Gram matrices."""
        w, v = self.weights, self.variance
        maps = AttentionVariance.nbytes(w.num_heads, tokens, v.num_prefix, v.entries)
        return maps, StaticFit.nbytes(w.channels, v.num_prefix) if residual else 0

    def allocate(self, tokens: int, maps: Tensor, grams: Tensor) -> None:
        """Start with empty statistics in these fp64 zeros; no Gram matrices if ``grams`` is empty."""
        w = self.weights
        self.variance.allocate(w.num_heads, tokens, maps.device, maps)
        if len(grams):
            self.fit = StaticFit(w.channels, self.variance.num_prefix, grams.device, grams)

    def _projections(self, tokens: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values ``(B, N, C)``; a fused weight makes them in one product."""
        w = self.weights
        weight = joined(w.wq, w.wk, w.wv)
        biases = [b for b in (w.bq, w.bk, w.bv) if b is not None]
        bias = joined(*biases) if len(biases) == 3 else None
        if weight is None or (biases and bias is None):
            pairs = ((w.wq, w.bq), (w.wk, w.bk), (w.wv, w.bv))
            return [F.linear(tokens, weight, bias) for weight, bias in pairs]
        return F.linear(tokens, weight, bias).chunk(3, dim=-1)

    def attention(
        self, tokens: Tensor, sample: Sample | None, rotary: Rotary | None = None
    ) -> Tensor:
        """What the layer itself computes, ``(B, N, D)``; the statistics are updated on the way."""
        # Queries, keys and values are gone before the output is made: their room is used again.
        rows = self._rows(tokens, sample, rotary)
        return F.linear(rows, self.weights.wo, self.weights.bo)

    def _rows(self, tokens: Tensor, sample: Sample | None, rotary: Rotary | None) -> Tensor:
        """Attention output before Wo, ``(B, N, C)``."""
        w = self.weights
        q, k, v = (split_heads(t, w.num_heads) for t in self._projections(tokens))
        q, k = placed(q, k, w, rotary)
        rows = merge_heads(self.variance.attend(q, k, v, w.scale))
        if sample is not None:
            assert self.fit is not None
            self.fit.update(merge_heads(v), rows, sample)
        return rows

    def result(self, geometry: Geometry, keep_maps: bool) -> LayerScore:
        """The scores, on the CPU."""
        v, w = self.variance, self.weights
        mean = v.mean if v.entries == "patches" else v.mean[:, v.num_prefix :, v.num_prefix :]
        kernel, uniform = map_statistics(mean, geometry.height, geometry.width)
        made = LayerScore(
            name=self.site.attention_name,
            block=self.block,
            sigma=v.sigma().cpu(),
            mean_kernel=kernel.cpu(),
            prefix_mass=v.prefix_mean.mean(1).cpu(),
            uniform=uniform.cpu(),
            mean_map=v.mean.float().cpu() if keep_maps else None,
            std_map=v.std.float().cpu() if keep_maps else None,
        )
        if not all_finite(made.sigma):
            raise ScoreError(
                f"{made.name}: the statistics of its attention are not finite; look for huge "
                "activations."
            )
        if self.fit is not None:
            error, power = (x.cpu() for x in unexplained(self.fit.grams))
            weight = w.wo.double().square().sum(0).cpu()
            made.residual, made.block_residual = residual_shares(error, power, weight, w.num_heads)
            made.perturbation = self._perturbation(error)
            plain = torch.ones_like(weight)
            made.residual_plain, made.block_residual_plain = residual_shares(
                error, power, plain, w.num_heads
            )
        return made

    def _perturbation(self, error: Tensor) -> Tensor:
        """Per head, the mean square that the unexplained part adds to a token of unit variance:
        ``(n_h,)``.
        """
        assert self.fit is not None
        w, (inverse, seen) = self.weights, self.stream
        constant = -2  # the feature that is 1 everywhere counts the samples
        samples = float(self.fit.grams[:, 0, constant, constant].sum())
        wo = w.wo.double()
        if self.site.attention_scale is not None:
            wo = wo * self.site.attention_scale.double()[:, None]
        added = error * wo.square().sum(0).cpu() / (samples * w.dim)
        return added.view(w.num_heads, -1).sum(1) * (inverse / max(seen, 1))


def joined(first: Tensor, *others: Tensor) -> Tensor | None:
    """The tensor of which these are consecutive equal parts in memory (``chunk`` along dim 0), or
    None.
    """
    step = first.numel() * first.element_size()
    for index, other in enumerate(others, start=1):
        same = other.shape == first.shape and other.is_contiguous() and other.dtype == first.dtype
        if not same or other.data_ptr() != first.data_ptr() + index * step:
            return None
    last = first.storage_offset() + (len(others) + 1) * first.numel()
    storage = first.untyped_storage()
    if not first.is_contiguous() or last * first.element_size() > storage.nbytes():
        return None
    shape = (first.shape[0] * (len(others) + 1), *first.shape[1:])
    return first.as_strided(shape, first.stride())


def scoreable(layout: BackboneLayout, entries: str) -> tuple[list[LayerRun], dict[str, str]]:
    """The layers of ``layout`` in depth order, and the refused ones with the reason.

    Raises:
        UnsupportedAttentionError: all of them are refused.
        ScoreError: attention weights that are not finite.
    """
    layers: list[LayerRun] = []
    refused: dict[str, str] = {}
    for block, site in enumerate(layout.blocks):
        _require_finite(site)
        reason, adapter = refusal(site.attention), adapter_for(site.attention)
        if reason is not None or adapter is None:
            refused[site.attention_name] = reason or "No adapter knows its class."
            continue
        weights, convention = adapter.weights(site.attention), adapter.convention(site.attention)
        state = AttentionVariance(layout.num_prefix, entries)
        layers.append(LayerRun(site, block, weights, convention, state))
    if not layers:
        raise UnsupportedAttentionError(
            f"No attention layer of this {layout.family} can be scored. "
            f"{'; '.join(f'{name}: {reason}' for name, reason in refused.items())}"
        )
    return layers, refused


def _require_finite(site: BlockSite) -> None:
    for name, parameter in site.attention.named_parameters():
        if not is_wrapped(parameter) and not all_finite(parameter):
            raise ScoreError(
                f"{site.attention_name}: its weight {name} holds NaN or infinite values. Load "
                "intact weights first."
            )


class ScoringRun:
    """State of one call of :func:`score`.

    Args:
        layout: the model; layers: those to score.
        residual, memory_budget, data: as for :func:`score`.

    A pass over the data measures the ``active`` layers; the others are ``waiting`` for a later one.
    """

    def __init__(
        self,
        layout: BackboneLayout,
        layers: list[LayerRun],
        residual: bool,
        memory_budget: int | None,
        data: Any,
    ) -> None:
        self.layout, self.residual, self.memory_budget, self.data = (
            layout,
            residual,
            memory_budget,
            data,
        )
        self.waiting, self.active = layers, list[LayerRun]()
        self.results: list[LayerScore] = []
        self.geometry: Geometry | None = None
        self.sample: Sample | None = None
        self.images = 0  # of the call in progress
        self.seen = 0  # in this pass, by this process
        self.total_images = 0  # in a pass, by all processes
        self.passes = 1

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Observe the patch embedding, and stand in for the forward of each layer instance."""
        with contextlib.ExitStack() as undo:
            hook = self.layout.patch_embed.register_forward_pre_hook(
                self._see_pixels, with_kwargs=True
            )
            undo.callback(hook.remove)
            for layer in self.waiting:
                undo.enter_context(instance_forward(layer.site.attention, self._stand_in(layer)))
                if self.residual:
                    hook = layer.site.module.register_forward_pre_hook(
                        self._see_stream(layer), with_kwargs=True
                    )
                    undo.callback(hook.remove)
            yield

    def _see_stream(self, layer: LayerRun) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [
                y for x in (*args, *kwargs.values()) for y in (x if isinstance(x, list) else [x])
            ]
            tokens = next((x for x in given if isinstance(x, Tensor)), None)
            if tokens is not None and tokens.dim() == 3:
                layer.note_stream(tokens, self.layout.num_prefix)

        return hook

    def start_pass(self) -> None:
        """Forget the images and layers of the pass before."""
        self.seen, self.active = 0, []

    def end_batch(self) -> None:
        """Check that the model showed each image to each layer once."""
        self.sample = None
        if not self.active:
            raise ScoreError(
                f"Calling the {type(self.layout.module).__name__} did not run its attention "
                "layers: pass the model whose forward takes these images."
            )
        for layer in self.active:
            if layer.variance.count != self.seen:
                raise ScoreError(
                    f"{layer.site.attention_name} has seen {layer.variance.count} of {self.seen} "
                    "images; only models whose layers see each image once can be scored."
                )

    def finish_pass(self, ranks: Ranks, keep_maps: bool) -> None:
        """Merge the processes, turn the statistics of the active layers into scores and free them."""
        assert self.geometry is not None
        names = [layer.site.attention_name for layer in self.active]
        ranks.require_equal((self.geometry, names), "image sizes or layers")
        device = self.active[0].variance.mean.device
        total = int(ranks.sum(torch.tensor([self.seen], dtype=torch.int64, device=device)).item())
        if total < 2:
            raise ScoreError(
                f"The data held {total} image: the variance between images needs at least 2, and "
                "about 100 for a stable order of the blocks."
            )
        if self.total_images and total != self.total_images:
            raise DataError(
                f"The data held {total} images when it was read again and {self.total_images} "
                "before; it must not change between passes."
            )
        self.total_images = total
        for layer in self.active:
            if ranks.size > 1:
                layer.variance.merge_ranks()
                if layer.fit is not None:
                    ranks.sum(layer.fit.grams)
                    level = torch.tensor(layer.stream, dtype=torch.float64, device=device)
                    inverse, seen = ranks.sum(level).tolist()
                    layer.stream = (inverse, int(seen))
            self.results.append(layer.result(self.geometry, keep_maps))
            layer.variance = AttentionVariance(self.layout.num_prefix, layer.variance.entries)
            layer.fit = None
        self.waiting = [layer for layer in self.waiting if layer not in self.active]

    def _see_pixels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = next(
            (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4), None
        )
        if pixels is None:
            raise DataError(
                f"The patch embedding {type(module).__name__} was not called with (B, 3, H, W) "
                "pixels."
            )
        height, width = pixels.shape[2:]
        geometry = Geometry(*self.layout.grid_of(height, width), self.layout.num_prefix)
        if self.geometry is not None and geometry != self.geometry:
            raise DataError(
                f"Images of {height} x {width} pixels ({geometry.height} x {geometry.width} "
                f"patches) came after images of {self.geometry.height} x {self.geometry.width} "
                "patches: attention maps of different sizes cannot be pooled. Resize all images "
                "to one size."
            )
        self.geometry = geometry
        self.images = len(pixels)
        self.seen += self.images
        if self.residual:
            self.sample = sample_positions(image_keys(pixels), geometry, pixels.device)

    def _stand_in(self, layer: LayerRun) -> Callable[..., Any]:
        original = layer.site.attention.forward
        name = layer.site.attention_name

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                self._choose_layers()
            if layer not in self.active:
                return original(*args, **kwargs)
            try:
                tokens = layer.convention.tokens(args, kwargs)
                self._check_tokens(tokens)
                rotary = layer.convention.rotary(kwargs)
                return layer.convention.pack(layer.attention(tokens, self.sample, rotary))
            except DwattnError as error:
                raise type(error)(f"{name}: {error}") from error

        if "torch._dynamo" in sys.modules:
            # Blocks may be compiled. Without that check the compiler itself would be imported,
            # which takes seconds and 60 MB.
            return cast("Callable[..., Any]", torch.compiler.disable(forward))
        return forward

    def _check_tokens(self, tokens: Tensor) -> None:
        if self.geometry is None or len(tokens) != self.images:
            raise ScoreError(
                f"It was called with {len(tokens)} sequences for {self.images} images; only models "
                "whose layers see each image once can be scored."
            )
        self.geometry.check(tokens.shape[1])

    def _choose_layers(self) -> None:
        """Take as many waiting layers as the budget allows; only now is the size of their maps
        known.
        """
        if self.geometry is None:
            raise ScoreError("The attention layers ran before the patch embedding saw any pixels.")
        tokens = self.geometry.num_tokens
        sizes = [sum(layer.nbytes(tokens, self.residual)) for layer in self.waiting]
        budget = sum(sizes) if self.memory_budget is None else self.memory_budget
        if max(sizes) > budget:
            raise ScoreError(
                f"memory_budget={budget} bytes (--memory-budget {budget / 2**20:.3g} in MB) is less than the {max(sizes)} "
                f"bytes ({max(sizes) / 2**20:.1f} MB) that the statistics of one layer of {tokens} tokens need. Raise it, "
                "or score smaller images."
            )
        groups: list[list[LayerRun]] = [[]]
        used = 0
        for layer, size in zip(self.waiting, sizes, strict=True):
            if used + size > budget:
                groups.append([])
                used = 0
            groups[-1].append(layer)
            used += size
        if len(groups) > 1:
            images.require_reiterable(
                self.data,
                f"memory_budget={budget} bytes splits the layers over {len(groups)} passes",
            )
        if not self.results:
            self.passes = len(groups)
        self.active = groups[0]
        self._allocate(tokens)

    def _allocate(self, tokens: int) -> None:
        """Room for the statistics of the active layers, in one allocation."""
        parts = [size // 8 for layer in self.active for size in layer.nbytes(tokens, self.residual)]
        device = self.active[0].weights.wv.device
        storage = torch.zeros(sum(parts), dtype=torch.float64, device=device).split(parts)
        for layer, maps, grams in zip(self.active, storage[::2], storage[1::2], strict=True):
            layer.allocate(tokens, maps, grams)
