"""The benchmarks' own arithmetic, and that the README says what the result files say."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dwattn

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_cpu_layer  # noqa: E402
import bench_growth  # noqa: E402
import bench_table1  # noqa: E402
import bench_vit_l  # noqa: E402
import compare  # noqa: E402
import peers_page  # noqa: E402
import render  # noqa: E402
import rounds  # noqa: E402
import study_page  # noqa: E402


@pytest.mark.parametrize("page", render.PAGES)
def test_pages_say_what_the_results_say(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert len(render.PART.findall(text)) == text.count("<!-- from results: ") >= 2
    assert render.render(text) == text, "run python benchmarks/render.py"


def test_parts_that_are_still_empty_are_written() -> None:
    """Until one was, the shares of a whole ViT-L had never been on their page."""
    empty = "<!-- from results: distill -->\n<!-- end of results -->\n"
    assert render.render(empty + empty).count(render.PARTS["distill"]()) == 2


def test_orderings_are_judged_by_paired_differences() -> None:
    runs = [
        {"label": list(label), "seed": seed, "metrics": {"top1": value}}
        for label, values in (
            (study_page.label(), (0.70, 0.60, 0.65)),
            (study_page.label("conv"), (0.67, 0.57, 0.63)),
            (study_page.label("ens_dw"), (0.72, 0.50, 0.66)),
        )
        for seed, value in enumerate(values)
    ]
    found = {"runs": runs}
    better = study_page.compared(found, "top1", study_page.label(), study_page.label("conv"))
    assert better is not None
    assert better[0] == pytest.approx(8 / 3)
    assert better[1] == pytest.approx(4.303 / 3, rel=1e-3)
    open_ = study_page.compared(found, "top1", study_page.label(), study_page.label("ens_dw"))
    missing = study_page.compared(found, "top1", study_page.label(), study_page.label("spvit"))
    assert missing is None
    assert study_page.verdict([better], 0.11) == "agrees"
    assert study_page.verdict([better], -0.43) == "differs"
    assert study_page.verdict([better, open_], 0.11) == "agrees, open"
    assert study_page.verdict([(2.0, None, 1)], 1.0) == "open"


def test_how_many_blocks_can_go_is_told_for_both_baselines() -> None:
    values = {
        ("mhsa", "", "", "two-stage", ""): (0.90, 0.92),
        ("mhsa", "", "", "one-stage", ""): (0.88, 0.91),
        study_page.label(criterion="residual", count="6"): (0.89, 0.915),
        study_page.label(criterion="residual", count="9"): (0.87, 0.905),
        study_page.label(criterion="variance", count="9"): (0.95, 0.95),
    }
    runs = [
        {"label": list(label), "seed": seed, "metrics": {"top1": value}}
        for label, row in values.items()
        for seed, value in enumerate(row)
    ]
    found = {"runs": runs, "summary": [{"label": list(label)} for label in values]}
    assert [row[:2] for row in study_page.limits(found, "top1")] == [
        ["`dw`", "6 of 12"],
        ["`dw`", "9 of 12"],
    ]
    longer, first = study_page.within(found, "top1")
    assert longer.endswith("trained as long: `dw` 6 of 12.")
    assert first.endswith("alone: `dw` 9 of 12.")
    longer, _ = study_page.within(found, "top1", allowed=0.5)
    assert longer.endswith(": `dw` none of these.")


@pytest.mark.parametrize(
    "name",
    [
        "fidelity",
        "demo",
        "cpu-dw",
        "cpu-layer",
        "cpu-scoring",
        "table1",
        "peers",
        "models",
        "growth",
    ],
)
def test_other_results_would_be_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = shutil.copytree(render.RESULTS, tmp_path / "results")
    path = results / f"{name}.json"
    path.write_text(json.dumps(doubled(json.loads(path.read_text("utf-8")))))
    monkeypatch.setattr(render, "RESULTS", results)
    texts = [(ROOT / page).read_text("utf-8") for page in render.PAGES]
    assert [render.render(text) for text in texts] != texts


def doubled(value: Any) -> Any:
    """The same document with all its fractions doubled."""
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [doubled(item) for item in value]
    return 2 * value if isinstance(value, float) else value


def test_the_layer_says_who_was_faster_and_why() -> None:
    ratios = {"products": 1.0, "cpp": 1.0, "torch": 0.5, "onnxruntime": 0.97, "openvino": 0.99}
    assert bench_cpu_layer.explanation(ratios) == {
        "onnxruntime": bench_cpu_layer.WHY["onnxruntime"]
    }


def test_shares_of_the_possible_gain_are_taken_within_a_round() -> None:
    # Two layers are replaced; the third is the noise of the rest.
    layers = {
        "original": [[50.0, 50.0, 1.0], [100.0, 100.0, 9.0], [50.0, 60.0, 5.0]],
        "12 dw": [[40.0, 40.0, 3.0], [80.0, 80.0, 7.0], [50.0, 45.0, 2.0]],
        "12 removed": [[75.0, 0.0, 4.0], [150.0, 0.0, 4.0], [90.0, 0.0, 4.0]],
    }
    times = {name: bench_vit_l.Times([], rows) for name, rows in layers.items()}
    assert bench_vit_l.share(times, 2, "12 dw", "12 removed") == pytest.approx(
        0.8
    )  # 0.8, 0.8, 0.75


def test_rounds_stop_in_time_and_the_first_warms_up() -> None:
    calls = {"original": lambda: [1.0], "other": lambda: [2.0]}
    least = bench_vit_l.measure(calls, 0, rest=2)
    assert [len(found.whole) for found in least.values()] == [2, 2]
    many = bench_vit_l.measure(calls, 0.01, rest=2)
    assert len(many["original"].whole) == len(many["other"].layers) > 2
    assert many["other"].of_layers(1)[0] == 2.0


def document(*rows: tuple[str, float, float, float], cpu: str = "x") -> dict[str, Any]:
    results = [
        {"case": case, "candidate": "dw", "median_ms": m, "p20_ms": low, "p80_ms": high}
        for case, low, m, high in rows
    ]
    machine = {"CPU": cpu, "threads": "1", "system": "s"}
    return {
        "kind": rounds.KIND, "schema_version": 1, "benchmark": "b", "machine": machine, "results": results
    }  # fmt: skip


BEFORE = document(("a", 9, 10, 11), ("b", 9, 10, 11), ("c", 9, 10, 11), ("d", 9.9, 10, 10.1))


def test_only_changes_beyond_the_noise_count() -> None:
    after = document(
        ("a", 12, 13, 14), ("b", 10, 13, 14), ("c", 7, 8, 8.5), ("d", 10.2, 10.3, 10.4)
    )
    changes = compare.compare(BEFORE, after, 0.05)
    # b: the ranges overlap; d: they do not, but 3% is below the threshold.
    assert [change.verdict for change in changes] == ["slower", "same", "faster", "same"]
    assert changes[0].ratio == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("after", "code", "words"),
    [
        (BEFORE, 0, "0 slower"),
        (document(("a", 12, 13, 14)), 1, "1 slower"),
        (document(("a", 9, 10, 11), cpu="y"), 2, "Not comparable: CPU"),
        (document(("z", 9, 10, 11)), 2, "no case in common"),
        ({"kind": "else"}, 2, "no result file"),
    ],
)
def test_the_command_compares(
    after: Any,
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (BEFORE, after), strict=True):
        path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, paths)])
    assert compare.main() == code
    printed = capsys.readouterr()
    assert words in printed.out + printed.err


def test_costs_are_the_digits_of_the_paper() -> None:
    assert bench_table1.mismatches() == []
    assert bench_table1.agrees(2.434, "2.43")
    assert not bench_table1.agrees(2.46, "2.43")


def test_exponents_of_known_growth() -> None:
    assert bench_growth.exponent({n: 3e-6 * n**2 for n in (64, 256, 1024, 4096)}) == pytest.approx(
        2
    )
    fixed = {n: 5 + 1e-3 * n for n in (64, 256, 1024, 4096)}
    assert 0 < bench_growth.exponent(fixed) < 1


@pytest.mark.parametrize("variant", bench_growth.VARIANTS)
def test_the_prediction_counts_the_operations_of_the_layer(variant: str) -> None:
    sizes = {"tokens": 576, "dim": 1024, "num_heads": 16}
    counted = dwattn.flops(variant, rank=256 if variant == "lowrank_dw" else None, **sizes)
    modelled = sum(kernel.flops for kernel in bench_growth.kernels(variant, 576, 1024, 256))
    assert modelled == pytest.approx(counted, rel=0.02)


def test_predictions_keep_to_the_limits_of_the_device() -> None:
    device = bench_growth.ORIN_NANO
    for variant in bench_growth.VARIANTS:
        ms = bench_growth.predict(variant, 576, 1024)
        parts = bench_growth.kernels(variant, 576, 1024, 256)
        assert ms >= 1e3 * sum(part.flops for part in parts) / device.rate
        assert ms >= 1e3 * sum(part.moved for part in parts) / device.bandwidth
        assert bench_growth.predict(variant, 1369, 1024) > ms


def test_rounds_are_interleaved_and_summarised(tmp_path: Path) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    times = rounds.measure(calls, 0.0, minimum=6)
    assert {len(values) for values in times.values()} == {6}
    after_warm_up = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in after_warm_up)
    assert len({turn[0] for turn in after_warm_up}) == 3

    found = rounds.summarise("case", {"a": [1.0, 2, 3], "b": [2.0, 4, 6]}, "a")
    assert [row.over_floor for row in found] == [1, 2]
    rounds.write(tmp_path / "out.json", "b", found, note="kept")
    read = rounds.read(tmp_path / "out.json")
    assert read["results"][1]["median_ms"] == 4
    assert read["note"] == "kept"
    assert {"CPU", "commit", "created", "torch"} <= set(read["machine"])
    with (tmp_path / "out.csv").open() as file:
        assert [line["candidate"] for line in csv.DictReader(file)] == ["a", "b"]


def test_a_block_is_timed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = tuple(
        bench_table1.Row(v, "", "", ms) for v, ms in (("mhsa", 2.0), ("dw", 1.0), ("ens_dw", 0.5))
    )
    block = bench_table1.Block("small", 3, 2, rows)
    found = bench_table1.run(block, 0.0)
    assert [row.candidate for row in found] == ["mhsa", "dw", "ens_dw", "lowrank_dw"]
    assert found[0].over_floor == 1
    bench_table1.show(block, found)
    assert "0.500" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_layers_runs(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    chosen = [
        "--model",
        "ViT-S",
        "--size",
        "224",
        "--variant",
        "dw",
        "ens_dw",
        "spvit",
        "--runtime",
    ]
    command = [sys.executable, str(BENCHMARKS / "bench_ops.py"), *chosen, "--seconds", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(dwattn.__file__).parents[1])}
    subprocess.run(
        [*command, "--json", str(path)],
        check=True,
        capture_output=True,
        env=environment,
        timeout=300,
    )
    results = rounds.read(path)["results"]
    expected = {"mhsa sdpa", "dw nchw", "dw torch", "ens_dw torch", "spvit torch"}
    assert expected <= {row["candidate"] for row in results}
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in results)


def test_models_are_measured_once_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    import bench_models

    monkeypatch.setitem(bench_models.MODELS, "ViT-S", (48, 2))
    monkeypatch.setitem(bench_models.DEPTHS, "ViT-S", 2)
    path = tmp_path / "models.json"
    command = [
        "bench_models.py",
        "--model",
        "ViT-S",
        "--seconds",
        "0",
        "--photos",
        "0",
        "--compile",
        "--runtime",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(path)])
    bench_models.main()
    written = path.read_text("utf-8")
    rows = rounds.read(path)["results"]
    whole = {row["candidate"] for row in rows if row["case"].startswith("model")}
    assert {
        "mhsa, eager",
        "mhsa unfused, eager",
        "dw, eager",
        "removed, eager",
        "token merging, eager",
    } <= whole
    assert {row["case"].split()[0] for row in rows} == {"block", "model"}
    bench_models.main()  # everything is there already
    assert path.read_text("utf-8") == written
    found = bench_models.calibration(8)
    assert 0 < found["forward_s"] < found["dw_s"]


def peer(method: str, time: float, fidelity: float, pixels: int = 224) -> dict[str, Any]:
    return {
        "case": f"ViT-S/14 at {pixels} px, batch 1", "method": method, "over_floor": time,
        "patch_cosine": fidelity, "iou": fidelity, "cls_cosine": 1 - fidelity,
    }  # fmt: skip


def test_where_the_peer_wins_is_counted() -> None:
    rows = [
        peer("token merging", 0.8, 0.9), peer("dw", 0.9, 0.8), peer("lowrank_dw", 0.7, 0.7), peer("dw", 0.9, 0.95),
        peer("head pruning", 0.9, 0.1), peer("dw", 0.9, 0.95, 448), peer("token merging", 0.95, 0.9, 448),
    ]  # fmt: skip
    small, large = peers_page.dominated(rows).split("At ")[1:]
    assert "than 1 of the 3" in small
    assert "than 1 by saliency" in small
    assert "than 1 by CLS" in small
    assert "than 0 of the 1" in large
