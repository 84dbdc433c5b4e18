"""What the kernels have to reach on a GPU, judged on the measured cases.

Each target is a ratio of two medians of one case, with the bound it must keep and, where there is one, the
ratio that the cost floor itself would give: how much room is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Ratio = Callable[[Mapping[str, float]], "float | None"]
Row = dict[str, Any]


def time_of(*names: str) -> Ratio:
    """The shortest of these times; None where none was measured."""

    def shortest(times: Mapping[str, float]) -> float | None:
        return min((times[name] for name in names if name in times), default=None)

    return shortest


def over(above: Ratio, below: Ratio) -> Ratio:
    def quotient(times: Mapping[str, float]) -> float | None:
        numerator, denominator = above(times), below(times)
        return numerator / denominator if numerator is not None and denominator else None

    return quotient


#: The compiled kernels: of the GPU, or of the CPU where the benchmark itself is tried out.
OURS = time_of("cuda", "cuda, Hopper's kernel", "cpp")
ATTENTION = time_of("attention flash", "attention cudnn", "attention efficient")
PLAIN_VALUES = time_of("eager", "channels-last", "compiled")
CONVOLUTION = time_of("conv2d", "conv2d channels-last")
#: Scoring by the first backend that runs, or by the one that the caller names.
SCORING_WAYS = ("score, no residual", "score on cuda, no residual", "score on triton, no residual")
SCORING = time_of(*SCORING_WAYS)
#: Under this name rows of memory have the way that counts for time too: one way has to reach both.
FASTEST_SCORING = "fastest scoring"


@dataclass(frozen=True)
class Target:
    """One acceptance.

    Args:
        part, where: the cases it is about: a part, and values or sets of values of their sizes.
        ratio: of the median times of a case.
        floor: the same ratio if the kernel took no longer than the unavoidable work.
        bound: the limit; at_most: whether smaller is better.
    """

    name: str
    part: str
    where: Mapping[str, Any]
    ratio: Ratio
    bound: float
    at_most: bool
    floor: Ratio | None = None

    def is_about(self, row: Row) -> bool:
        sizes = row["case"]
        return row["part"] == self.part and all(
            sizes.get(key) in (wanted if isinstance(wanted, tuple) else (wanted,))
            for key, wanted in self.where.items()
        )

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound


_LARGE = {"dim": 1024, "dtype": "bf16"}
_BLOCK = {**_LARGE, "batch": 64}
_NARROW = {**_BLOCK, "width": (64, 128)}
TARGETS = (
    Target(
        "V + aggregation / value product", "values", {**_LARGE, "tokens": 576, "batch": (8, 64)},
        over(OURS, time_of("value product")), 1.10, at_most=True, floor=lambda _: 1.0,
    ),
    Target(
        "best PyTorch / V + aggregation", "values", {**_LARGE, "tokens": 576, "batch": (8, 64)},
        over(PLAIN_VALUES, OURS), 1.3, at_most=False,
        floor=over(PLAIN_VALUES, time_of("value product")),
    ),
    Target(
        "best attention / dw block", "layers", {**_BLOCK, "tokens": 576, "width": 1024},
        over(ATTENTION, OURS), 2.5, at_most=False, floor=over(ATTENTION, time_of("two products")),
    ),
    Target(
        "best attention / dw block", "layers", {**_BLOCK, "tokens": 1369, "width": 1024},
        over(ATTENTION, OURS), 4.0, at_most=False, floor=over(ATTENTION, time_of("two products")),
    ),
    Target(
        "copy / narrow layer", "layers", _NARROW,
        over(time_of("copy"), OURS), 0.70, at_most=False, floor=lambda _: 1.0,
    ),
    Target(
        "best attention / narrow layer", "layers", {**_NARROW, "tokens": 576},
        over(ATTENTION, OURS), 8.0, at_most=False, floor=over(ATTENTION, time_of("copy")),
    ),
    Target(
        "backward / autograd of linear + conv2d", "backward", {},
        over(OURS, CONVOLUTION), 1.2, at_most=True, floor=over(time_of("products"), CONVOLUTION),
    ),
    Target(
        "scoring / plain pass", "scoring", {},
        over(SCORING, time_of("plain")), 1.5, at_most=True,
        floor=lambda _: 1.0,
    ),
    Target(
        "hooks / scoring", "scoring", {},
        over(time_of("naive hooks"), SCORING), 10.0, at_most=False,
        floor=over(time_of("naive hooks"), time_of("plain")),
    ),
    Target(
        "memory of scoring / (state + 256 MB)", "memory", {},
        over(time_of(FASTEST_SCORING), time_of("allowed")), 1.0, at_most=True,
        floor=over(time_of("state"), time_of("allowed")),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    target: str
    case: str
    ratio: float | None
    bound: float
    at_most: bool
    floor: float | None
    met: bool | None


def judge(rows: Iterable[Row], *, everywhere: bool = False) -> list[Judgement]:
    """Every target on every case it is about.

    Args:
        rows: ``{"part", "case", "times"}`` or, of memory, ``"bytes"`` for times.
        everywhere: also on cases of other sizes, which says nothing about the targets themselves.
    """
    found = []
    rows = list(rows)
    for target in TARGETS:
        for row in rows:
            about = row["part"] == target.part if everywhere else target.is_about(row)
            if not about:
                continue
            medians = row.get("bytes") or {
                name: entry["median_ms"] for name, entry in row["times"].items()
            }
            ratio = target.ratio(medians)
            found.append(
                Judgement(
                    target.name, describe(row["case"]), ratio, target.bound, target.at_most,
                    target.floor(medians) if target.floor else None,
                    None if ratio is None else target.met(ratio),
                )
            )  # fmt: skip
    return found


def unmeasured(rows: Iterable[Row]) -> list[str]:
    """Targets that no row is about."""
    rows = list(rows)
    return [
        f"{target.name} ({target.bound:g})"
        for target in TARGETS
        if not any(target.is_about(row) for row in rows)
    ]


def describe(sizes: Mapping[str, Any]) -> str:
    width = sizes.get("width")
    inner = "" if width in (None, sizes["dim"]) else f" r={width}"
    asked = ", Hopper's kernel too" if sizes.get("hopper") else ""
    return f"n={sizes['tokens']} D={sizes['dim']} b={sizes['batch']} {sizes['dtype']}{inner}{asked}"


def times_table(rows: Iterable[Row]) -> Table:
    """All medians with their spread."""
    table = Table(title="Times in ms")
    for name in ("part", "case", "call", "median", "p20", "p80"):
        table.add_column(name, justify="left" if name in ("part", "case", "call") else "right")
    for row in rows:
        for name, entry in row.get("times", {}).items():
            numbers = (f"{entry[key]:.4g}" for key in ("median_ms", "p20_ms", "p80_ms"))
            table.add_row(row["part"], describe(row["case"]), name, *numbers)
    return table


def targets_table(judgements: Iterable[Judgement]) -> Table:
    table = Table(title="Ratios: what was reached, what is asked for, what the floor would give")
    for name in ("ratio of", "case", "reached", "target", "floor", "met"):
        table.add_column(name, justify="left" if name in ("ratio of", "case") else "right")
    for j in judgements:
        sign = "<=" if j.at_most else ">="
        table.add_row(
            j.target, j.case, "not measured" if j.ratio is None else f"{j.ratio:.2f}",
            f"{sign} {j.bound:g}", "" if j.floor is None else f"{j.floor:.2f}",
            {None: "", True: "yes", False: "no"}[j.met],
        )  # fmt: skip
    return table
