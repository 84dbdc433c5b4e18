"""How fast the models of a study are on this machine, each measured in turns with the original."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.errors import DwattnError
from dwattn.files import write_atomically
from dwattn.finetune.study_grid import Cell, StudyGrid, read_part
from dwattn.latency import fold_ensembles, times_in_turns
from dwattn.plan import Plan
from dwattn.surgery import replace


def study_latency(
    grid: StudyGrid, backbone: nn.Module, pixels: Tensor, folder: str | Path, /, **options: Any
) -> list[dict[str, Any]]:
    """:func:`measure_cells` of all cells of a study's folder that are done; measured once for each size of images, kept in
    ``latency.json``.

    Args:
        backbone, pixels, options: of :func:`measure_cells`; the size may be another than that of the study's images.
    """
    root, path = Path(folder), Path(folder) / "latency.json"
    kept = read_part(path) if path.exists() else []
    known = [entry for entry in kept if entry.get("size") == _size(pixels)]
    have = {(entry["attention"], entry["count"]) for entry in known}
    cells = []
    for cell in grid.cells():
        done = root / "cells" / f"{cell.name}.json"
        if done.exists() and (cell.label[0], cell.label[2]) not in have:
            cells.append((cell, read_part(done)["replaced"]))
    new = measure_cells(backbone, pixels, cells, **options)
    with write_atomically(path, DwattnError) as temporary:
        temporary.write_text(json.dumps(kept + new, indent=1) + "\n", encoding="utf-8")
    return known + new


def measure_cells(
    backbone: nn.Module,
    pixels: Tensor,
    cells: Iterable[tuple[Cell, list[str]]],
    *,
    rounds: int = 15,
    **replace_options: Any,
) -> list[dict[str, Any]]:
    """One entry a kind and count: medians in ms, the median over rounds of the ratio to the original, and the size of the
    images in pixels.

    Args:
        backbone: not converted; it stays as it is.
        pixels: images of one call.
        cells: with the layers that were replaced, as a study's rows name them.
        rounds: timed calls of each model, after two untimed ones.
    """
    entries, seen = [], set()
    original = copy.deepcopy(backbone).eval()
    for cell, replaced in cells:
        key = cell.label[0], cell.label[2]
        if cell.kind is None or key in seen:
            continue
        seen.add(key)
        converted = _converted(original, cell, replaced, replace_options)
        calls = {"before": partial(original, pixels), "after": partial(converted, pixels)}
        with torch.inference_mode():
            times = times_in_turns(calls, rounds, pixels.device)
        before, after = times["before"], times["after"]
        entries.append(
            {
                "attention": key[0], "count": key[1], "ms": statistics.median(after),
                "original_ms": statistics.median(before), "size": _size(pixels),
                "ratio": statistics.median(a / b for a, b in zip(after, before, strict=True)),
            }
        )  # fmt: skip
    return entries


def _size(pixels: Tensor) -> list[int]:
    """Height and width, as JSON gives them back."""
    return list(pixels.shape[-2:])


def _converted(
    original: nn.Module, cell: Cell, replaced: list[str], options: dict[str, Any]
) -> nn.Module:
    """A copy with these layers replaced; weights do not matter, but are folded as for export."""
    assert cell.kind is not None
    parts = [name.partition(":") for name in replaced]
    heads = [[int(head) for head in listed.split(",")] if listed else None for *_, listed in parts]
    model = copy.deepcopy(original)
    plan = Plan.for_layers(model, [name for name, *_ in parts], heads)
    rank = {} if cell.kind.rank is None else {"rank": cell.kind.rank}
    replace(model, plan, variant=cell.kind.variant, kernel_init="gaussian", **{**rank, **options})
    fold_ensembles(model)
    return model.eval()
