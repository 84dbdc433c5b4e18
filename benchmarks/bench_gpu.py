"""The operators on a GPU against the acceptances: every backend, the fastest plain PyTorch forms, the floors.

Medians of CUDA-event times with a cold L2 cache; what cannot run is listed with its reason. At the end stands
a table of all ratios with the target and the floor beside each; losses are printed too. Parts can run alone,
and later ones join the file of earlier ones::

    python benchmarks/bench_gpu.py                                  # results/<gpu>-<date>.json
    python benchmarks/bench_gpu.py --part values layers --seconds 2
    python benchmarks/bench_gpu.py --device cpu --quick             # that everything runs, not how fast

A call that raises is left out, with its reason in the row. One that leaves the GPU in an error which only a
new process can leave, or that does not return, is noted in the file, and the program starts itself anew
without that call; the file is written after every case.
"""

from __future__ import annotations

import argparse
import json
import os
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
from gpu_clock import Calls, DeviceLost, Stopwatch, clocks, environment, watch_over

from dwattn import backends

KIND, SCHEMA_VERSION = "dwattn-gpu-bench", 1
RESULTS = Path(__file__).parent / "results"
PARTS = (*gpu_cases.PARTS, "scoring")
RESUME = "--resume"
Row = dict[str, Any]


def cases_of(part: str, quick: bool, hopper: bool) -> list[gpu_cases.Case]:
    if part == "scoring":
        return [gpu_scoring.QUICK if quick else gpu_scoring.FULL]
    cases = (gpu_cases.QUICK if quick else gpu_cases.CASES)[part]
    return [{**sizes, "hopper": True} if hopper else sizes for sizes in cases]


def measure_case(
    part: str, sizes: gpu_cases.Case, watch: Stopwatch, without: set[str]
) -> list[Row]:
    """The rows of a case: one, or of scoring two.

    Raises:
        DeviceLost: see there.
    """
    watch.failures = {}
    if part == "scoring":
        return watch.attempt("scoring", lambda: gpu_scoring.measure(sizes, watch, without)) or []

    def calls() -> Calls:
        made = gpu_cases.PARTS[part](sizes, watch.device)
        return {name: call for name, call in made.items() if name not in without}

    with torch.inference_mode(part != "backward"), gpu_cases.precision(sizes["dtype"]):
        times = watch.measure(watch.attempt("preparation", calls) or {})
    torch._dynamo.reset()
    return [{"part": part, "case": sizes, "times": times, "failures": watch.failures}]


class Journal:
    """The result file, written after every case, and the way to go on in a new process."""

    def __init__(self, path: Path | None, about: dict[str, Any], rows: list[Row]) -> None:
        self.path, self.about, self.rows = path, about, rows
        self.lost: list[dict[str, Any]] = about.setdefault("lost", [])
        self.at: tuple[str, gpu_cases.Case] | None = None

    def has(self, part: str, sizes: gpu_cases.Case) -> bool:
        return any(row["part"] == part and row["case"] == sizes for row in self.rows)

    def without(self, part: str, sizes: gpu_cases.Case) -> set[str]:
        """Calls of a case that took the GPU away before."""
        return {
            entry["call"] for entry in self.lost if (entry["part"], entry["case"]) == (part, sizes)
        }

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.about, self.rows)

    def start_anew(self, call: str, reason: str) -> None:
        """Replaces this process by one that goes on without this call."""
        assert self.at is not None
        part, sizes = self.at
        if self.path is None:
            print(f"{call}: {reason}. There is no file to go on with (--json).", flush=True)
            os._exit(1)
        print(f"  {call}: {reason}; going on in a new process", flush=True)
        if call in self.without(part, sizes):  # nothing that can be left out: then without the case
            failures = {call: reason}
            self.rows.append({"part": part, "case": sizes, "times": {}, "failures": failures})
        self.lost.append({"part": part, "case": sizes, "call": call, "reason": reason})
        self.write()
        arguments = [argument for argument in sys.argv if argument != RESUME]
        os.execv(sys.executable, [sys.executable, *arguments, RESUME])


def result_path(device: str) -> Path:
    """``results/nvidia-h200-2026-11-22.json``"""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def earlier_rows(
    path: Path | None, parts: Iterable[str], about: dict[str, Any], *, resume: bool = False
) -> list[Row]:
    """Rows of other parts in a file of the same machine and software; a part is measured as a whole, unless
    it goes on where a process ended.

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
    if resume:
        about["lost"] = document["environment"].get("lost", [])
        rows: list[Row] = document["rows"]
        return rows
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
    parser.add_argument(
        "--stall", type=float, default=100.0, help="seconds after which a call is given up"
    )
    parser.add_argument(RESUME, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no CUDA device here; --device cpu --quick tries the logic.")
    for verdict in backends.explain("dw_layer", device=options.device, dtype=torch.bfloat16):
        print(f"{verdict.backend}: {' '.join(verdict.reasons) or 'runs'}")

    about = environment(options.device)
    path = options.json
    if path is None and options.device == "cuda" and not options.quick:
        path = result_path(about["device"])
    rows = earlier_rows(path, options.part, about, resume=options.resume)
    watch = Stopwatch(options.device, 0.0 if options.quick else options.seconds)
    about["clocks_before"] = clocks() if options.device == "cuda" else None
    journal = Journal(path, about, rows)
    watch_over(watch, options.stall, lambda call: journal.start_anew(call, "it does not return"))
    for part in options.part:
        start = time.perf_counter()
        print(f"{part} ...", flush=True)
        for sizes in cases_of(part, options.quick, options.hopper):
            if not journal.has(part, sizes):
                journal.at = part, sizes
                print(f"  {gpu_targets.describe(sizes)}", flush=True)
                try:
                    rows += measure_case(part, sizes, watch, journal.without(part, sizes))
                except DeviceLost as lost:
                    journal.start_anew(lost.call, str(lost))
                journal.write()  # what was measured is kept whatever follows
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
        about["clocks_after"] = clocks() if options.device == "cuda" else None
        journal.write()

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
    for entry in journal.lost:
        print(f"lost: {entry['call']} on {gpu_targets.describe(entry['case'])}: {entry['reason']}")
    if path is not None:
        print(path)


if __name__ == "__main__":
    main()
