"""Replaced layers as single ONNX nodes: what their bodies compute, what a file holds, what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.attention import EnsembleDWAttention
from dwattn.errors import ExportError
from dwattn.export import ExportReport
from dwattn.plan import Plan
from dwattn.surgery import replace
from support import exports
from support.exports import GRID, VARIANTS, layer, mixed_vit, onnx_run, tokens
from support.models import BY_NAME, first_tensor, hf_model, timm_vit

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

_registry_once = pytest.fixture(scope="module", autouse=True)(exports.cached_registry)


def node_of(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.domain == "dwattn"]


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# Bodies ----------------------------------------------------------------------------------------


def one_node(module: nn.Module, path: Path, *, half: bool = False, dynamic: bool = False) -> Path:
    """A file with nothing but the layer's node and its body, made without the exporter."""
    import onnx_ir as ir

    from dwattn.export.function import attach_bodies
    from dwattn.export.node import LayerNode, ordered

    with torch.no_grad():
        lowered = LayerNode(module, GRID)
    lowered = lowered.half() if half else lowered
    kind = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    values = {
        "x": ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["B", None, exports.DIM]))
    }
    if dynamic:
        shape = ir.Shape([1, None, None])
        values["grid"] = ir.Value(name="grid", type=ir.TensorType(ir.DataType.BOOL), shape=shape)
    given = list(values.values())
    for name, tensor in lowered.named_buffers():
        constant = ir.tensor(tensor.numpy(), name=name)
        values[name] = ir.Value(
            name=name,
            const_value=constant,
            type=ir.TensorType(constant.dtype),
            shape=constant.shape,
        )
    names = ordered(values)
    fields: dict[str, Any] = {**lowered.attributes, "inputs": " ".join(names)}
    fields |= {"height": 0, "width": 0} if dynamic else {}
    node = ir.node(
        lowered.op_type, [values[n] for n in names], fields, domain="dwattn", num_outputs=1
    )
    out = node.outputs[0]
    out.name, out.type, out.shape = "out", ir.TensorType(kind), values["x"].shape
    weights = [value for value in values.values() if value.const_value is not None]
    graph = ir.Graph(
        given,
        [out],
        nodes=[node],
        initializers=weights,
        opset_imports={"": 18, "dwattn": 1},
        name="layer",
    )
    model = ir.Model(graph, ir_version=10)
    attach_bodies(model)
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    return path


CASES = [
    (variant, prefix, options)
    for variant, prefix in itertools.product(VARIANTS, ("exact", "static", "drop"))
    for options in (
        {},
        {"qkv_bias": False, "proj_bias": False, "context": False},
        *([{"own_prefix_value": True, "own_prefix_proj": True}] if prefix == "exact" else []),
    )
]


@pytest.mark.parametrize(("variant", "prefix", "options"), CASES)
def test_bodies_compute_the_layer(
    variant: str, prefix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    module = layer(variant, prefix, **options)
    path = one_node(module, tmp_path / "node.onnx")
    half = one_node(module, tmp_path / "half.onnx", half=True)
    for batch in (1, 3):
        x = tokens(module, batch)
        with torch.no_grad():
            expected = module(x).numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(onnx_run(path, x), expected, atol=1e-5 * scale, rtol=0)
        found = onnx_run(half, x.half())
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, atol=1e-2 * scale, rtol=0)


@pytest.mark.parametrize(("rank", "kind"), [(816, "LowRankDWAttention"), (824, "DWAttention")])
def test_layers_too_wide_for_the_narrow_kernel_take_the_other(rank: int, kind: str) -> None:
    from dwattn.export.node import LayerNode

    wide = dwattn.LowRankDWAttention(832, 8, rank=rank, grid=GRID)
    with torch.no_grad():
        assert LayerNode(wide, GRID).op_type == kind


@pytest.mark.parametrize("prefix", ["exact", "drop"])
def test_a_body_reads_the_grid_from_the_shape_of_an_input(prefix: str, tmp_path: Path) -> None:
    import onnxruntime

    module = layer("dw", prefix)
    path = one_node(module, tmp_path / "node.onnx", dynamic=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for height, width in ((3, 5), (5, 3), (2, 7)):
        module.grid = (height, width)
        x = torch.randn(2, int(module.num_prefix) + height * width, exports.DIM)  # type: ignore[arg-type]
        grid = np.zeros((1, height, width), dtype=bool)
        found = session.run(None, {"x": x.numpy(), "grid": grid})[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-4, atol=1e-4)


# Files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["exact", "static"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of all variants, and its reports by lowering."""
    model = mixed_vit(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reports = {
        lowering: dwattn.export(
            model, folder / f"{lowering}.onnx", (32, 24), lowering=lowering, check=check
        )
        for lowering, check in (("function", True), ("plugin", False))
    }
    return model, reports


def test_function_files_run_on_onnxruntime(mixed: Any) -> None:
    model, reports = mixed
    assert reports["function"].max_rel < 1e-5
    x = torch.randn(5, 3, 32, 24)  # a batch the export never saw
    with torch.no_grad():
        expected = first_tensor(model(x)).numpy()
    found = onnx_run(reports["function"].path, x)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_both_files_hold_the_same_nodes_and_weights_and_one_holds_bodies(mixed: Any) -> None:
    _, reports = mixed
    function, plugin = (onnx.load(reports[name].path) for name in ("function", "plugin"))
    assert len(function.functions) == 3
    assert not plugin.functions
    assert [node.overload for node in node_of(plugin.graph)] == ["", "", ""]
    # The two narrow layers differ in their inputs or widths: one name, two bodies.
    assert [(f.name, f.overload) for f in function.functions] == [
        ("DWAttention", ""), ("LowRankDWAttention", ""), ("LowRankDWAttention", "kind1"),
    ]  # fmt: skip
    for one, other in zip(node_of(function.graph), node_of(plugin.graph), strict=True):
        one.ClearField("overload")
        other.ClearField("overload")
        assert one == other
    assert list(function.graph.initializer) == list(plugin.graph.initializer)


def test_only_overloads_need_a_newer_format_of_the_file(mixed: Any) -> None:
    _, reports = mixed
    for lowering, version in (("function", 10), ("plugin", 8)):
        report = reports[lowering]
        assert (report.ir_version, onnx.load(report.path).ir_version) == (version, version)


def test_nodes_are_as_the_plugin_library_expects_them(mixed: Any) -> None:
    from dwattn.export.node import INPUTS, WEIGHTS

    model, reports = mixed
    prefix = model.blocks[0].attn.layer.prefix
    report: ExportReport = reports["plugin"]
    assert report.lowering == "plugin"
    assert report.nodes == {
        "blocks.0.attn": "dwattn::DWAttention 1",
        "blocks.1.attn": "dwattn::LowRankDWAttention 1",
        "blocks.2.attn": "dwattn::LowRankDWAttention 1",
    }
    proto = onnx.load(report.path)
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 18), ("dwattn", 1)}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for block, node in enumerate(node_of(proto.graph)):
        fields = attributes(node)
        names = fields.pop("inputs").decode().split()
        assert fields == {
            "plugin_version": b"1", "plugin_namespace": b"dwattn", "height": 4, "width": 3,
            "num_prefix": 0 if prefix == "drop" else 5, "prefix": prefix.encode(),
            "num_heads": 3 if prefix == "exact" else 0,
        }  # fmt: skip
        assert len(names) == len(node.input)
        assert names == [name for name in INPUTS if name in names]  # in the agreed order
        assert {"x", "residual", "gamma", "wv", "kernel", "wo"} <= set(names)
        sizes = {name: shapes.get(given) for name, given in zip(names, node.input, strict=True)}
        channels = (48, 24, 16)[block]
        assert sizes["wv"] == (channels, 48)
        assert sizes["wo"] == (48, channels)
        assert sizes["kernel"] == (channels, 3, 3)
        assert all(sizes[name] is not None for name in names if name in WEIGHTS)
        wide = block == 2 or (block == 1 and prefix == "exact")  # prefix rows of all heads
        assert ("prefix_value" in names) == (wide and prefix != "drop")


def test_half_precision_keeps_coefficients_in_fp32(tmp_path: Path) -> None:
    from dwattn.export.node import WEIGHTS

    report = dwattn.export(
        mixed_vit("static"), tmp_path / "half.onnx", (32, 24), lowering="plugin", dtype="fp16"
    )
    assert report.max_rel is not None
    assert 1e-6 < report.max_rel < 1e-2
    graph = onnx.load(report.path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in node_of(graph):
        names = attributes(node)["inputs"].decode().split()
        for name, given in zip(names, node.input, strict=True):
            if given in types:
                half = name in WEIGHTS
                assert types[given] == (
                    onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
                )


def test_a_dynamic_size_is_read_from_the_patch_embedding(tmp_path: Path) -> None:
    model = mixed_vit(dynamic=True)
    path = tmp_path / "model.onnx"
    report = dwattn.export(model, path, (32, 24), lowering="function", dynamic_size=True)
    assert {p.size for p in report.parity} > {(32, 24)}
    graph = onnx.load(path).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    for node in node_of(graph):
        fields = attributes(node)
        given = dict(zip(fields["inputs"].decode().split(), node.input, strict=True))
        assert makers[given["grid"]] == "Conv"
        assert (fields["height"], fields["width"]) == (0, 0)
    for size in ((24, 56), (64, 40)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(onnx_run(path, x), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("build", "size", "taken"),
    [
        (lambda: timm_vit(depth=1), (32, 24), {"residual"}),
        (
            lambda: hf_model("Dinov2", num_hidden_layers=1),
            BY_NAME["hf-dinov2"].size,
            {"gamma", "residual"},
        ),
    ],
    ids=["timm without LayerScale", "transformers"],
)
def test_layer_scale_and_residual_become_a_part_of_the_node(
    build: Any, size: tuple[int, int], taken: set[str], tmp_path: Path
) -> None:
    model = build()
    replace(model, Plan.for_layers(model, [0]))
    report = dwattn.export(model, tmp_path / "model.onnx", size, lowering="plugin")
    (node,) = node_of(onnx.load(report.path).graph)
    names = set(attributes(node)["inputs"].decode().split())
    assert names & {"gamma", "residual"} == taken


class Branches(nn.Module):
    """A model that shows a layer's own result: what follows the layer may not swallow it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_vit(depth=1, num_classes=0, init_values=0.5)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attention: Any = self.backbone.get_submodule("blocks.0.attn")
        shown: list[Tensor] = []
        handle = attention.register_forward_hook(lambda _, __, out: shown.append(out))
        tokens = self.backbone.forward_features(x)  # type: ignore[operator]
        handle.remove()
        return tokens, shown[0]


def test_a_result_that_others_read_is_not_fused(tmp_path: Path) -> None:
    model = Branches()
    replace(model, Plan.for_layers(model, [0]))
    report = dwattn.export(model.eval(), tmp_path / "model.onnx", (32, 24), lowering="function")
    (node,) = node_of(onnx.load(report.path).graph)
    assert not {"gamma", "residual"} & set(attributes(node)["inputs"].decode().split())


# A whole model ---------------------------------------------------------------------------------


class Passing(nn.Module):
    """No attention at all: what is left of a graph is what a layer's node may not add to."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


@pytest.mark.slow
def test_nothing_surrounds_the_nodes_of_a_dinov2_s(tmp_path: Path) -> None:
    import timm

    model = timm.create_model(
        "vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=224, num_classes=0, depth=3
    ).eval()  # fmt: skip
    chosen = [1, 2]
    replace(model, Plan.for_layers(model, chosen))
    options: dict[str, Any] = {"method": "forward_features", "lowering": "plugin"}
    report = dwattn.export(model, tmp_path / "plugin.onnx", 224, **options)
    for block in chosen:
        model.blocks[block].attn = Passing()
    bare = dwattn.export(model, tmp_path / "bare.onnx", 224, **options)
    added = Counter(report.ops)
    added.subtract(Counter(bare.ops))
    # The nodes, which have taken the LayerScale product and the residual sum of their blocks.
    assert {op: n for op, n in added.items() if n} == {"DWAttention": 2, "Mul": -2, "Add": -2}
    convolutions = [n for n in onnx.load(report.path).graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 1  # the patch embedding


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["plugin", "conv2d"])
@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (timm_vit, {"variant": "conv"}, ["blocks.0.attn", "'conv'", "native"]),
        (timm_vit, {"variant": "spvit"}, ["blocks.0.attn", "'spvit'", "native"]),
        (timm_vit, {"heads": [1]}, ["blocks.0.attn", "scattered dw", "native"]),
        (lambda: timm_vit(qk_norm=True), {}, ["blocks.0.attn", "prefix='static'"]),
    ],
)
def test_layers_beyond_the_plugin_are_refused_before_any_work(
    build: Any, options: dict[str, Any], words: list[str], lowering: str, tmp_path: Path
) -> None:
    model = build()
    heads = [options["heads"]] if "heads" in options else None
    chosen = {name: value for name, value in options.items() if name != "heads"}
    replace(model, Plan.for_layers(model, [0], heads), **chosen)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ExportError) as caught:
        dwattn.export(model, tmp_path / "model.onnx", (32, 24), lowering=lowering)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.iterdir())


def test_a_wrong_body_or_a_wrong_weight_leaves_no_plugin_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwattn.export import node

    original = node.layer_tensors

    def wrong(module: EnsembleDWAttention) -> dict[str, Tensor]:
        return original(module) | {"kernel": module.kernel.flip(-1)}

    monkeypatch.setattr(node, "layer_tensors", wrong)
    with pytest.raises(ExportError, match="does not agree with PyTorch"):
        dwattn.export(layer("dw"), tmp_path / "layer.onnx", GRID, lowering="plugin")
    assert not list(tmp_path.iterdir())


# Static graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["static", "drop"])
def test_conv2d_files_are_static_and_have_no_product_of_tokens(prefix: str, tmp_path: Path) -> None:
    model = mixed_vit(prefix)
    report = dwattn.export(model, tmp_path / "model.onnx", (32, 24), lowering="conv2d")
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    proto = onnx.load(report.path)
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (
        8,
        [("", 17)],
    )
    assert report.inputs == {"pixel_values": [1, 3, 32, 24]}
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert {len(weights[node.input[1]]) for node in convolutions} == {4}
    assert sum(weights[n.input[1]] == (24, 1, 3, 3) for n in convolutions) == 1
    # Two products in each MLP, and in the attention that is left qkv, scores, mix and projection.
    assert report.ops["MatMul"] == 4 * 2 + 4
    assert "Shape" not in report.ops


def test_conv2d_refuses_what_is_not_static(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"softmax attention.*prefix='static'"):
        dwattn.export(layer("dw"), path, GRID, lowering="conv2d")
    for option in ("dynamic_batch", "dynamic_size"):
        with pytest.raises(ExportError, match=f"{option}=True cannot be met"):
            dwattn.export(layer("dw", "drop"), path, GRID, lowering="conv2d", **{option: True})
    with pytest.raises(ExportError, match=r"opset=20 is outside 17 to 18"):
        dwattn.export(layer("dw", "drop"), path, GRID, lowering="conv2d", opset=20)


class Picky(nn.Module):
    """Sorts the patches: an operator beyond a static compiler's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_vit(depth=1, num_classes=0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)  # type: ignore[operator]
        return torch.topk(tokens, 3, dim=1).values


def test_conv2d_names_the_operators_and_nodes_it_refuses(tmp_path: Path) -> None:
    model = Picky()
    replace(model, Plan.for_layers(model, [0]), prefix="static")
    with pytest.raises(ExportError, match=r"operator TopK \(\w+\)"):
        dwattn.export(model.eval(), tmp_path / "model.onnx", (32, 24), lowering="conv2d")
    assert not list(tmp_path.iterdir())
