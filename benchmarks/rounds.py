"""Timing in interleaved rounds, and the result files that all benchmarks of operators write.

Candidates run in turn in every round, so that whatever else the machine does hits all of them alike; read the
ratios before the times.
"""

from __future__ import annotations

import csv
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dwattn.demo.machine import environment, now
from dwattn.errors import DataError
from dwattn.files import write_atomically

KIND, SCHEMA_VERSION = "dwattn-bench", 1
Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Measured:
    """One candidate of one case.

    Args:
        case: what was computed, the same for all candidates; candidate: how.
        median_ms, p20_ms, p80_ms: of the rounds.
        over_floor: median over the rounds of this candidate's time over the floor's in the same round, or
            None where the case has no floor.
    """

    case: str
    candidate: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    over_floor: float | None = None


def measure(calls: Calls, seconds: float, minimum: int = 7) -> dict[str, list[float]]:
    """Times in ms of interleaved rounds, until they have taken ``seconds`` (at least ``minimum`` rounds).

    Every round has an order of its own, drawn from a fixed seed: what a candidate finds in the caches depends on which
    one ran before it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    names, shuffle = list(calls), random.Random(0).shuffle
    while time.perf_counter() - start < seconds or len(times[names[0]]) < minimum:
        shuffle(names)
        for name in names:
            begin = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the time of ``name`` over that of ``base`` in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def summarise(
    case: str, times: Mapping[str, list[float]], floor: str | None = None
) -> list[Measured]:
    """Every candidate of a case, in the order of ``times``."""
    found = []
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        over = None if floor is None else ratio(times, name, floor)
        found.append(
            Measured(
                case, name, statistics.median(values), fifths[0], fifths[-1], len(values), over
            )
        )
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch  # not above: comparing two files needs no torch

    from dwattn import library

    native = library.native
    return {
        "created": now(),
        "commit": _commit(),
        **environment(torch.get_num_threads()),
        "cpu_info": native.cpu_info() if native else None,
        "build_info": native.build_info() if native else None,
    }


def _commit() -> str | None:
    """The commit of this source tree, marked where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write(path: Path, benchmark: str, results: list[Measured], **more: Any) -> None:
    """Results as JSON, and as CSV beside it under the same name.

    Args:
        more: further entries of the JSON document.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    document = {
        "kind": KIND, "schema_version": SCHEMA_VERSION, "benchmark": benchmark, "machine": machine(),
        **more, "results": rows,
    }  # fmt: skip
    with write_atomically(path, DataError) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with (
        write_atomically(path.with_suffix(".csv"), DataError) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, rows[0] if rows else [])
        table.writeheader()
        table.writerows(rows)


def read(path: Path) -> dict[str, Any]:
    """A file of :func:`write`.

    Raises:
        DataError: it cannot be read, or is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from None
    known = isinstance(document, dict) and document.get("kind") == KIND
    if not known or document.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path} is no result file of this version of the benchmarks.")
    return document
