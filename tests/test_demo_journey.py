"""The demo in small, on the real model: what it leaves behind, and its converted model as ONNX Runtime and TensorRT take it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dwattn
from dwattn.demo import photos, pretrained, run
from dwattn.report import Results
from support import exports
from support.exports import onnx_run
from support.tensorrt import plugin_library, rtx_environment, run_rtx

onnx = pytest.importorskip("onnx")
for package in ("skimage", "timm", "onnxruntime", "matplotlib"):
    pytest.importorskip(package)

pytestmark = [pytest.mark.model, pytest.mark.slow]

_registry_once = pytest.fixture(scope="module", autouse=True)(exports.cached_registry)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journey")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """A dozen photos, three conversions."""
    try:
        pretrained.onnx_path()
    except dwattn.DataError as error:
        pytest.skip(str(error))
    return run(folder, quick=True, json=True, calibration=20, held_out=10, threads=1)


@pytest.fixture(scope="module")
def student(results: Results, folder: Path) -> Any:
    """The converted model as its file has it."""
    return dwattn.load(pretrained.build("timm"), folder / "student.safetensors").eval()


def test_every_file_is_there_and_the_numbers_are_sane(results: Results, folder: Path) -> None:
    assert Results.load(folder / "results.json").to_dict() == results.to_dict()
    for name in ("report.html", "student.onnx", "student.safetensors"):
        assert (folder / name).stat().st_size > 10_000
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert results.export is not None
    assert results.export.max_difference < 1e-3
    fitted, narrow, gaussian = results.conversions
    assert len(fitted.blocks) == 6
    assert fitted.fidelity.cosine > 0.8 > 0.6 > gaussian.fidelity.cosine
    assert narrow.fidelity.cosine > 0.7
    (latency, *_) = results.latency
    assert latency.median("removed") < latency.median("original")
    assert [row.outcome for row in results.layers].count("replaced") == 6


def test_the_written_model_is_the_exported_one(student: Any, folder: Path) -> None:
    pixels, _ = photos.load(photos.split(photos.pool(30))[1][:3])
    with torch.no_grad():
        expected = student(pixels).numpy()
    assert np.ptp(expected) > 0.5  # there is something to see on photos
    assert np.abs(onnx_run(folder / "student.onnx", pixels) - expected).max() < 1e-4


def test_a_plugin_file_is_built_into_an_engine(
    student: Any, results: Results, tmp_path: Path
) -> None:
    rtx_environment(tmp_path)
    # Checked on onnxruntime in the form of a function file.
    report = dwattn.export(student, tmp_path / "plugin.onnx", 224, lowering="plugin")
    assert report.max_abs is not None
    assert report.max_abs < 1e-4
    blocks = results.conversions[0].blocks
    assert list(report.nodes) == [f"backbone.blocks.{block}.attn" for block in blocks]
    result = run_rtx(tmp_path, "--plugin", plugin_library(), report.path)
    assert result["parsed"], result["stderr"]
    kinds = Counter(kind for _, kind in result["layers"])
    assert kinds["PLUGIN_V3"] == len(blocks)
    convolutions = [n for n in onnx.load(report.path).graph.node if n.op_type == "Conv"]
    assert kinds["CONVOLUTION"] == len(convolutions) == 2  # patches, and the decoder's last
    assert result["engine_bytes"] > 80e6, result["log"]


def test_a_native_file_is_built_into_an_engine(
    results: Results, folder: Path, tmp_path: Path
) -> None:
    result = run_rtx(tmp_path, folder / "student.onnx")
    assert result["parsed"], result["errors"]
    assert result["engine_bytes"] > 80e6, result["log"]
