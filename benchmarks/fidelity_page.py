"""What replaced layers keep of a model, and save: the README's first table, and those of docs/benchmarks.md."""

from __future__ import annotations

import re
from typing import Any

Document = dict[str, Any]
#: Layers in six of twelve blocks: key of demo.json's times, label, key of fidelity.json, case of distill.json.
LAYERS = (
    ("dw", "`dw`", "residual-6-dw-calibrated", "dw-6"),
    ("lowrank_dw", "`lowrank_dw`, width C/4", "residual-6-lowrank_dw-r96-calibrated", "lowrank-6"),
    ("ens_dw", "`ens_dw`, the paper's Gaussian start", "residual-6-ens_dw-gaussian", None),
)
SUMMARY = ("six of twelve blocks as", "time", "fitted: all photos", "fitted: with an object", "distilled: all photos", "distilled: with an object")  # fmt: skip
FITTED = ("replaced", "layer", "chosen by", "all photos", "with an object")
DISTILLED = ("replaced", "layer", "how", "images", "minutes", "all photos", "with an object")
DRAWN = ("draw", "blocks", "images", "products", "minutes", "and to choose", "all photos", "with an object")  # fmt: skip
#: Conversions of fidelity.json in the order of the table, with the name of their layer.
CONVERSIONS = {
    "perturbation-4-dw-calibrated": "`dw`",
    "variance-4-dw-calibrated": "`dw`",
    "residual-6-dw-calibrated": "`dw`",
    "perturbation-6-dw-calibrated": "`dw`",
    "residual-6-lowrank_dw-r96-calibrated": "`lowrank_dw`, width C/4",
    "residual-6-lowrank_dw-r64-calibrated": "`lowrank_dw`, width d_h",
    "residual-9-dw-calibrated": "`dw`",
    "residual-6-dw-gaussian": "`dw`, the paper's Gaussian start",
    "residual-6-ens_dw-gaussian": "`ens_dw`, Gaussian",
}
REMOVED = "nothing (attention removed): the most that any replacement can save"


def small(demo: Document, fidelity: Document, distill: Document) -> list[list[str]]:
    """Cells for the demo's model: backbone on one thread, fidelity fitted and distilled."""
    times = {e["key"]: e["median_ms"] for e in demo["latency"][0]["entries"]}
    fitted = {c["key"]: c["fidelity"] for c in fidelity["conversions"]}
    distilled = {c["case"]["name"]: c["after"] for c in distill["cases"]}

    def saved(key: str) -> str:
        return f"{times[key]:.1f} ms ({times[key] / times['original'] - 1:+.0%})"

    rows = [["attention (the original)", f"{times['original']:.1f} ms", *[""] * 4]]
    for key, label, closed, case in LAYERS:
        later = kept(distilled[case]) if case else ("", "")
        rows.append([label, saved(key), *kept(fitted[closed]), *later])
    return [*rows, [REMOVED, saved("removed"), *[""] * 4]]


def large(vit_l: Document) -> list[list[str]]:
    """Cells for a ViT-L at 336 px, fp32, one thread: a layer a row, 12 and 18 of 24 of them."""
    found = [r for r in vit_l["results"] if re.search(r"fp32 batch=1 threads=1$", r["case"])]
    times = {r["candidate"]: r["median_ms"] for r in found}
    rows = []
    for layer in ("dw", "lowrank_dw r=256", "lowrank_dw r=64", "removed"):
        changes = (
            f"{times[f'{count} {layer}'] / times['original'] - 1:+.0%}" for count in (12, 18)
        )
        name, _, width = layer.partition(" r=")
        label = (
            REMOVED if name == "removed" else f"`{name}`" + (f", width {width}" if width else "")
        )
        rows.append([label, *changes])
    return rows


def original_seconds(vit_l: Document) -> float:
    """Of the unconverted model in :func:`large`."""
    return next(r["median_ms"] for r in vit_l["results"] if r["candidate"] == "original") / 1000


def kept(after: dict[str, float]) -> tuple[str, str]:
    """Cosine and overlap over all photos, and over those with an object."""
    everywhere = f"{after['cosine']:.3f} / {after['iou']:.3f}"
    return everywhere, f"{after['object_cosine']:.3f} / {after['object_iou']:.3f}"


def conversions(fidelity: Document) -> list[list[str]]:
    """Cells of :data:`CONVERSIONS`."""
    found = {c["key"]: c for c in fidelity["conversions"]}
    return [
        [f"{len(found[key]['blocks'])} of 12", label, f"`{found[key]['criterion']}`", *kept(found[key]["fidelity"])]
        for key, label in CONVERSIONS.items()
    ]  # fmt: skip


def cases(distill: Document) -> list[list[str]]:
    """Cells of a file of distillations."""
    rows = []
    for c in distill["cases"]:
        case = c["case"]
        layer = f"`{case['variant']}`" + (f", width {case['rank']}" if case["rank"] else "")
        how = c["method"] + (" from the paper's Gaussian start" if case["gaussian"] else "")
        minutes = f"{c['minutes']:.1f}"
        rows.append([f"{case['blocks']} of 12", layer, how, str(c["images"]), minutes, *kept(c["after"])])  # fmt: skip
    return rows


def on_fitted_photos(found: list[Document]) -> str:
    """What is kept of the photos that were fitted, by draw, where a file says it."""
    known = [
        (d["options"]["seed"], d["cases"][0]["on_fitted_photos"])
        for d in found
        if "on_fitted_photos" in d["cases"][0]
    ]
    lines = [f"draw {seed}: {' and '.join(kept(after))}" for seed, after in known]
    return "; ".join(lines)


def draws(found: list[Document], alone: Document) -> list[list[str]]:
    """Cells of one case on several draws of the photos, ``alone`` with the blocks of lowest score; then their mean."""
    named = [(str(d["options"]["seed"]), d) for d in found]
    rows = [_draw(*pair) for pair in [*named, (f"{alone['options']['seed']}, by score alone", alone)]]  # fmt: skip
    afters = [d["cases"][0]["after"] for d in found]
    names = ("cosine", "iou", "object_cosine", "object_iou")
    mean = {n: sum(after[n] for after in afters) / len(afters) for n in names}
    return [*rows, [f"mean of {', '.join(name for name, _ in named)}", *[""] * 5, *kept(mean)]]


def _draw(name: str, document: Document) -> list[str]:
    (case,) = document["cases"]
    blocks = ", ".join(re.findall(r"blocks\.(\d+)", " ".join(case["replaced"])))
    choice = f"{case['choice_minutes']:.1f}" if "choice_minutes" in case else ""
    products = "bf16" if document["options"].get("amp") == "bf16" else "fp32"
    minutes = f"{case['minutes']:.1f}"
    return [name, blocks, str(case["images"]), products, minutes, choice, *kept(case["after"])]
