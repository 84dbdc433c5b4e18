"""The demo's real model, six of its twelve blocks replaced and fitted to photos, in every lowering."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dwattn
from dwattn.demo import photos, pretrained
from dwattn.plan import Plan
from support import exports
from support.exports import onnx_run
from support.tensorrt import plugin_library, rtx_environment, run_rtx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = [pytest.mark.model, pytest.mark.slow]

_registry_once = pytest.fixture(scope="module", autouse=True)(exports.cached_registry)

#: Those with the smallest scores on photos, by either criterion or both.
BLOCKS = (1, 2, 3, 4, 6, 11)


@pytest.fixture(scope="module")
def converted() -> Any:
    """The saliency model and some photos that it was not fitted to."""
    pytest.importorskip("skimage")
    pytest.importorskip("timm")
    try:
        model = pretrained.build("timm")
    except dwattn.DataError as error:
        pytest.skip(str(error))
    fitting, held_out = photos.split(photos.pool(total=12), calibration=8, held_out=4)
    plan = Plan.for_layers(model, list(BLOCKS))
    options: dict[str, Any] = {"refit": "attention", "progress": False}
    dwattn.replace(model, plan, calibrate=photos.load(fitting)[0], **options)
    return model, photos.load(held_out)[0]


@pytest.fixture(scope="module")
def written(converted: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports by lowering."""
    folder = tmp_path_factory.mktemp("real")
    return {  # the plugin file is checked in the form of the function file, which is the next one
        lowering: dwattn.export(
            converted[0], folder / f"{lowering}.onnx", 224, lowering=lowering, check=check
        )
        for lowering, check in (("native", True), ("plugin", False), ("function", True))
    }


@pytest.mark.parametrize("lowering", ["native", "function"])
def test_saliency_of_photos_is_that_of_pytorch(lowering: str, converted: Any, written: Any) -> None:
    model, pixels = converted
    report = written[lowering]
    assert report.replaced == len(BLOCKS)
    assert report.max_abs < 1e-4
    with torch.no_grad():
        expected = model(pixels).numpy()
    assert np.ptp(expected) > 0.5  # there is something to see on photos
    found = onnx_run(report.path, pixels)
    assert np.abs(found - expected).max() < 1e-4


def test_a_plugin_file_is_built_into_an_engine(written: Any, tmp_path: Path) -> None:
    rtx_environment(tmp_path)
    report = written["plugin"]
    assert list(report.nodes) == [f"backbone.blocks.{block}.attn" for block in BLOCKS]
    result = run_rtx(tmp_path, "--plugin", plugin_library(), report.path)
    assert result["parsed"], result["stderr"]
    kinds = Counter(kind for _, kind in result["layers"])
    assert kinds["PLUGIN_V3"] == len(BLOCKS)
    convolutions = [n for n in onnx.load(report.path).graph.node if n.op_type == "Conv"]
    assert kinds["CONVOLUTION"] == len(convolutions) == 2  # patches, and the decoder's last
    assert result["engine_bytes"] > 80e6, result["log"]


def test_a_native_file_is_built_into_an_engine(written: Any, tmp_path: Path) -> None:
    result = run_rtx(tmp_path, written["native"].path)
    assert result["parsed"], result["errors"]
    assert result["engine_bytes"] > 80e6, result["log"]
