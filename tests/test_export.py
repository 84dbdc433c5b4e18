"""ONNX export: every family on onnxruntime, every variant's lowering, and no file without parity."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.adapters import describe
from dwattn.errors import ExportError, UnsupportedAttentionError
from dwattn.export.target import make_target
from dwattn.plan import Plan
from dwattn.surgery import replace
from support import exports
from support.models import BY_NAME, DINOV3, first_tensor, hf_model, randomise, timm_eva, timm_vit

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FAMILIES = [
    "timm-reg4",
    "timm-no-class",
    "timm-qk-norm",
    "hf-dinov2-reg",
    "hf-vit",
    "hf-vit-mae",
    "hf-clip",
    "hub-reg4",
    "hub-chunked",
]


def run(path: Path, x: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Every output of a file, computed by onnxruntime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(
        zip(names, session.run(names, {session.get_inputs()[0].name: x.numpy()}), strict=True)
    )


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Block 0 whole and one head of block 1; others, if there are any, are left alone."""
    replace(model, Plan.for_layers(model, [0, 1], [None, [1]]), **options)
    return model


def shortened(model: nn.Module) -> nn.Module:
    """The first two blocks: every block costs the exporter time and teaches nothing new."""
    blocks = describe(model).blocks
    parent = model.get_submodule(blocks[0].name.rpartition(".")[0])
    if len(parent) == len(blocks):  # not chunked
        del parent[2:]
    return model


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


_registry_once = pytest.fixture(scope="module", autouse=True)(exports.cached_registry)


@pytest.fixture
def tiny() -> nn.Module:
    return convert(timm_vit(depth=2, reg_tokens=4, no_embed_class=True, num_classes=0))


# Families --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_on_onnxruntime(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = convert(shortened(family.build()))
    report = dwattn.export(model, tmp_path / "model.onnx", family.size)
    assert report.replaced == 2
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    x = family.images(5, seed=3)  # a batch the export never saw
    with torch.no_grad():
        expected = first_tensor(model(x)).numpy()
    found = next(iter(run(report.path, x).values()))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "build", "method"),
    [
        (
            "timm",
            lambda: timm_vit(dynamic_img_size=True, reg_tokens=4, depth=2),
            "forward_features",
        ),
        (
            "dinov2 with registers",
            lambda: hf_model("Dinov2WithRegisters", num_hidden_layers=2),
            "forward",
        ),
        ("vit", lambda: hf_model("ViT", num_hidden_layers=2), "forward"),
        ("rotary timm", lambda: timm_eva(**DINOV3, depth=2), "forward_features"),
        (
            "rotary transformers",
            lambda: hf_model("DINOv3ViT", num_hidden_layers=2, num_register_tokens=4),
            "forward",
        ),
    ],
)
def test_dynamic_resolution(name: str, build: Any, method: str, tmp_path: Path) -> None:
    model = convert(build(), dynamic_grid=True)
    path = tmp_path / "model.onnx"
    report = dwattn.export(model, path, (32, 24), dynamic_size=True, method=method)
    assert next(iter(report.inputs.values())) == ["batch", 3, "height", "width"]
    assert {p.size for p in report.parity} > {(32, 24)}
    assert {p.batch for p in report.parity} == {1, 3}
    if name != "vit":  # resampled with antialiasing, which TensorRT has no operator for
        assert "Resize" not in report.ops
    extra = {"interpolate_pos_encoding": True} if name == "vit" else {}
    for size in ((32, 32), (24, 56), (64, 40)):  # the configured one, and two never seen
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = first_tensor(getattr(model, method)(x, **extra)).numpy()
        found = next(iter(run(path, x).values()))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_another_fixed_size_leaves_no_resampling_in_the_graph(tmp_path: Path) -> None:
    model = hf_model("ViT", hidden_size=96, image_size=96, num_hidden_layers=2)
    convert(model, grid=(4, 9))
    report = dwattn.export(model, tmp_path / "model.onnx", (32, 72))
    assert "Resize" not in report.ops
    assert report.folded > 0


# Lowering of the layers ------------------------------------------------------------------------

LAYERS = {
    "dw": (dwattn.FusedDWAttention, {}),
    "dw-static": (dwattn.FusedDWAttention, {"prefix": "static"}),
    "dw-own-prefix": (
        dwattn.FusedDWAttention, {"own_prefix_value": True, "own_prefix_proj": True}
    ),
    "dw-plain": (dwattn.FusedDWAttention, {"context": False, "qkv_bias": False, "proj_bias": False}),
    "lowrank_dw": (dwattn.LowRankDWAttention, {"rank": 20}),
    "ens_dw": (dwattn.EnsembleDWAttention, {}),
    "ens_dw-static": (dwattn.EnsembleDWAttention, {"prefix": "static"}),
    "conv": (dwattn.ConvAttention, {}),
    "spvit": (dwattn.SPViTAttention, {"context": True}),
    "spvit-plain": (dwattn.SPViTAttention, {}),
    "scattered": (dwattn.ScatteredDWAttention, {"heads": [0, 3]}),
}  # fmt: skip


def layer(name: str, num_prefix: int = 2) -> nn.Module:
    cls, options = LAYERS[name]
    module = cls(48, 4, grid=(3, 5), num_prefix=num_prefix, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


@pytest.mark.parametrize("name", LAYERS)
def test_lowered_layers_equal_the_modules(name: str) -> None:
    """The lowering itself in fp64, where only a wrong formula can differ."""
    from dwattn.export.native import lower

    module = layer(name).double()
    x = torch.randn(3, 2 + 15, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(lower(module, (3, 5))(x), expected, rtol=1e-10, atol=1e-10)


def agrees(path: Path, module: nn.Module, num_prefix: int) -> None:
    """An exported bare layer of a 3 x 5 grid against the module, on tokens the export never saw."""
    x = torch.randn(2, num_prefix + 15, 48)
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(run(path, x)["output"], expected, rtol=1e-4, atol=1e-5)


def test_the_depthwise_layer_is_one_group_convolution_between_two_transposes(
    tmp_path: Path,
) -> None:
    module = layer("dw", 0)
    report = dwattn.export(module, tmp_path / "layer.onnx", (3, 5))
    agrees(report.path, module, 0)
    assert report.ops["Conv"] == 1
    assert report.ops["Transpose"] == 2
    assert report.ops["MatMul"] == 2
    assert "Shape" not in report.ops
    graph = onnx.load(report.path).graph
    (conv,) = [node for node in graph.node if node.op_type == "Conv"]
    assert {a.name: a.i for a in conv.attribute}["group"] == 48
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert [weights[name] for name in conv.input[1:]] == [(48, 1, 3, 3), (48,)]  # beta: its bias


def test_gamma_is_folded(tmp_path: Path) -> None:
    module = layer("ens_dw", 0)
    report = dwattn.export(module, tmp_path / "layer.onnx", (3, 5))
    agrees(report.path, module, 0)
    shapes = [tuple(t.dims) for t in onnx.load(report.path).graph.initializer]
    assert (48, 12) in shapes  # D -> d_h: heads are averaged already
    assert (48, 48) not in shapes
    assert "Softmax" not in report.ops


# Precision -------------------------------------------------------------------------------------


def test_fp16_is_real_and_close_to_fp32(tmp_path: Path) -> None:
    model = convert(timm_vit(num_classes=0, depth=2))
    report = dwattn.export(model, tmp_path / "half.onnx", (32, 24), dtype="fp16")
    assert set(report.weights) == {"FLOAT16"}
    assert report.io_dtype == "fp16"
    assert report.tolerance == 2e-2
    assert report.max_rel is not None
    assert 1e-6 < report.max_rel < 1e-2
    x = torch.randn(2, 3, 32, 24)
    found = run(report.path, x.half())["output"]
    assert found.dtype == np.float16
    assert next(model.parameters()).dtype == torch.float32


def test_fp16_can_keep_fp32_inputs_and_outputs(tmp_path: Path) -> None:
    module = layer("scattered")
    report = dwattn.export(
        module, tmp_path / "half.onnx", (3, 5), dtype=torch.float16, keep_io_fp32=True
    )
    assert (report.dtype, report.io_dtype) == ("fp16", "fp32")
    assert run(report.path, torch.randn(1, 17, 48))["output"].dtype == np.float32


# The file and the report -----------------------------------------------------------------------


def test_the_file_says_what_it_is_and_the_model_is_untouched(
    tiny: nn.Module, tmp_path: Path
) -> None:
    tiny.train()
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    modules, grads = dict(tiny.named_modules()), [p.requires_grad for p in tiny.parameters()]
    random = torch.get_rng_state()
    report = dwattn.export(tiny, tmp_path / "model.onnx", (32, 24), latency=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert tiny.training  # and everything else about the model is as it was
    assert dict(tiny.named_modules()) == modules
    assert [p.requires_grad for p in tiny.parameters()] == grads
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    proto = onnx.load(report.path)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata["dwattn.version"] == dwattn.__version__
    assert json.loads(metadata["dwattn.size"]) == [32, 24]
    assert metadata["dwattn.num_prefix"] == "5"
    assert len(metadata["dwattn.plan_sha256"]) == 64
    assert report.inputs == {"pixel_values": ["batch", 3, 32, 24]}
    assert report.latency_ms is not None
    assert report.latency_ms > 0
    assert json.loads(json.dumps(report.to_dict()))["opset"] == 18
    assert "onnxruntime agrees" in str(report)
    assert files(tmp_path) == ["model.onnx"]


def test_a_size_may_be_a_number_of_numpy() -> None:
    target = make_target(timm_vit(img_size=32), np.int64(32), dynamic=False, method="forward")
    assert target.size == (32, 32)


@pytest.mark.parametrize("lowering", ["native", "plugin"])
def test_weights_too_large_for_one_file_go_beside_it(
    lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    monkeypatch.setattr(importlib.import_module("dwattn.export"), "_INLINE_BYTES", 1000)
    module = layer("dw", 0)
    report = dwattn.export(module, tmp_path / "layer.onnx", (3, 5), lowering=lowering)
    assert files(tmp_path) == ["layer.onnx", "layer.onnx.data"]
    assert report.data_path == tmp_path / "layer.onnx.data"
    assert str(report).startswith(f"{report.path} and {report.data_path}: ")
    assert "layer.onnx.data" in str(list(report.__rich__().columns[1].cells))
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    stored = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(report.path).graph.initializer
    }
    weight = dict(module.named_parameters())["value.weight"].detach().numpy()
    assert any(np.array_equal(a, w) for a in stored.values() for w in (weight, weight.T))
    if lowering == "native":
        agrees(report.path, module, 0)


@pytest.mark.parametrize(
    ("lowering", "opset", "version"),
    [("native", 18, 8), ("native", 20, 9), ("native", 21, 10), ("function", 18, 8)],
)
def test_a_file_has_the_oldest_format_of_its_opset(
    lowering: str, opset: int, version: int, tmp_path: Path
) -> None:
    """onnxruntime 1.14 to 1.17 refuse the exporter's own, IR 10."""
    path = tmp_path / "layer.onnx"
    report = dwattn.export(layer("dw"), path, (3, 5), lowering=lowering, opset=opset, check=False)
    assert (report.ir_version, onnx.load(path).ir_version) == (version, version)


def test_static_batch_and_one_chosen_output(tmp_path: Path) -> None:
    model = hf_model("CLIPVision", num_hidden_layers=1)
    replace(model, Plan.for_layers(model, [0]))
    report = dwattn.export(
        model,
        tmp_path / "model.onnx",
        32,
        dynamic_batch=False,
        output="last_hidden_state",
        opset=20,
    )
    assert report.inputs == {"pixel_values": [1, 3, 32, 32]}
    assert report.outputs == {"last_hidden_state": [1, 17, 48]}
    assert report.opset == 20


class Wrapped(nn.Module):
    """A user's model: preprocessing, a backbone inside, named results and one that is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_vit(depth=2, num_classes=0)
        self.head = nn.Conv2d(48, 2, 1)

    def forward(self, pixels: Tensor) -> dict[str, Any]:
        tokens = self.backbone.forward_features(pixels / 2)
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 3))
        return {"logits": self.head(grid), "levels": [tokens, tokens[:, 0]], "loss": None}


def test_wrapped_models_with_several_outputs(tmp_path: Path) -> None:
    model = randomise(Wrapped())
    replace(model, Plan.for_layers(model, [1]))
    report = dwattn.export(model, tmp_path / "model.onnx", (32, 24))
    assert report.outputs == {
        "logits": ["batch", 2, 4, 3], "levels_0": ["batch", 13, 48], "levels_1": ["batch", 48]
    }  # fmt: skip


# What is refused, before and after the work ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (24, 32)}, ["(24, 32)", "3 x 4", "4 x 3", "dynamic_grid"]),
        ({"size": 30}, ["(30, 30)", "8 x 8", "(32, 32)"]),
        ({"size": 64}, ["8 x 8", "4 x 3"]),
        ({"dynamic_size": True}, ["dynamic_size", "4 x 3", "dynamic_grid=True"]),
        ({"lowering": "plugin"}, ["'plugin'", "scattered dw", "native"]),
        ({"lowering": "magic"}, ["'magic'", "native", "plugin", "function", "conv2d"]),
        ({"opset": 12}, ["opset=12", "18"]),
        ({"dtype": "int8"}, ["int8", "fp16"]),
        ({"method": "forward_all"}, ["forward_all"]),
        ({"output": "pooler"}, ["pooler", "output"]),
        ({"path": "missing/model.onnx"}, ["missing", "does not exist"]),
        ({"path": "."}, ["directory"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_requests_are_refused_with_their_values(
    tiny: nn.Module, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    options = {"size": (32, 24), **options}
    path = tmp_path / options.pop("path", "model.onnx")
    with pytest.raises(ExportError) as caught:
        dwattn.export(tiny, path, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert files(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_links_are_written_through_and_pipes_are_left_alone(tmp_path: Path) -> None:
    link, pipe = tmp_path / "model.onnx", tmp_path / "pipe"
    link.symlink_to(tmp_path / "real.onnx")
    bare = layer("dw")
    report = dwattn.export(bare, link, (3, 5), check=False, fold=False)
    assert link.is_symlink()
    assert report.path == tmp_path / "real.onnx"
    onnx.checker.check_model(str(link))
    os.mkfifo(pipe)
    with pytest.raises(ExportError, match="it is a device, pipe or socket"):
        dwattn.export(bare, pipe, (3, 5), check=False, fold=False)
    assert pipe.is_fifo()


def test_models_of_one_size_refuse_others(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"32 x 24 pixels .* dynamic_img_size=True"):
        dwattn.export(timm_vit(), tmp_path / "model.onnx", (64, 24))
    model = convert(timm_vit(), dynamic_grid=True)
    with pytest.raises(ExportError, match="dynamic_img_size=True"):
        dwattn.export(model, tmp_path / "model.onnx", (32, 24), dynamic_size=True)
    with pytest.raises(UnsupportedAttentionError):
        dwattn.export(nn.Conv2d(3, 3, 1), tmp_path / "model.onnx", 32)
    with pytest.raises(ExportError, match="bare attention layer"):
        dwattn.export(layer("dw"), tmp_path / "model.onnx", (5, 3))


def test_hub_models_do_not_pretend_to_be_dynamic(tmp_path: Path) -> None:
    model = convert(BY_NAME["hub"].build(), dynamic_grid=True)
    with pytest.raises(ExportError, match="one file a size"):
        dwattn.export(model, tmp_path / "model.onnx", 56, dynamic_size=True)


def test_disagreement_leaves_no_file_and_says_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwattn.export import graph as graph_module

    original = graph_module.ExportModule.forward

    def wrong(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t * 1.01 for t in original(self, x))

    monkeypatch.setattr(graph_module.ExportModule, "forward", wrong)
    (tmp_path / "layer.onnx").write_bytes(b"the old file")
    with pytest.raises(
        ExportError, match=r"relative 0\.01, tolerance 0\.0001.* No file was written"
    ):
        dwattn.export(layer("dw", 0), tmp_path / "layer.onnx", (3, 5))
    assert files(tmp_path) == ["layer.onnx"]
    assert (tmp_path / "layer.onnx").read_bytes() == b"the old file"
    monkeypatch.undo()
    with pytest.raises(ExportError, match=r"tolerance 1e-12.* By default 0.0001 is accepted"):
        dwattn.export(layer("dw", 0), tmp_path / "layer.onnx", (3, 5), tolerance=1e-12)


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    package = importlib.import_module("dwattn.export")

    def interrupt(*args: Any) -> None:
        assert any(tmp_path.iterdir())  # the file is being checked, under another name
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dwattn.export(layer("dw", 0), tmp_path / "layer.onnx", (3, 5))
    assert files(tmp_path) == []


def test_broken_weights_are_found_before_the_export(tiny: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        next(tiny.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="NaN or infinity"):
        dwattn.export(tiny, tmp_path / "model.onnx", (32, 24))
    assert files(tmp_path) == []


def test_half_precision_overflow_is_found(tmp_path: Path) -> None:
    module = layer("dw", 0)
    with torch.no_grad():
        module.get_submodule("value").weight.mul_(1e6)
    with pytest.raises(ExportError, match="half precision"):
        dwattn.export(module, tmp_path / "half.onnx", (3, 5), dtype="fp16")
    assert files(tmp_path) == []


def test_operators_outside_the_standard_set_are_refused() -> None:
    import onnx_ir as ir

    from dwattn.export.graph import check_standard

    value = ir.Value(name="x")
    node = ir.Node("com.example", "Magic", [value])
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18})
    with pytest.raises(ExportError, match=r"com\.example::Magic"):
        check_standard(ir.Model(graph, ir_version=10))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util as util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda n: None if n == "onnxscript" else found(n))
    with pytest.raises(ExportError, match=r"onnxscript.*pip install 'dwattn\[onnx\]'"):
        dwattn.export(layer("dw", 0), tmp_path / "layer.onnx", (3, 5))
