"""Latency of the converted models beside the original and the ceiling."""

from __future__ import annotations

import copy
from functools import partial

import torch

from dwattn.adapters import describe
from dwattn.attention import EnsembleDWAttention, ReplacementAttention
from dwattn.demo.conversions import Outcome
from dwattn.demo.pretrained import DIM, GRID, IMAGE_SIZE, SaliencyModel
from dwattn.demo.timing import RemovedAttention, cpu_threads, interleaved
from dwattn.latency import fold_ensembles
from dwattn.report.results import Latency, LatencyInfo


def measure(
    model: SaliencyModel, outcomes: dict[str, Outcome], *, threads: list[int], rounds: int
) -> list[LatencyInfo]:
    """Backbone latency of the original, the kept conversions and the ceiling, by number of
    threads.

    Args:
        threads: intra-op thread counts to measure at.
        rounds: calls of every model.
    """
    models, labels = _models_to_time(model, outcomes)
    pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    found = []
    for count in threads:
        with cpu_threads(count), torch.inference_mode():
            timings = interleaved(
                {key: partial(item.tokens, pixels) for key, item in models.items()},
                rounds=rounds,
                budget_s=12,
            )
        entries = [
            Latency(
                key=key, label=labels[key], median_ms=t.median_ms, p20_ms=t.p20_ms, p80_ms=t.p80_ms
            )
            for key, t in timings.items()
        ]
        found.append(
            LatencyInfo(
                what=f"Backbone, PyTorch fp32, {IMAGE_SIZE} px",
                batch=1,
                threads=count,
                rounds=min(t.rounds for t in timings.values()),
                entries=entries,
            )
        )
    return found


def _models_to_time(
    model: SaliencyModel, outcomes: dict[str, Outcome]
) -> tuple[dict[str, SaliencyModel], dict[str, str]]:
    """The models and their labels by key, from the original to the ceiling."""
    kept = [item for item in outcomes.values() if item.model is not model]
    models = {"original": model}
    labels = {"original": "original", "removed": "ceiling:\nlayers removed"}
    for item in kept:
        variant = item.record.variant
        if variant not in models:  # dw without a fit is the same graph as the fitted one
            folded = _fold(item.model)
            width = next(
                m.inner_dim for m in folded.modules() if isinstance(m, ReplacementAttention)
            )
            models[variant] = folded
            labels[variant] = variant if width == DIM else f"{variant},\nwidth {width}"
    models["removed"] = without_attention(model, kept[0].record.blocks)
    return models, labels


def _fold(model: SaliencyModel) -> SaliencyModel:
    """``model`` with the weights of ``ens_dw`` averaged once, as its export does, not at each call."""
    if not any(isinstance(module, EnsembleDWAttention) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    fold_ensembles(model)
    return model


def without_attention(model: SaliencyModel, blocks: list[int]) -> SaliencyModel:
    """A copy whose attention layers in ``blocks`` do nothing."""
    bare = copy.deepcopy(model)
    for index in blocks:
        site = describe(bare).blocks[index]
        parent, _, name = site.attention_name.rpartition(".")
        with torch.inference_mode():
            probe = site.attention(torch.zeros(1, 1 + GRID[0] * GRID[1], DIM))
        setattr(bare.get_submodule(parent), name, RemovedAttention(isinstance(probe, tuple)))
    return bare
