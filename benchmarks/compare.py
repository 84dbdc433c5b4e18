"""What became slower or faster between two result files, beyond their noise.

    python benchmarks/compare.py before.json after.json

A case counts as changed when the ranges between the 20th and the 80th percentiles do not overlap and the medians
differ by more than ``--threshold``. Exit code 0: nothing slower; 1: something is; 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rounds
from rich.console import Console
from rich.table import Table

from dwattn.errors import DataError

VERDICTS = ("slower", "faster", "same")
#: What must agree for times to be comparable.
SAME = ("CPU", "threads", "system")


@dataclass(frozen=True)
class Change:
    """One candidate of one case in both files; ``verdict`` is slower, faster or same."""

    case: str
    candidate: str
    before_ms: float
    after_ms: float
    verdict: str

    @property
    def ratio(self) -> float:
        """Median after over median before."""
        return self.after_ms / self.before_ms


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> list[Change]:
    """All that both files measured, in the order of the first."""
    late = {(row["case"], row["candidate"]): row for row in after["results"]}
    changes = []
    for row in before["results"]:
        new = late.get((row["case"], row["candidate"]))
        if new is None:
            continue
        factor = new["median_ms"] / row["median_ms"]
        verdict = "same"
        if new["p20_ms"] > row["p80_ms"] and factor > 1 + threshold:
            verdict = "slower"
        elif new["p80_ms"] < row["p20_ms"] and factor < 1 / (1 + threshold):
            verdict = "faster"
        changes.append(
            Change(row["case"], row["candidate"], row["median_ms"], new["median_ms"], verdict)
        )
    return changes


def only_in(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Cases of the first file that the second lacks."""
    there = {(row["case"], row["candidate"]) for row in second["results"]}
    pairs = ((row["case"], row["candidate"]) for row in first["results"])
    return [f"{case}: {candidate}" for case, candidate in pairs if (case, candidate) not in there]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why the times of the files cannot be compared, if so."""
    found = [
        f"{key}: {before['machine'].get(key)!r} and {after['machine'].get(key)!r}"
        for key in SAME
        if before["machine"].get(key) != after["machine"].get(key)
    ]
    if before["benchmark"] != after["benchmark"]:
        found.append(f"benchmark: {before['benchmark']!r} and {after['benchmark']!r}")
    return found


def show(changes: list[Change], everything: bool) -> None:
    table = Table("case", "candidate", "before ms", "after ms", "ratio", "")
    for column in table.columns[2:5]:
        column.justify = "right"
    for change in sorted(changes, key=lambda c: -c.ratio):
        if everything or change.verdict != "same":
            numbers = (f"{change.before_ms:.3f}", f"{change.after_ms:.3f}", f"{change.ratio:.3f}")
            table.add_row(change.case, change.candidate, *numbers, change.verdict)
    if table.row_count:
        Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="of the medians; default 0.05"
    )
    parser.add_argument("--all", action="store_true", help="also show what did not change")
    parser.add_argument("--force", action="store_true", help="compare different machines anyway")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    options = parser.parse_args()
    try:
        before, after = rounds.read(options.before), rounds.read(options.after)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    different = differences(before, after)
    if different and not options.force:
        print(f"Not comparable: {'; '.join(different)}. --force compares anyway.", file=sys.stderr)
        return 2
    changes = compare(before, after, options.threshold)
    if not changes:
        print("The files have no case in common.", file=sys.stderr)
        return 2
    missing, new = only_in(before, after), only_in(after, before)
    count = {verdict: sum(c.verdict == verdict for c in changes) for verdict in VERDICTS}
    if options.json:
        rows = [{**asdict(change), "ratio": change.ratio} for change in changes]
        print(
            json.dumps({"count": count, "missing": missing, "new": new, "changes": rows}, indent=1)
        )
    else:
        show(changes, options.all)
        print(", ".join(f"{number} {verdict}" for verdict, number in count.items()))
        if missing or new:
            print(f"{len(missing)} only before, {len(new)} only after")
    return 1 if count["slower"] else 0


if __name__ == "__main__":
    sys.exit(main())
