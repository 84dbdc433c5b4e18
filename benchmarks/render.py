"""Write the measured parts of the README and of two pages of docs from the committed result files.

    python benchmarks/render.py           # after new results
    python benchmarks/render.py --check   # exit code 1 if pages and results differ

Each part stands between ``<!-- from results: NAME -->`` and ``<!-- end of results -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fidelity_page
import peers_page
import study_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(
    r"(<!-- from results: (\w+) -->\n)(?:(?!<!-- from results).)*?(<!-- end of results -->)",
    re.DOTALL,
)


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def link(name: str) -> str:
    """To a result file, from the README."""
    return f"[{name}.json](benchmarks/results/{name}.json)"


def file(name: str) -> str:
    """A result file, named on a page of the documentation, whose site does not have it."""
    return f"`{name}.json`"


def day(created: str) -> str:
    """``2026-11-21`` of ``2026-11-21 20:07 UTC``."""
    return created.split()[0]


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def span(values: Iterable[float]) -> str:
    """``0.57 to 0.96``."""
    found = sorted(values)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def _lines(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    return "\n".join(
        [row(*columns), row(*["---"] * len(columns)), *(row(*cells) for cells in rows)]
    )


def summary() -> str:
    """What the layers save and keep, in one small and one large model."""
    demo, fitted, distilled, vit_l = map(load, ("demo", "fidelity", "distill", "vit-l"))
    photos = fitted["photos"]
    small = _lines(fidelity_page.SUMMARY, fidelity_page.small(demo, fitted, distilled))
    large = _lines(("ViT-L/14, 336 px, of 24 blocks", "12", "18"), fidelity_page.large(vit_l))
    return (
        f"- **time**: the backbone on one thread of an {demo['environment']['CPU']} ({link('demo')});\n"
        f"- **a / b**: a is the cosine of the patch features with the original's, b the overlap (IoU) of the saliency maps,\n"
        f"  on {photos['held_out']} held-out photos and on those {photos['with_object']} of them that show one object of known outline;\n"
        f"- **fitted**: in closed form on {photos['calibration']} photos ({link('fidelity')});\n"
        f"- **distilled**: from the original without labels, in at most 15 minutes ({link('distill')}).\n\n{small}\n\n"
        f"Change in time of a large model, with random weights, which do not affect the time "
        f"({fidelity_page.original_seconds(vit_l):.1f} s before, on one\nthread of an "
        f"{vit_l['machine']['CPU']}, {link('vit-l')}):\n\n{large}"
    )


def fidelity() -> str:
    """What conversions keep, with the photos they were measured on."""
    found = load("fidelity")
    photos = found["photos"]
    table = _lines(fidelity_page.FITTED, fidelity_page.conversions(found))
    return (
        f"On {photos['held_out']} held-out photos, and on the {photos['with_object']} of them that show one object "
        f"with a known outline;\n{photos['calibration']} photos to calibrate ({file('fidelity')}, "
        f"{day(found['created'])}):\n\n{table}"
    )


def distill() -> str:
    """What a few minutes of label-free distillation keep, with blocks of lowest score and with refined sets."""
    chosen = {
        "distill": "Label-free distillation on 2 cores",
        "distill-refined": "The same with blocks chosen by `dwattn.refine`, whose own time is not counted",
    }
    return "\n\n".join(_distillation(*pair) for pair in chosen.items())


def _distillation(name: str, title: str) -> str:
    found = load(name)
    photos, cpu = found["photos"], found["environment"]["CPU"]
    table = _lines(fidelity_page.DISTILLED, fidelity_page.cases(found))
    return (
        f"{title}; {photos['fitted']} photos in many views, {photos['held_out']} held-out "
        f"photos, {photos['with_object']} of them with an object ({cpu}, {file(name)}, {day(found['created'])}):\n\n{table}"
    )


def distill_draws() -> str:
    """``dw`` in half of the blocks on several draws of the photos, their mean, and one with the blocks of lowest score."""
    found = [load(path.stem) for path in RESULTS.glob("distill-draw*.json")]
    found.sort(key=lambda document: document["options"]["seed"])
    rows = fidelity_page.draws(found, load("distill-without-exchange"))
    fitted = fidelity_page.on_fitted_photos(found)
    beside = (
        f"\n\nThe demo's photos that were fitted, seen as they are, have hardly more overlap\n({fitted}): other photos to fit would not give much more."
        if fitted
        else ""
    )
    return _lines(fidelity_page.DRAWN, rows) + beside


def latency() -> str:
    """Times of the demo's backbone, and its export."""
    found = load("demo")
    measured = {entry["threads"]: entry["entries"] for entry in found["latency"]}
    labels = {
        "original": "none", "dw": "`dw`", "lowrank_dw": "`lowrank_dw`, width C/4",
        "ens_dw": "`ens_dw`", "removed": "removed altogether: the most that any replacement can reach",
    }  # fmt: skip
    lines = [row("replacement", *(f"{t} thread{'s' * (t > 1)}" for t in measured))]
    lines.append(row("---", *["---:"] * len(measured)))
    for key, label in labels.items():
        cells = []
        for entries in measured.values():
            ms = {entry["key"]: entry["median_ms"] for entry in entries}
            saved = 1 - ms[key] / ms["original"]
            cells.append(f"{ms[key]:.1f} ms" + (f" (-{saved:.0%})" if key != "original" else ""))
        lines.append(row(label, *cells))
    difference = f"{found['export']['max_difference']:.1e}".replace("e-0", "e-")
    lines += ["", f"Exported, ONNX Runtime and PyTorch agree to {difference}."]
    return (
        f"Medians, {found['environment']['CPU']} ({file('demo')}, a run of `make demo`, "
        f"{day(found['created'])}):\n\n" + "\n".join(lines)
    )


def kernels() -> str:
    """The CPU kernels against plain PyTorch, and scoring against a plain pass."""
    return "\n".join([_projection(), _scoring(), "", *_layers()])


def _projection() -> str:
    document = load("cpu-dw")
    cases = document["results"]

    def ratios(dtype: str) -> str:
        return span(c["cpp/torch"] for c in cases if f" {dtype} " in c["case"])

    return (
        f"- Value projection and aggregation: time of the compiled kernel over the fastest plain PyTorch form is "
        f"{ratios('fp32')} in fp32\n  and {ratios('bf16')} in bf16, at n=256/D=384 and n=576/D=1024, batch 1 and 8, 1 and 2 threads\n"
        f"  ({link('cpu-dw')}; {_cpu(document['machine'])})."
    )


#: Files of layers on several CPUs; ``make bench`` writes the first.
LAYERS = ("cpu-layer", "cpu-layer-amx", "cpu-layer-emulated", "cpu-layer-avx2")


def _cpu(machine: dict[str, Any]) -> str:
    """A CPU, the instruction set that ran on it, and whether bf16 had none."""
    info = machine["cpu_info"]
    emulated = ", bf16 emulated" if info["bf16_products"] == "float32" else ""
    return f"{machine['CPU']}, `{info['chosen_isa']}`{emulated}"


def _layers() -> list[str]:
    """Whole layers over their two products, on every machine that has measured them."""
    sizes = {"n=256,D=384": 384, "n=576,D=1024": 1024, "n=1369,D=1024": 1024}
    lines = [
        "Time of a whole layer over that of its two matrix products alone. `dw` columns: 1 thread at batch 1 / 2 threads at",
        "batch 8; `lowrank_dw` (width 64 to 256) and plain PyTorch (all layers): the range over all of these cases.",
        "",
        row("CPU", "dtype", *(f"`dw`, {s.replace(',', ', ')}" for s in sizes), "`lowrank_dw`", "PyTorch"),
        row("---", "---", *["---:"] * 5),
    ]  # fmt: skip
    for name in LAYERS:
        found = load(name)
        cases = {c["case"]: c["over_products"] for c in found["results"]}

        def of(size: str, width: int, dtype: str, way: str, cases: Any = cases) -> list[float]:
            runs = ("batch=1 threads=1", "batch=8 threads=2")
            return [cases[f"{size} r={width} {dtype} {run}"][way] for run in runs]

        for dtype in ("fp32", "bf16"):
            full = [
                " / ".join(f"{r:.2f}" for r in of(*item, dtype, "cpp")) for item in sizes.items()
            ]
            narrow = [r for s in sizes for w in (64, 128, 256) for r in of(s, w, dtype, "cpp")]
            plain = [
                r
                for s, d in sizes.items()
                for w in (64, 128, 256, d)
                for r in of(s, w, dtype, "torch")
            ]
            lines.append(
                row(f"{_cpu(found['machine'])} ({link(name)})", dtype, *full, span(narrow), span(plain))
            )  # fmt: skip
    return lines


def _scoring() -> str:
    found = load("cpu-scoring")
    sizes = [found["sizes"][size] for size in ("224", "336")]

    def pair(pick: Callable[[Any], float], form: str = ".2f") -> list[str]:
        return [f"{pick(size):{form}}" for size in sizes]

    ours = pair(lambda s: s["ways"]["score"]["ratio"])
    hooks = pair(lambda s: s["ways"]["naive hooks"]["ratio"])
    peak = pair(lambda s: s["ways"]["score"]["extra_bytes"] / 2**20, ".0f")
    state = pair(lambda s: s["state_bytes"] / 2**20, ".0f")
    faster: dict[int, list[float]] = {}
    for row in found["operator"]:
        faster.setdefault(row["tokens"], []).append(row["ways"]["compiled"]["hooks_over_this"])
    alone = " and ".join(f"{min(f):.1f} to {max(f):.1f} times (N={n})" for n, f in faster.items())
    return (
        f"- Scoring: its time over a plain forward pass of the same images is {ours[0]} (224 px) and {ours[1]} (336 px), with "
        f"{peak[0]} and {peak[1]} MiB\n  of additional peak memory, of which {state[0]} and {state[1]} MiB are the result; with hooks that "
        f"materialise the maps it is {hooks[0]} and {hooks[1]}.\n  Attention and statistics of one layer, 6 heads of width 64, "
        f"on 1 and 2 threads: {alone}\n  as fast as with such hooks ({link('cpu-scoring')}; "
        f"{_cpu(found['machine'])}, {found['threads']} threads)."
    )


def table1() -> str:
    """Ratios of the paper's Table 1 beside this machine's."""
    found = load("table1")
    paper = {"mhsa": 3.2, "conv": 3.71, "dw": 1.26, "spvit": 0.641, "ens_dw": 0.215}
    rows = [r for r in found["results"] if r["case"].startswith("Table 1")]
    lines = [
        row("layer", "median", "over `mhsa`", "the paper's"),
        row("---", "---:", "---:", "---:"),
    ]
    for r in rows:
        theirs = paper.get(r["candidate"])
        cell = "-" if theirs is None else f"{theirs / paper['mhsa']:.3f}"
        times = f"{r['median_ms']:.2f} ms", f"{r['over_floor']:.3f}"
        lines.append(row(f"`{r['candidate']}`", *times, cell))
    return "\n".join(lines)


NOT_RUN = "Not run yet."

#: Columns of the tables of rivals.
RIVALS = {
    "cpp": "`cpp`", "torch": "PyTorch", "compiled": "`torch.compile`",
    "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
}  # fmt: skip


def cpu_layers(name: str = "cpu-layer") -> str:
    """Every case of a file over its two products, and why where another is faster."""
    found = load(name)
    shown = [name for name in RIVALS if any(name in r["over_products"] for r in found["results"])]
    columns = ("case", "products", *(RIVALS[name] for name in shown), "faster than `cpp`")
    lines = [row(*columns), row("---", *["---:"] * (len(columns) - 2), "---")]
    reasons: dict[str, str] = {}
    for r in found["results"]:
        ratios, faster = r["over_products"], r.get("faster_than_cpp", {})
        cells = (f"{ratios[name]:.2f}" if name in ratios else "-" for name in shown)
        ms = f"{r['products_ms']:.2f} ms"
        lines.append(row(r["case"], ms, *cells, ", ".join(RIVALS[name] for name in faster)))
        reasons.update(faster)
    pages = ", PyTorch with huge pages" if found.get("huge_pages") else ""
    lines += ["", f"{day(found['machine']['created'])}, {_cpu(found['machine'])}{pages}."]
    lines += [f"{RIVALS[name]}: {reason}." for name, reason in reasons.items()]
    return "\n".join(lines)


def vit_l() -> str:
    """Shares of the possible gain in a whole ViT-L."""
    if not (RESULTS / "vit-l.json").exists():
        return NOT_RUN
    found = load("vit-l")

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    lines = [
        row("model", "layers replaced", "of its two products", "of removing them"),
        row("---", "---", "---:", "---:"),
    ]
    lines += [
        row(s["case"], s["candidate"], percent(s["of_products"]), percent(s["of_removal"]))
        for s in found["shares"]
    ]
    machine = found["machine"]
    return "\n".join([*lines, "", f"{day(machine['created'])}, {machine['CPU']}. {found['note']}"])


#: The study of how many blocks can go, with a recipe chosen on images held back from the training side.
LIMITS = "-limits"
#: How blocks are chosen, with gates that learn at a rate of their own.
SELECTION = "-selection"


def studies(kind: str = "") -> dict[str, Any]:
    """Results by task, of those that were run; ``kind`` is part of their files' names."""
    names = {task: f"study{kind}-{task}" for task in study_page.TASKS}
    return {t: load(name) for t, name in names.items() if (RESULTS / f"{name}.json").exists()}


def study_setting(kind: str = "") -> str:
    """What was run, and how."""
    lines = []
    for task, found in studies(kind).items():
        s, grid = found["setting"], found["grid"]
        head, first, second = (grid[name] for name in ("head", "recipe", "second"))
        lines.append(
            f"- {study_page.NAMES[task]} (`benchmarks/results/study{kind}-{task}.json` and `.csv`, "
            f"{day(found['created'])}): {s['train_images']} training and "
            f"{s['test_images']} test images of {s['size']} x {s['size']} pixels; {head['steps']} steps of the head alone, "
            f"{first['steps']} of all weights at {first['lr']:g}, {second['steps']} after the replacement at "
            f"{second['lr']:g}, {first['batch_size']} images each; calibrated on {grid['calibration_images']} images; "
            f"{len(found['runs'])} runs; `{found['command']}`."
        )
    return "\n".join(lines) or NOT_RUN


def _study(task: str, kind: str = "") -> str:
    found = studies(kind).get(task)
    if found is None:
        return NOT_RUN
    columns = ["layer", "chosen by", "replaced", "stages", "start", "mean", "difference", "seeds"]
    columns += (
        [f"time saved at {study_page.latency_size(found)} px"] if found.get("latency") else []
    )
    return _lines(columns, study_page.table(found, study_page.TASKS[task]))


def study_claims(kind: str = "") -> str:
    """The paper's orderings beside ours."""
    found = studies(kind)
    columns = ["first minus second, points", "the paper's", *found, "verdict"]
    rows = study_page.claims(found)
    return _lines(columns, rows) if rows else NOT_RUN


def study_summary() -> str:
    """What replacing costs, in short."""
    found = studies(LIMITS)
    columns = ["layer", "replaced", *(study_page.NAMES[task] for task in found)]
    rows = study_page.short(found)
    return _lines(columns, rows) if rows else NOT_RUN


def study_limits() -> str:
    """How many blocks can go."""
    columns = ["layer", "replaced", *(f"against {name}" for name in study_page.BASELINES.values())]
    parts = []
    for task, found in studies(LIMITS).items():
        measured = [(study_page.TASKS[task], study_page.NAMES[task])]
        measured += [study_page.BESIDE[task]] if task in study_page.BESIDE else []
        for metric, name in measured:
            table = _lines(columns, study_page.limits(found, metric))
            parts += [f"{name}:", table, "\n".join(study_page.within(found, metric))]
    return "\n\n".join(parts) or NOT_RUN


def peers() -> str:
    """The README's extract, and how often token merging wins."""
    found = load("peers")
    table = _lines(peers_page.COLUMNS, peers_page.peers(found, extract=True))
    won = peers_page.dominated(found["results"])
    return f"{peers_page.measured(found)}, 1 thread:\n\n{table}\n\n{won}"


def peers_all() -> str:
    """Every candidate."""
    found = load("peers")
    table = _lines(peers_page.COLUMNS, peers_page.peers(found, extract=False))
    return f"{peers_page.measured(found)}, 1 thread:\n\n{table}"


def models() -> str:
    """Whole models and blocks over eager PyTorch, a table a case; and calibration."""
    found = load("models")
    tables = peers_page.models(found)
    parts = [f"{peers_page.measured(found)}:"]
    parts += [_lines([case, "median", "over `mhsa, eager`"], rows) for case, rows in tables.items()]
    return "\n\n".join(part for part in [*parts, peers_page.calibration(found)] if part)


def predictions() -> str:
    """Times of an Orin Nano from the roofline: no measurements."""
    predicted = load("growth")["predictions"]
    return f"{peers_page.device(predicted)}\n\n{_lines(*peers_page.predictions(predicted))}"


PARTS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "fidelity": fidelity,
    "distill": distill,
    "distill_draws": distill_draws,
    "latency": latency,
    "kernels": kernels,
    "table1": table1,
    "cpu_layers": cpu_layers,
    "cpu_layers_amx": lambda: cpu_layers("cpu-layer-amx"),
    "vit_l": vit_l,
    "study_summary": study_summary,
    "study_setting": study_setting,
    "study_classify": lambda: _study("classify"),
    "study_segment": lambda: _study("segment"),
    "study_claims": study_claims,
    "study_limits": study_limits,
    "limits_setting": lambda: study_setting(LIMITS),
    "limits_classify": lambda: _study("classify", LIMITS),
    "limits_segment": lambda: _study("segment", LIMITS),
    "selection_setting": lambda: study_setting(SELECTION),
    "selection_claims": lambda: study_claims(SELECTION),
    "selection_classify": lambda: _study("classify", SELECTION),
    "selection_segment": lambda: _study("segment", SELECTION),
    "peers": peers,
    "peers_all": peers_all,
    "models": models,
    "predictions": predictions,
}
#: Files with measured parts.
PAGES = ("README.md", "docs/study.md", "docs/benchmarks.md")


def render(text: str) -> str:
    """A page with every part written anew from the results."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}\n\n{found[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    options = parser.parse_args()
    differ = []
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        written = render(text)
        if written != text:
            differ.append(name)
        if written != text and not options.check:
            (ROOT / name).write_text(written, encoding="utf-8")
    if options.check and differ:
        print(f"{', '.join(differ)} differ from benchmarks/results: run benchmarks/render.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
