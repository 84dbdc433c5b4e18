"""The measured parts of docs/benchmarks.md, and the README's extract of the peers: cells and sentences."""

from __future__ import annotations

import re
from typing import Any

Row = dict[str, Any]
#: Rows of the README's table of peers: method and setting, by image size.
SHOWN = {
    "224": (
        ("original", ""), ("token merging", "r=8"), ("token merging", "r=16"), ("dw", "3 of 12 blocks"),
        ("dw", "6 of 12 blocks"), ("lowrank_dw", "6 of 12 blocks"), ("head pruning", "1 of 6 heads"),
        ("head pruning, refitted", "1 of 6 heads"), ("dw, then token merging", "r=16 behind block 5"),
    ),
    "448": (("original", ""), ("token merging", "r=64"), ("dw", "6 of 12 blocks"), ("lowrank_dw", "6 of 12 blocks")),
}  # fmt: skip
COLUMNS = ("image", "method", "setting", "median", "patches", "saliency IoU", "CLS", "mean patch")
#: This project's, and the peer that is not trained by its users either.
OURS, PEER = ("dw", "lowrank_dw"), "token merging"


def measured(found: dict[str, Any]) -> str:
    """Where and when a file was made, and what it says of itself."""
    machine, notes = found["machine"], found["notes"]
    return ", ".join([machine["CPU"], machine["created"].split()[0], *([notes] if notes else [])])


def pixels(row: Row) -> str:
    """``224`` of ``ViT-S/14 at 224 px, ...``."""
    return re.findall(r"(\d+) px", row["case"])[0]


def peers(found: dict[str, Any], *, extract: bool) -> list[list[str]]:
    """Cells of all candidates, or of those that the README shows."""
    rows = found["results"]
    if extract:
        rows = [row for row in rows if (row["method"], row["setting"]) in SHOWN[pixels(row)]]
    return [_cells(row) for row in rows]


def _cells(row: Row) -> list[str]:
    change = "" if row["method"] == "original" else f" ({row['over_floor'] - 1:+.0%})"
    keys = ("patch_cosine", "iou", "cls_cosine", "mean_cosine")
    return [
        f"{pixels(row)} px", row["method"], row["setting"] or "-", f"{row['median_ms']:.1f} ms{change}",
        *(f"{row[key]:.3f}" for key in keys),
    ]  # fmt: skip


def dominated(rows: list[Row]) -> str:
    """How many settings of ours the peer beats in time and in fidelity at once."""
    lines = []
    for size in dict.fromkeys(map(pixels, rows)):
        here = [row for row in rows if pixels(row) == size]
        ours = [row for row in here if row["method"] in OURS]
        theirs = [row for row in here if row["method"] == PEER]
        patches, iou, cls = (
            sum(any(_beats(peer, row, key) for peer in theirs) for row in ours)
            for key in ("patch_cosine", "iou", "cls_cosine")
        )
        if ours and theirs:
            lines.append(
                f"At {size} px some setting of token merging is both faster and closer to the original than {patches} of "
                f"the {len(ours)}\nmeasured settings of `dw` and `lowrank_dw` by patch features, than {iou} by saliency "
                f"maps and than {cls} by CLS."
            )
    return "\n".join(lines)


def _beats(peer: Row, row: Row, key: str) -> bool:
    return peer["over_floor"] <= row["over_floor"] and peer[key] >= row[key]


def models(found: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Candidate, median and ratio, by case."""
    tables: dict[str, list[list[str]]] = {}
    for row in found["results"]:
        cells = [row["candidate"], f"{row['median_ms']:.2f} ms", f"{row['over_floor']:.3f}"]
        tables.setdefault(row["case"], []).append(cells)
    return tables


def calibration(found: dict[str, Any]) -> str:
    """What converting costs; empty where it was not measured."""
    fitted = found["calibration"]
    if not fitted:
        return ""
    threads = f"{fitted['threads']} thread" + "s" * (fitted["threads"] > 1)
    return (
        f"Six blocks of a ViT-S at 224 px on {fitted['photos']} pictures, one view each, {threads}: converted and "
        f"calibrated in\n{fitted['dw_s']:.0f} s (`dw`) and {fitted['lowrank_dw_s']:.0f} s (`lowrank_dw`); one forward pass "
        f"of the same pictures takes {fitted['forward_s']:.1f} s."
    )


def device(predicted: dict[str, Any]) -> str:
    """What the roofline assumes."""
    d = predicted["device"]
    return (
        f"{d['name']}: {d['bandwidth'] / 1e9:.0f} GB/s, {d['rate'] / 1e12:.0f} TFLOPS, {d['launch'] * 1e6:.0f} us a launch, "
        f"{d['efficiency']:.0%} of the rates reached; one layer, batch 1:"
    )


def predictions(predicted: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of predicted times of a layer."""
    rows = predicted["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    ms = {(row["model"], row["tokens"], row["variant"]): row["predicted_ms"] for row in rows}
    shapes = dict.fromkeys((row["model"], row["tokens"]) for row in rows)
    columns = ["model", "tokens", *(f"`{v}`, predicted" for v in variants)]
    return columns, [[m, str(n), *(f"{ms[m, n, v]:.3f} ms" for v in variants)] for m, n in shapes]
