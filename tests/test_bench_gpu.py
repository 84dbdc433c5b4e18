"""The benchmark of the GPU, as far as no GPU is needed: it runs, covers every target and judges rightly."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from test_benchmarks import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import bench_gpu
import gpu_cases
import gpu_scoring
import gpu_targets

Row = dict[str, Any]


def row(part: str, sizes: dict[str, Any], **medians: float) -> Row:
    times = {name.replace("_", " "): {"median_ms": value} for name, value in medians.items()}
    return {"part": part, "case": sizes, "times": times}


def test_the_committed_cases_cover_every_target() -> None:
    rows = [row(part, sizes) for part, cases in gpu_cases.CASES.items() for sizes in cases]
    rows += [row(part, gpu_scoring.FULL) for part in ("scoring", "memory")]
    assert gpu_targets.unmeasured(rows) == []
    assert {target.part for target in gpu_targets.TARGETS} == {*bench_gpu.PARTS, "memory"}
    # Compiled PyTorch is among the competitors where the target names it.
    about = [r for r in rows if gpu_targets.TARGETS[1].is_about(r)]
    assert {r["case"]["batch"] for r in about} == {8, 64}
    assert all(r["case"]["compile"] for r in about)


def test_ratios_are_judged_against_their_bounds() -> None:
    sizes = gpu_cases.CASES["values"][0]
    good = row("values", sizes, cuda=1.05, value_product=1.0, eager=9.0, compiled=1.5)
    product, best = gpu_targets.judge([good])
    assert (product.ratio, product.met, product.floor) == (1.05, True, 1.0)
    assert best.ratio == pytest.approx(1.5 / 1.05)
    assert (best.met, best.floor) == (True, 1.5)
    slow = row("values", sizes, cuda=1.2, value_product=1.0, eager=1.5)
    assert [j.met for j in gpu_targets.judge([slow])] == [False, False]
    without = gpu_targets.judge([row("values", sizes, value_product=1.0)])
    assert [(j.ratio, j.met) for j in without] == [(None, None), (None, None)]
    assert gpu_targets.judge([row("values", gpu_cases.QUICK["values"][0], cuda=1.0)]) == []


def test_the_kernel_for_hopper_counts_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {**gpu_cases.CASES["values"][0], "hopper": True}
    times = {"cuda": 1.3, "cuda, Hopper's kernel": 1.05, "value_product": 1.0}
    found = gpu_targets.judge([row("values", sizes, **times)])[0]
    assert (found.ratio, found.met) == (1.05, True)
    assert "Hopper" in found.case
    monkeypatch.delenv("DWATTN_CUDA_HOPPER", raising=False)
    assert gpu_cases._asking_for_hopper(lambda: os.environ["DWATTN_CUDA_HOPPER"]) == "1"
    assert "DWATTN_CUDA_HOPPER" not in os.environ


def test_a_narrow_layer_is_held_to_the_copy_and_to_the_best_attention() -> None:
    sizes = gpu_cases.case(24, 1024, 16, 64, "bf16", 64)
    times = {"cuda": 1.0, "copy": 0.72, "attention_flash": 9.0, "attention_cudnn": 7.9}
    found = {j.target: j for j in gpu_targets.judge([row("layers", sizes, **times)])}
    assert found["copy / narrow layer"].met
    assert found["best attention / narrow layer"].ratio == 7.9
    assert found["best attention / narrow layer"].met is False


def test_memory_is_judged_in_bytes() -> None:
    used = {"score, variance alone": 900, "state": 800, "allowed": 1000}
    rows = [{"part": "memory", "case": gpu_scoring.FULL, "bytes": used}]
    (found,) = gpu_targets.judge(rows)
    assert (found.ratio, found.floor, found.met) == (0.9, 0.8, True)


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> Row:
    arguments = ["bench_gpu.py", "--device", "cpu", "--quick", "--json", str(path), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_gpu.main()
    document: Row = json.loads(path.read_text("utf-8"))
    return document


def test_every_part_runs_and_joins_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    first = run(monkeypatch, path, "--part", "values", "scoring")
    assert {r["part"] for r in first["rows"]} == {"values", "scoring"}
    document = run(monkeypatch, path, "--part", "layers", "backward", "values")
    parts = [r["part"] for r in document["rows"]]
    assert sorted(parts) == ["backward"] * 2 + ["layers"] * 2 + ["scoring", "values"]
    for one in document["rows"]:
        for entry in one["times"].values():
            assert 0 < entry["p20_ms"] <= entry["median_ms"] <= entry["p80_ms"]
    # Everything that this machine can run was measured, and every ratio of the end is there.
    calls = {r["part"]: set(r["times"]) for r in document["rows"]}
    assert {"value product", "eager", "channels-last", "cpp"} <= calls["values"]
    assert {"copy", "two products", "attention flash", "torch", "cpp"} <= calls["layers"]
    assert {"conv2d", "conv2d channels-last", "products", "cpp, V again"} <= calls["backward"]
    assert {"plain", "score, variance alone", "hooks"} <= calls["scoring"]
    judged = gpu_targets.judge(document["rows"], everywhere=True)
    assert {j.target for j in judged if j.ratio} == {
        t.name for t in gpu_targets.TARGETS if t.part != "memory"
    }
    assert "hooks / scoring" in capsys.readouterr().out

    changed = {**document, "environment": {**document["environment"], "device": "else"}}
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="another machine"):
        run(monkeypatch, path, "--part", "values")
    assert json.loads(path.read_text("utf-8")) == changed


def test_the_forms_that_compete_compute_the_same() -> None:
    import torch

    layer = gpu_cases.Layer(gpu_cases.QUICK["values"][0], "cpu")
    torch.testing.assert_close(layer.eager_values(), layer.values("torch"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.convolution(True), layer.convolution(False))


def test_the_file_is_named_after_the_gpu() -> None:
    name = bench_gpu.result_path("NVIDIA H200").name
    assert name.startswith("nvidia-h200-20")
    assert name.endswith(".json")


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_gpu.main()
