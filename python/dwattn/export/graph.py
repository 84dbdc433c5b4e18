"""From a PyTorch function to a checked ONNX graph of standard operators."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dwattn import backends
from dwattn.errors import ExportError
from dwattn.export.node import DOMAIN
from dwattn.export.target import Target, flatten_outputs
from dwattn.export.translations import translations

#: The standard operators a Vision Transformer and its heads need. Anything else in a graph is an
#: error here, not a surprise on the device.
_STANDARD = (
    "Abs Add And Cast CastLike Concat Constant ConstantOfShape Conv ConvTranspose Cos Div Equal "
    "Erf Exp Expand Flatten Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater "
    "GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg "
    "Not Or Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize "
    "Shape Sigmoid Sin Size Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Transpose Unsqueeze "
    "Where AveragePool MaxPool BatchNormalization HardSwish InstanceNormalization "
    "GroupNormalization Clip Elu LeakyRelu Einsum CumSum Floor Ceil Round Tile Trilu "
    "ScatterND ScatterElements TopK ArgMax DepthToSpace SpaceToDepth Softplus PRelu"
)
ALLOWED = frozenset(_STANDARD.split())


class ExportModule(nn.Module):
    """The target as a module from one tensor to a tuple of tensors, with dtype changes at the
    border.
    """

    def __init__(
        self, target: Target, output: str | int | None, dtype: torch.dtype, io_dtype: torch.dtype
    ):
        super().__init__()
        self.module = target.module
        self.target, self.output, self.dtype, self.io_dtype = target, output, dtype, io_dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = flatten_outputs(self.target.call(x.to(self.dtype)), self.output)
        return tuple(t.to(self.io_dtype) for t in outputs.values())


def trace(
    target: Target,
    names: list[str],
    output: str | int | None,
    *,
    opset: int,
    half: bool,
    half_io: bool,
    dynamic_batch: bool,
) -> Any:
    """The lowered target as an ``onnx_ir`` model in memory.

    torch.export based (``dynamo=True``) rather than the TorchScript exporter: it sees shapes
    symbolically, so a batch or a resolution is either dynamic or an error, where tracing bakes
    numbers in silently; it has the antialiased resize that DINOv2 with registers and timm need for
    their position embedding (TorchScript has no symbolic for it); and it gives half as many nodes.
    The price is about two seconds.

    Raises:
        ExportError: with the exporter's reason.
    """
    dtype = torch.float16 if half else torch.float32
    io_dtype = torch.float16 if half and half_io else torch.float32
    if half:
        target.module.half()
    module = ExportModule(target, output, dtype, io_dtype)
    example = target.example(2 if dynamic_batch else 1, trace_grid(target)).to(io_dtype)
    try:
        with _quiet(), torch.no_grad(), backends.use("torch"):
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[target.input_name],
                output_names=names,
                dynamic_shapes=({**_dynamic_sides(target), **_dynamic_batch(dynamic_batch)},),
                custom_translation_table=translations(),
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(_reason(target, error)) from error
    return program.model


def trace_grid(target: Target) -> tuple[int, int]:
    """The grid to trace with. A dynamic size is traced away from every size the model treats
    specially.
    """
    if not target.dynamic:
        return target.grid
    assert target.layout is not None
    special = {target.grid, target.layout.grid}
    height, width = target.grid[0] + 1, target.grid[1] + 2
    patches = [g[0] * g[1] for g in special if g is not None]
    while height == width or height * width in patches:
        width += 1
    return (height, width)


def _dynamic_batch(dynamic: bool) -> dict[int, Any]:
    return {0: torch.export.Dim("batch", min=1)} if dynamic else {}


def _dynamic_sides(target: Target) -> dict[int, Any]:
    if not target.dynamic:
        return {}
    rows, columns = target.patch
    return {
        2: rows * torch.export.Dim("grid_height", min=1),
        3: columns * torch.export.Dim("grid_width", min=1),
    }


def name_sides(graph: Any) -> None:
    """Call open dimensions ``height``, ``width`` and ``<output>_dim<i>`` instead of the exporter's symbols.

    Intermediate shapes in terms of those symbols are dropped; every runtime infers them anyway.
    """
    import onnx_ir as ir

    for node in graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = None
    batch, channels, *_ = graph.inputs[0].shape
    graph.inputs[0].shape = ir.Shape([batch, channels, "height", "width"])
    for value in graph.outputs:
        dims = [
            d if isinstance(d, int) or d == batch else f"{value.name}_dim{i}"
            for i, d in enumerate(value.shape)
        ]
        value.shape = ir.Shape(dims)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and deprecation notes are not the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(target: Target, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    what = "a dynamic image size" if target.dynamic else f"size={target.size}"
    advice = " Export one file for each size instead." if target.dynamic else ""
    return (
        f"torch.export cannot express {type(target.module).__name__} with {what}: "
        f"{type(cause).__name__}: {lines[0] if lines else 'no message'}.{advice}"
    )


def check_standard(model: Any) -> Counter[str]:
    """Operator counts of a graph, which must be flat and standard.

    Raises:
        ExportError: names custom domains, functions and operators outside :data:`ALLOWED`.
    """
    counts: Counter[str] = Counter()
    foreign: set[str] = set()
    for node in model.graph:
        counts[node.op_type] += 1
        if node.domain != DOMAIN and (
            node.domain not in ("", "ai.onnx") or node.op_type not in ALLOWED
        ):
            foreign.add(f"{node.domain or 'ai.onnx'}::{node.op_type}")
    foreign |= {f"function {name}" for name in model.functions}
    if foreign:
        raise ExportError(
            f"The graph needs {', '.join(sorted(foreign))}, beyond the standard operators that "
            "native lowering allows. Export the backbone without the layer that brings them in."
        )
    return counts


def float_types(model: Any) -> Counter[str]:
    """Number of weight elements by floating dtype, for example ``{"FLOAT16": 21593856}``."""
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            sizes[tensor.dtype.name] += int(tensor.size)
    return sizes


def ir_version(model: Any) -> int:
    """The oldest of the file format that holds the model: older runtimes refuse a newer one unread."""
    from onnx import helper

    if any(overload for *_, overload in model.functions):
        return 10  # which brought overloads
    opsets = [helper.make_opsetid("", model.opset_imports[""])]
    return int(helper.find_min_ir_version_for(opsets))
