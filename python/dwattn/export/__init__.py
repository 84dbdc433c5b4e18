"""ONNX export of converted and unconverted Vision Transformers, compared with PyTorch before the file appears."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dwattn import backends
from dwattn.conversion import conversion
from dwattn.errors import ExportError
from dwattn.export.folding import fold_constants
from dwattn.export.forms import DEFAULT_OPSET, FORMS, Form
from dwattn.export.function import attach_bodies, detach_bodies
from dwattn.export.fusion import fuse_residuals
from dwattn.export.graph import (
    check_standard,
    float_types,
    ir_version,
    name_sides,
    trace,
    trace_grid,
)
from dwattn.export.node import layer_nodes, name_nodes
from dwattn.export.parity import (
    Case,
    Parity,
    compare,
    measure_latency,
    require_onnxruntime,
    require_parity,
)
from dwattn.export.result import ExportReport
from dwattn.export.static import check_static, to_opset
from dwattn.export.target import Target, flatten_outputs, make_target, replaced_layers
from dwattn.files import target_file
from dwattn.projections import require_linear

__all__ = ["DEFAULT_OPSET", "ExportReport", "Parity", "export"]

_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
_DTYPES = {"float32": "fp32", "fp32": "fp32", "float16": "fp16", "half": "fp16", "fp16": "fp16"}
# A protobuf holds 2 GB; the weights of larger models go to a file beside it.
_INLINE_BYTES = 1_900_000_000


@torch.random.fork_rng(devices=())  # modules that are made on the way draw weights
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    size: int | tuple[int, int],
    *,
    lowering: str = "native",
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    dynamic_size: bool = False,
    dtype: str | torch.dtype = "fp32",
    keep_io_fp32: bool = False,
    output: str | int | None = None,
    method: str = "forward",
    check: bool = True,
    fold: bool = True,
    tolerance: float | None = None,
    latency: bool = False,
) -> ExportReport:
    """Write ``model`` as ONNX, and check it on onnxruntime.

    The model is neither modified nor moved; a private fp32 copy of it is exported in eval mode. The
    file appears under its name only when it is complete and, with ``check``, agrees with PyTorch.

    Args:
        model: a Vision Transformer, converted or not, a module around one that takes pixels, or a
            bare attention layer of this package, which takes tokens ``(B, N, D)``.
        path: the file to write.
        size: image size in pixels, ``(H, W)`` or one number for both; for a bare layer its patch
            grid. It must be the size the model was converted for; with ``dynamic_size`` it is one
            of the sizes checked.
        lowering: how replaced layers are written.
            ``"native"``: a group convolution and matrix products, standard operators only.
            ``"plugin"``: one node each, for the TensorRT plugin library; a LayerScale and residual
            connection that directly follow become part of it. The file is checked with the bodies of
            ``"function"``, and written without them.
            ``"function"``: the same nodes and ONNX functions that define them, for onnxruntime.
            ``"conv2d"``: 1x1 and depthwise convolutions of ``(B, C, H, W)``, with fixed shapes,
            opset 17 and few operators, for static compilers such as Hailo's.
            All but ``"native"`` cover only dw, lowrank_dw and ens_dw of whole layers. Exact prefix rows are
            not in ``"conv2d"``; exact prefix rows with query and key norms are not in the nodes.
        opset: 18 to 21, by default 18; ``"conv2d"``: 17 (default) or 18.
        dynamic_batch: leave the batch open (default, except for ``"conv2d"``); otherwise it is 1.
        dynamic_size: leave the image size open, in whole patches; needs ``replace(...,
            dynamic_grid=True)`` and a model that resamples its position embedding (timm:
            ``dynamic_img_size=True``).
        dtype: ``"fp32"``, or ``"fp16"`` for half-precision weights and activations, which TensorRT
            11 requires in the file because it has no precision flag any more.
        keep_io_fp32: with fp16, take and return fp32 tensors.
        output: export one of the model's results only: a name such as ``"last_hidden_state"``, or
            an index.
        method: what to call instead of ``forward``, for example timm's ``"forward_features"``.
        check: compare with PyTorch at two batch sizes, and at two sizes if these may vary.
        fold: compute what depends on weights alone at export. ``gamma`` and per-head kernels are
            always folded.
        tolerance: bound on ``max|difference| / max|PyTorch|``; default 1e-4 in fp32, 2e-2 in fp16.
        latency: also measure onnxruntime's CPU latency at batch 1, with one thread; of a
            ``"plugin"`` file that of its checked form.

    Returns:
        The report, with the measured errors.

    Raises:
        ExportError: a size that does not fit, a model that cannot be exported, a layer that the
            lowering does not have, an operator beyond the standard ones, or a graph that disagrees
            with PyTorch. No file is left behind.
        UnsupportedAttentionError: no Vision Transformer in the model.
    """
    form = _form(lowering)
    opset = form.opsets.start if opset is None else opset
    kind = _check_options(form, opset, dtype, check or fold or latency)
    dynamic_batch = _check_shapes(form, dynamic_batch, dynamic_size)
    destination = _check_path(Path(path))
    for name, layer in replaced_layers(model).items():
        require_linear(layer, f"Exporting {name or type(layer).__name__}")
    form.check(model)
    target = make_target(model, size, dynamic=dynamic_size, method=method)
    half = kind == "fp16"
    io_dtype = np.float16 if half and not keep_io_fp32 else np.float32

    cases = _cases(target, output, dynamic_batch, check)
    names = list(cases[0].expected)
    replaced = form.lower(target)
    graph = trace(
        target,
        names,
        output,
        opset=max(opset, DEFAULT_OPSET),
        half=half,
        half_io=not keep_io_fp32,
        dynamic_batch=dynamic_batch,
    )
    graph, folded = _rework(graph, form, target, opset, fold)
    ops = check_standard(graph)
    if form.static:
        check_static(graph)
    metadata = _metadata(model, target, kind, lowering)
    graph.metadata_props.update(metadata)
    bound = tolerance if tolerance is not None else _TOLERANCE[kind]

    with _staged(destination) as staged:
        if form.nodes:
            attach_bodies(graph)
        _write(graph, staged)
        measured = compare(staged, cases, io_dtype) if check else []
        if check:
            require_parity(measured, bound, kind, usual=_TOLERANCE[kind])
        speed = (
            measure_latency(staged, cases[0].inputs, io_dtype, threads=1, repeats=10)
            if latency
            else None
        )
        if form.nodes and not form.bodies:
            detach_bodies(graph)
            _write(graph, staged)
        data = staged.with_name(staged.name + ".data")
        has_data, size_bytes = data.exists(), sum(p.stat().st_size for p in staged.parent.iterdir())

    return ExportReport(
        path=destination,
        opset=graph.opset_imports[""],
        ir_version=graph.ir_version,
        dtype=kind,
        io_dtype="fp16" if io_dtype is np.float16 else "fp32",
        inputs=_shapes(graph.graph.inputs),
        outputs=_shapes(graph.graph.outputs),
        size=target.size,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        lowering=form.name,
        replaced=replaced,
        nodes={
            node.name: f"{node.domain}::{node.op_type} {node.version}"
            for node in layer_nodes(graph.graph)
        },
        ops=dict(ops.most_common()),
        folded=folded,
        weights=dict(float_types(graph)),
        bytes=size_bytes,
        tolerance=bound if check else None,
        parity=tuple(measured),
        metadata=metadata,
        data_path=destination.with_name(data.name) if has_data else None,
        latency_ms=speed,
    )


def _form(lowering: str) -> Form:
    if lowering not in FORMS:
        raise ExportError(f"Unknown lowering {lowering!r}; choose one of {', '.join(FORMS)}.")
    return FORMS[lowering]


def _check_shapes(form: Form, dynamic_batch: bool | None, dynamic_size: bool) -> bool:
    """Whether the batch is dynamic: as asked, by default unless the form is static."""
    if form.static and (dynamic_batch or dynamic_size):
        asked = "dynamic_batch=True" if dynamic_batch else "dynamic_size=True"
        raise ExportError(
            f"lowering={form.name!r} writes fixed shapes, so {asked} cannot be met; leave it out, or "
            "export with lowering='native'."
        )
    return not form.static if dynamic_batch is None else dynamic_batch


def _check_options(form: Form, opset: int, dtype: str | torch.dtype, runs: bool) -> str:
    kind = _DTYPES.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ExportError(f"dtype={dtype!r} cannot be exported; choose 'fp32' or 'fp16'.")
    if opset not in form.opsets:
        raise ExportError(
            f"opset={opset} is outside {form.opsets.start} to {form.opsets.stop - 1}, which "
            f"lowering={form.name!r} can be written in; the default is {form.opsets.start}."
        )
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX export needs {' and '.join(missing)}, which cannot be imported; install with "
            "pip install 'dwattn[onnx]'."
        )
    if runs:
        require_onnxruntime("fold constants and check the file")
    return kind


def _check_path(path: Path) -> Path:
    if path.is_dir():
        raise ExportError(
            f"{path} is a directory; give the name of a file, for example {path / 'model.onnx'}."
        )
    if not path.parent.is_dir():
        raise ExportError(f"The directory {path.parent} does not exist; create it first.")
    return target_file(path, ExportError)


def _cases(
    target: Target, output: str | int | None, dynamic_batch: bool, check: bool
) -> list[Case]:
    """Inputs and PyTorch's fp32 results, from the copy before it is lowered."""
    batches = (1, 3) if dynamic_batch else (1,)
    grids = [target.grid, trace_grid(target)] if target.dynamic else [target.grid]
    if target.dynamic:
        # Not the traced size: a graph that had baked it in would pass there.
        grids[1] = (grids[1][1] + 1, grids[1][0])
    wanted = [(batch, grid) for grid in grids for batch in batches]
    return [_case(target, output, batch, grid) for batch, grid in (wanted if check else wanted[:1])]


def _case(target: Target, output: str | int | None, batch: int, grid: tuple[int, int]) -> Case:
    x = target.example(batch, grid, seed=batch)
    try:
        with torch.no_grad(), backends.use("torch"):
            outputs = flatten_outputs(target.call(x), output)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"{type(target.module).__name__}.{target.method} fails on an input of shape "
            f"{tuple(x.shape)}: {type(error).__name__}: {error}. A graph has one input; of a model that needs more "
            "than pixels, export the part that sees images."
        ) from error
    size = (grid[0] * target.patch[0], grid[1] * target.patch[1])
    expected = {name: tensor.float().numpy() for name, tensor in outputs.items()}
    broken = [name for name, array in expected.items() if not np.isfinite(array).all()]
    if broken:
        raise ExportError(
            f"PyTorch's own {', '.join(broken)} holds NaN or infinity; the model's weights are "
            "broken."
        )
    return Case(batch, size, x.numpy(), expected)


def _rework(graph: Any, form: Form, target: Target, opset: int, fold: bool) -> tuple[Any, int]:
    """The traced graph as it is to be written, and how many nodes constant folding removed."""
    if form.nodes:
        name_nodes(graph.graph)
        fuse_residuals(graph)
    if target.dynamic:
        name_sides(graph.graph)
    folded = fold_constants(graph) if fold else 0
    return to_opset(graph, opset) if form.static else graph, folded


def _metadata(model: nn.Module, target: Target, dtype: str, lowering: str) -> dict[str, str]:
    from dwattn import __version__

    layout = target.layout
    record = conversion(model)
    metadata = {
        "dwattn.version": __version__,
        "dwattn.lowering": lowering,
        "dwattn.dtype": dtype,
        "dwattn.size": json.dumps(list(target.size)),
        "dwattn.grid": json.dumps(list(target.grid)),
        "dwattn.dynamic_size": json.dumps(target.dynamic),
        "dwattn.num_prefix": str(target.num_prefix),
        "dwattn.family": type(model).__name__ if layout is None else layout.family,
    }
    if record is not None:
        metadata["dwattn.plan_sha256"] = hashlib.sha256(record.plan.to_json().encode()).hexdigest()
    return metadata


@contextlib.contextmanager
def _staged(destination: Path) -> Iterator[Path]:
    """A path in a private directory beside the destination; moved there if the block succeeds, else
    removed.
    """
    # Named before it is there: Ctrl-C may come between the two.
    folder = destination.with_name(f".dwattn-export-{secrets.token_hex(4)}")
    try:
        folder.mkdir(mode=0o700)
        staged = folder / destination.name
        yield staged
        data = staged.with_name(staged.name + ".data")
        if data.exists():
            os.replace(data, destination.with_name(data.name))
        os.replace(staged, destination)
    except OSError as error:
        raise ExportError(f"{destination} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(graph: Any, path: Path) -> None:
    """Serialise, and let the ONNX checker read it back."""
    import onnx
    import onnx_ir as ir

    weights = (value.const_value for value in graph.graph.initializers.values())
    large = sum(int(tensor.nbytes) for tensor in weights if tensor is not None) > _INLINE_BYTES
    graph.ir_version = ir_version(graph)
    ir.save(graph, path, external_data=path.name + ".data" if large else None)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"The ONNX checker refuses the graph: {error}") from error


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [d if isinstance(d, int) else str(d.value) for d in (value.shape or ())]
        for value in values
    }
