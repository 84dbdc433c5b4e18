"""The operators on a GPU against the acceptances: every backend, the fastest plain PyTorch forms, the floors.

Medians of CUDA-event times with a cold L2 cache; what cannot run is listed with its reason. At the end stands
a table of all ratios with the target and the floor beside each; losses are printed too. Parts can run alone,
and later ones join the file of earlier ones::

    python benchmarks/bench_gpu.py                                  # results/<gpu>-<date>.json
    python benchmarks/bench_gpu.py --part values layers --seconds 2
    python benchmarks/bench_gpu.py --device cpu --quick             # that everything runs, not how fast
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import gpu_cases
import gpu_scoring
import gpu_targets
from gpu_clock import Stopwatch, clocks, environment

from dwattn import backends

KIND, SCHEMA_VERSION = "dwattn-gpu-bench", 1
RESULTS = Path(__file__).parent / "results"
PARTS = (*gpu_cases.PARTS, "scoring")
Row = dict[str, Any]


def measure_part(part: str, watch: Stopwatch, quick: bool, hopper: bool) -> Iterable[Row]:
    """The rows of a part, one after the other."""
    if part == "scoring":
        yield from gpu_scoring.measure(
            gpu_scoring.QUICK if quick else gpu_scoring.FULL, watch.device
        )
        return
    for given in (gpu_cases.QUICK if quick else gpu_cases.CASES)[part]:
        sizes = {**given, "hopper": True} if hopper else given
        if part == "backward":
            times = watch.measure(gpu_cases.PARTS[part](sizes, watch.device))
        else:
            with torch.inference_mode():
                times = watch.measure(gpu_cases.PARTS[part](sizes, watch.device))
        torch._dynamo.reset()
        yield {"part": part, "case": sizes, "times": times}


def result_path(device: str) -> Path:
    """``results/nvidia-h200-2026-11-22.json``"""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def earlier_rows(path: Path | None, parts: Iterable[str], about: dict[str, Any]) -> list[Row]:
    """Rows of other parts in a file of the same machine and software; a part is measured as a whole.

    Raises:
        SystemExit: the file is of something else, which is not overwritten.
    """
    if path is None or not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    same = document.get("kind") == KIND and all(
        document["environment"][key] == about[key] for key in ("device", "torch", "dwattn")
    )
    if not same:
        raise SystemExit(
            f"{path} holds results of another machine or version; name a new file with --json."
        )
    replaced = {*parts, *(["memory"] if "scoring" in parts else [])}
    return [row for row in document["rows"] if row["part"] not in replaced]


def write(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "kind": KIND, "schema_version": SCHEMA_VERSION, "environment": about,
        "targets": [asdict(j) for j in gpu_targets.judge(rows)],
        "unmeasured": gpu_targets.unmeasured(rows), "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, per case")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that everything runs")
    parser.add_argument(
        "--hopper", action="store_true",
        help="also time dw_attention's kernel for Hopper, which is off by default (part values)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no CUDA device here; --device cpu --quick tries the logic.")
    for verdict in backends.explain("dw_layer", device=options.device, dtype=torch.bfloat16):
        print(f"{verdict.backend}: {' '.join(verdict.reasons) or 'runs'}")

    about = environment(options.device)
    path = options.json
    if path is None and options.device == "cuda" and not options.quick:
        path = result_path(about["device"])
    rows = earlier_rows(path, options.part, about)
    watch = Stopwatch(options.device, 0.0 if options.quick else options.seconds)
    about["clocks_before"] = clocks() if options.device == "cuda" else None
    for part in options.part:
        start = time.perf_counter()
        print(f"{part} ...", flush=True)
        for row in measure_part(part, watch, options.quick, options.hopper):
            rows.append(row)
            print(f"  {gpu_targets.describe(row['case'])}", flush=True)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
        about["clocks_after"] = clocks() if options.device == "cuda" else None
        if path is not None:  # after every part: what was measured is kept whatever follows
            write(path, about, rows)

    console = Console(width=120)
    console.print(gpu_targets.times_table(rows))
    console.print(gpu_targets.targets_table(gpu_targets.judge(rows, everywhere=options.quick)))
    for row in rows:
        if "scaled_from_images" in row:
            print(
                f"scoring: times of {row['scaled_from_images']} images, scaled to {gpu_scoring.SCALED_TO}"
            )
    for missing in gpu_targets.unmeasured(rows):
        print(f"not measured: {missing}")
    if path is not None:
        print(path)


if __name__ == "__main__":
    main()
