"""Measured latencies of a model's attention layers and their replacements on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dwattn.adapters import (
    AttentionAdapter,
    BackboneLayout,
    BlockSite,
    ConvertedAttention,
    adapter_for,
    describe,
    refusal,
)
from dwattn.attention import EnsembleDWAttention
from dwattn.errors import DwattnError
from dwattn.projections import AttentionWeights
from dwattn.replacements import Rank, check_rank, rank_width
from dwattn.token_grid import Grid
from dwattn.untouched import untouched, unwrap
from dwattn.variants import build_replacement

K = TypeVar("K")
#: Untimed rounds, and timed rounds that are made whatever they take.
WARM_UP, LEAST_ROUNDS = 2, 5


@dataclass(frozen=True)
class LayerLatency:
    """Milliseconds of one attention layer, its whole replacement, and (``dw``) half of its heads
    replaced.
    """

    num_heads: int
    attention: float
    replaced: float
    half_replaced: float | None = None

    def saved(self, heads: int | None = None) -> float:
        """Milliseconds saved by replacing ``heads`` heads (None: all), interpolated between the
        measured points.
        """
        if heads is None or heads == self.num_heads:
            return self.attention - self.replaced
        middle = (
            (self.attention + self.replaced) / 2
            if self.half_replaced is None
            else self.half_replaced
        )
        half = self.num_heads // 2 or 1
        if heads <= half:
            return (self.attention - middle) * heads / half
        share = (heads - half) / (self.num_heads - half)
        return self.attention - middle + (middle - self.replaced) * share


@dataclass(frozen=True)
class LatencyTable:
    """Medians in milliseconds: the whole model, and each attention layer by name.

    Args:
        total: one forward pass of the model.
        layers: by attention layer name; refused layers are absent.
        batch_size, grid, dtype, device, threads, variant: what was measured.
    """

    total: float
    layers: dict[str, LayerLatency]
    batch_size: int
    grid: Grid
    dtype: str
    device: str
    threads: int
    variant: str

    def estimate(self, replaced: Mapping[str, int | None]) -> float:
        """Milliseconds of a forward pass with these layers replaced.

        Args:
            replaced: number of replaced heads by layer name, None for the whole layer.

        Raises:
            DwattnError: a layer that was not measured.
        """
        unknown = sorted(set(replaced) - set(self.layers))
        if unknown:
            raise DwattnError(
                f"The latency table has no layer {', '.join(unknown)}; it holds "
                f"{', '.join(self.layers)}. Measure this model with "
                "dwattn.latency.measure_latency(model)."
            )
        return self.total - sum(self.layers[name].saved(heads) for name, heads in replaced.items())

    def speedup(self, replaced: Mapping[str, int | None]) -> float:
        """Estimated speedup of the whole model; arguments as for :meth:`estimate`."""
        return self.total / max(self.estimate(replaced), 1e-9)

    def describe(self) -> str:
        """What was measured, in one line."""
        return (
            f"{self.variant}, {self.device}, {self.dtype}, {self.threads} threads, batch "
            f"{self.batch_size}, {self.grid[0]} x {self.grid[1]} patches"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            DwattnError: missing or unknown fields.
        """
        try:
            layers = {name: LayerLatency(**layer) for name, layer in values["layers"].items()}
            grid = (int(values["grid"][0]), int(values["grid"][1]))
            return cls(**{**values, "layers": layers, "grid": grid})
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise DwattnError(
                f"Not a latency table: {error}. Measure it with dwattn.latency.measure_latency."
            ) from None


def measure_latency(
    model: nn.Module,
    *,
    grid: Grid | None = None,
    batch_size: int = 1,
    rounds: int = 15,
    variant: str = "dw",
    rank: Rank | None = None,
    inputs: Tensor | None = None,
    **options: Any,
) -> LatencyTable:
    """Time the model, and of each kind of attention layer one layer and its replacement; medians of ``rounds`` in turns.

    Args:
        model: the model, left as it is. Its backbone is timed on random images unless ``inputs`` is
            given.
        grid: patch grid, default the configured one.
        inputs: images ``(B, C, H, W)`` with which the whole ``model`` is called instead.
        variant, options: of the replacement, see :func:`dwattn.variants.build_replacement`.
        rank: of ``lowrank_dw``, a width or a fraction of C, default C / 4.

    Raises:
        UnsupportedAttentionError: no known backbone.
        DwattnError: arguments out of range.
    """
    if rounds < 1 or batch_size < 1:
        raise DwattnError(f"rounds={rounds} and batch_size={batch_size} must be at least 1.")
    rank = check_rank(rank, variant, calibrated=False)
    model = unwrap(model)
    layout = describe(model)
    grid = grid or layout.geometry().grid
    like = next(layout.module.parameters())
    pixels = inputs
    if pixels is None:
        size = (grid[0] * layout.patch_size[0], grid[1] * layout.patch_size[1])
        # Not torch.rand: the global random state is left alone.
        shape = (batch_size, layout.image_channels, *size)
        pixels = torch.linspace(-2, 2, math.prod(shape)).view(shape)
    pixels = pixels.to(like.device, like.dtype)
    whole = model if inputs is not None else layout.module
    batch = len(pixels)
    calls: dict[Any, Callable[[], Any]] = {"model": lambda: whole(pixels)}
    shapes: dict[str, Any] = {}
    with untouched(model), layout.in_raster_order():
        for site in layout.blocks:
            adapter = adapter_for(site.attention)
            if adapter is None or refusal(site.attention) is not None:
                continue
            weights = adapter.weights(site.attention)
            shape = _shape(weights, site.attention)
            shapes[site.attention_name] = shape
            if (shape, "attention") not in calls:
                if variant == "lowrank_dw":
                    options["rank"] = rank_width(rank, weights.channels)
                timed = _layer_calls(adapter, site, layout, grid, batch, variant, options)
                calls.update({(shape, part): call for part, call in timed.items()})
        timed_calls = times_in_turns(calls, rounds, like.device)
        times = {key: statistics.median(values) for key, values in timed_calls.items()}
    return LatencyTable(
        total=times["model"],
        layers={
            name: LayerLatency(
                num_heads=shape[1],
                attention=times[shape, "attention"],
                replaced=times[shape, "replaced"],
                half_replaced=times.get((shape, "half")),
            )
            for name, shape in shapes.items()
        },
        batch_size=batch,
        grid=grid,
        dtype=str(like.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(like.device) if like.is_cuda else str(like.device),
        threads=torch.get_num_threads(),
        variant=variant,
    )


def _shape(weights: AttentionWeights, attention: nn.Module) -> tuple[Any, ...]:
    """What the time of a layer depends on: layers with equal values are timed once."""
    norms = tuple(type(norm).__name__ for norm in (weights.q_norm, weights.k_norm))
    biases = tuple(bias is None for bias in (weights.bq, weights.bv, weights.bo))
    return (
        weights.dim,
        weights.num_heads,
        weights.head_dim,
        type(attention).__name__,
        norms,
        biases,
    )


def _layer_calls(
    adapter: AttentionAdapter,
    site: BlockSite,
    layout: BackboneLayout,
    grid: Grid,
    batch: int,
    variant: str,
    options: dict[str, Any],
) -> dict[str, Callable[[], Any]]:
    attention, weights = site.attention, adapter.weights(site.attention)
    patches = grid[0] * grid[1]
    tokens = layout.num_prefix + patches
    convention = adapter.convention(attention)
    given = convention.rotary_arguments(patches, weights.head_dim, weights.wv)
    rotary = convention.rotary(given)
    x = (
        torch.linspace(-1, 1, batch * tokens * weights.dim)
        .view(batch, tokens, weights.dim)
        .to(weights.wv)
    )
    common: dict[str, Any] = {"num_prefix": layout.num_prefix, "grid": grid}
    layer = build_replacement(variant, weights, **common, **options)
    calls: dict[str, Callable[[], Any]] = {
        "attention": lambda: convention.call(attention, x, **given),
        "replaced": lambda: layer(x, rotary=rotary),
    }
    if variant == "dw" and weights.num_heads > 1:
        half = build_replacement(
            variant, weights, heads=list(range(weights.num_heads // 2)), **common, **options
        )
        calls["half"] = lambda: half(x, rotary=rotary)
    return calls


def times_in_turns(
    calls: Mapping[K, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    budget_s: float = math.inf,
) -> dict[K, list[float]]:
    """Milliseconds of each call, by its key; the calls take turns, so that a busy machine disturbs all alike.

    Args:
        rounds: timed calls of each, after two untimed ones; fewer if ``budget_s`` seconds are over, but at least
            ``LEAST_ROUNDS`` (or ``rounds`` if that is less).
    """
    times: dict[K, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    deadline = math.inf
    for turn in range(-WARM_UP, rounds):
        if turn == 0:
            deadline = time.perf_counter() + budget_s
        if turn >= LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        # In rotating order: what a call finds in the caches depends on the one before it.
        shift = turn % len(keys)
        for key in keys[shift:] + keys[:shift]:
            _synchronize(device)
            start = time.perf_counter()
            calls[key]()
            _synchronize(device)
            if turn >= 0:
                times[key].append((time.perf_counter() - start) * 1e3)
    return times


def fold_ensembles(model: nn.Module) -> None:
    """Average the weights of ``ens_dw`` layers once, in place, as export does; such a model can only be timed."""
    for module in model.modules():
        if isinstance(module, ConvertedAttention) and isinstance(module.layer, EnsembleDWAttention):
            module.layer = module.layer.fold()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
