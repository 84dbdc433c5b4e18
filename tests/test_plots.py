"""The figures of the benchmarks: what is drawn, and that the committed ones are those of the result files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need the demo extra")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plot  # noqa: E402
import rounds  # noqa: E402
import study_page  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("benchmark", ["growth", "ops"])
def test_results_are_drawn(benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"mhsa": [4.0, 5, 6], "dw": [1.0, 2, 3]}
    found = [row for n in (64, 256) for row in rounds.summarise(f"tokens={n}", times, "mhsa")]
    rounds.write(tmp_path / "in.json", benchmark, found)
    out = tmp_path / "out.svg"
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "in.json"), str(out)])
    plot.main()
    drawn = out.read_text("utf-8")
    assert drawn.lstrip().startswith("<?xml")
    assert "<!-- mhsa -->" in drawn


@pytest.mark.parametrize(("name", "size"), [("study-classify", 98), ("study-limits-classify", 518)])
def test_a_study_is_plotted_over_the_time_of_its_models(name: str, size: int) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert study_page.latency_size(found) == size
    (axis,) = plot.study(found).axes
    labels = {text.get_text() for text in axis.get_legend().get_texts()}
    calibrated = {run["label"][0] for run in found["runs"] if run["label"][-1] == "calibrated"}
    assert labels == {*calibrated, "the paper's (Orin Nano)"}
    assert axis.get_ylim()[0] > -20  # other starts lose more


def test_peers_are_drawn(tmp_path: Path) -> None:
    rows = [
        {"case": "224 px", "method": m, "over_floor": t, "patch_cosine": 0.9, "cls_cosine": 0.8}
        for m, t in (("dw", 0.9), ("dw", 0.8), ("token merging", 0.7))
    ]
    figure = plot.pareto(rows)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["dw", "token merging"]
    assert list(lines[0].get_xdata()) == [0.8, 0.9]
    assert list(figure.axes[1].get_lines()[1].get_ydata()) == [0.8]


def test_the_committed_figures_are_those_of_the_results() -> None:
    peers = rounds.read(RESULTS / "peers.json")["machine"]["created"]
    assert peers in (ROOT / "docs" / "peers.svg").read_text("utf-8")
    study = json.loads((RESULTS / "study-limits-classify.json").read_text("utf-8"))["created"]
    assert study in (ROOT / "docs" / "study.svg").read_text("utf-8")
