"""Exported files through the ONNX parser and builder of TensorRT-RTX, which need no GPU: plugin nodes
become plugin layers, mistakes become our sentences. Nothing is computed here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import dwattn
from support import exports
from support.exports import GRID, layer, mixed_vit
from support.tensorrt import plugin_library, rtx_environment, run_rtx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

_registry_once = pytest.fixture(scope="module", autouse=True)(exports.cached_registry)


@pytest.fixture(scope="module")
def library() -> Path:
    return plugin_library()


@pytest.fixture(scope="module", autouse=True)
def _need_rtx(tmp_path_factory: pytest.TempPathFactory) -> None:
    rtx_environment(tmp_path_factory.mktemp("rtx"))  # skips, with the reason, where there is none


def export(model: nn.Module, path: Path, lowering: str, **options: Any) -> Path:
    """A 32 x 24 image, or the grid of a bare layer."""
    size = GRID if hasattr(model, "grid") else (32, 24)
    dwattn.export(model, path, size, lowering=lowering, check=False, **options)
    return path


def kinds(result: dict[str, Any]) -> Counter[str]:
    """Number of layers by type, of a file that was parsed."""
    assert result["parsed"], (result["errors"], result["stderr"])
    return Counter(kind for _, kind in result["layers"])


# Engines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("exact", "fp32"), ("static", "fp16"), ("drop", "fp32")]
)
def test_plugin_files_become_engines(
    prefix: str, dtype: str, library: Path, tmp_path: Path
) -> None:
    path = export(mixed_vit(prefix), tmp_path / "model.onnx", "plugin", dtype=dtype)
    result = run_rtx(tmp_path, "--plugin", library, path)
    assert result["creators"] == ["DWAttention", "LowRankDWAttention"]
    found = kinds(result)
    assert found["PLUGIN_V3"] == 3
    assert found["CONVOLUTION"] == 1  # the patch embedding
    names = [name for name, kind in result["layers"] if kind == "PLUGIN_V3"]
    assert names == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert result["engine_bytes"] > 0, result["log"]


def test_a_dynamic_size_becomes_an_engine(library: Path, tmp_path: Path) -> None:
    path = export(mixed_vit(dynamic=True), tmp_path / "m.onnx", "plugin", dynamic_size=True)
    sides = ("--dynamic", "height=24:32:64", "--dynamic", "width=24:32:64")
    result = run_rtx(tmp_path, "--plugin", library, *sides, path)
    assert kinds(result)["PLUGIN_V3"] == 3
    assert result["engine_bytes"] > 0, result["log"]


@pytest.mark.parametrize("lowering", ["native", "conv2d"])
def test_other_files_become_engines_without_the_library(lowering: str, tmp_path: Path) -> None:
    path = export(mixed_vit("static"), tmp_path / "model.onnx", lowering)
    result = run_rtx(tmp_path, path)
    found = kinds(result)
    assert "PLUGIN_V3" not in found
    assert found["CONVOLUTION"] >= 4  # three replaced layers and the patch embedding
    assert result["engine_bytes"] > 0, result["log"]


# Function or plugin ----------------------------------------------------------------------------


def with_attributes(source: Path, path: Path, **changed: Any) -> Path:
    """The file with attributes of its layer nodes set, or removed where None."""
    model = onnx.load(source)
    for node in model.graph.node:
        if node.domain == "dwattn":
            kept = [a for a in node.attribute if a.name not in changed]
            given = {name: value for name, value in changed.items() if value is not None}
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.extend(onnx.helper.make_attribute(n, v) for n, v in given.items())
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def function_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(layer("dw"), tmp_path_factory.mktemp("function") / "layer.onnx", "function")


@pytest.mark.parametrize(
    ("changed", "with_library", "expected"),
    [
        ({}, True, "PLUGIN_V3"),  # as it is written
        ({}, False, "CONVOLUTION"),
        ({"plugin_version": None, "plugin_namespace": None}, True, "CONVOLUTION"),
        ({"plugin_namespace": None}, True, "CONVOLUTION"),
        # A wrong version or namespace takes the body in silence: why a plugin file has none.
        ({"plugin_version": "2"}, True, "CONVOLUTION"),
        ({"plugin_namespace": "other"}, True, "CONVOLUTION"),
    ],
)
@pytest.mark.parametrize("override", [False, True])
def test_which_of_plugin_and_body_is_taken(
    changed: dict[str, Any], with_library: bool, expected: str, override: bool,
    function_file: Path, library: Path, tmp_path: Path,
) -> None:  # fmt: skip
    path = with_attributes(function_file, tmp_path / "layer.onnx", **changed)
    options = ["--override"] * override + (["--plugin", str(library)] if with_library else [])
    found = kinds(run_rtx(tmp_path, "--no-build", *options, path))
    other = {"PLUGIN_V3", "CONVOLUTION"} - {expected}
    assert found[expected] == 1
    assert not other & set(found)


# Mistakes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(layer("dw"), tmp_path_factory.mktemp("plugin") / "layer.onnx", "plugin")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"height": 7}, ["20 tokens", "num_prefix + height * width = 5 + 7 * 5 = 40"]),
        ({"width": -1}, ["width=-1"]),
        ({"prefix": "often"}, ["'prefix'", "'often'"]),
        ({"num_heads": 5}, ["num_heads=5", "48"]),
        ({"inputs": "x wv"}, ["'inputs'", "x wv"]),
        ({"num_prefix": "five"}, ["'num_prefix'"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_wrong_fields_are_refused_with_our_words(
    changed: dict[str, Any], words: list[str], plugin_file: Path, library: Path, tmp_path: Path
) -> None:
    path = with_attributes(plugin_file, tmp_path / "layer.onnx", **changed)
    result = run_rtx(tmp_path, "--plugin", library, path)
    assert not result["parsed"]
    assert all(word in result["stderr"] for word in ("DWAttention", *words)), result


def test_a_version_that_the_library_does_not_have_is_no_plugin(
    plugin_file: Path, library: Path, tmp_path: Path
) -> None:
    path = with_attributes(plugin_file, tmp_path / "layer.onnx", plugin_version="2")
    result = run_rtx(tmp_path, "--plugin", library, path)
    assert not result["parsed"]
    assert "Plugin not found" in " ".join(result["errors"])


def test_a_namespace_must_be_right_in_the_attribute_or_the_domain(
    plugin_file: Path, library: Path, tmp_path: Path
) -> None:
    path = with_attributes(plugin_file, tmp_path / "layer.onnx", plugin_namespace="other")
    found = kinds(run_rtx(tmp_path, "--no-build", "--plugin", library, path))
    assert found["PLUGIN_V3"] == 1  # the node's domain is looked up too
    model = onnx.load(path)
    model.graph.node[0].domain = "other"
    model.opset_import.append(onnx.helper.make_opsetid("other", 1))
    onnx.save(model, path)
    result = run_rtx(tmp_path, "--no-build", "--plugin", library, path)
    assert not result["parsed"]
    assert "Plugin not found" in " ".join(result["errors"])


def test_without_the_library_a_plugin_file_is_refused(plugin_file: Path, tmp_path: Path) -> None:
    result = run_rtx(tmp_path, plugin_file)
    assert not result["parsed"]
    assert "Plugin not found" in " ".join(result["errors"])


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        ({"x", "output", "wv", "wo", "query", "key"}, np.int32, ["'x'", "INT32", "FLOAT, HALF"]),
        ({"kernel"}, np.float16, ["'kernel'", "HALF", "FLOAT"]),
        ({"wo"}, np.float16, ["'wo'", "HALF", "FLOAT"]),
    ],
)
def test_unsupported_types_are_refused_with_our_words(
    names: set[str], kind: Any, words: list[str], plugin_file: Path, library: Path, tmp_path: Path
) -> None:
    model = onnx.load(plugin_file)
    for tensor in model.graph.initializer:
        if tensor.name.rpartition(".")[2] in names:
            array = onnx.numpy_helper.to_array(tensor).astype(kind)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    if "x" in names:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    onnx.save(model, tmp_path / "layer.onnx")
    result = run_rtx(tmp_path, "--plugin", library, tmp_path / "layer.onnx")
    assert not result["parsed"]
    assert all(word in result["stderr"] for word in words), result
