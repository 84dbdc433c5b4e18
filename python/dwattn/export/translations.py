"""Two operators that are written to ONNX differently from the exporter's own way, for TensorRT's
sake.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dwattn.errors import ExportError


def translations() -> dict[Any, Any]:
    """A ``custom_translation_table`` for ``torch.onnx.export``."""
    return {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten._upsample_bicubic2d_aa.default: antialiased_bicubic,
    }


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Softmax attention as Mul, Transpose, MatMul, Softmax, MatMul: what runtimes recognise and
    fuse.

    The exporter's translation reshapes the keys through their run-time shape, nine nodes more a
    layer."""
    from onnxscript import opset18 as op

    if attn_mask is not None or is_causal or enable_gqa:
        raise ExportError(
            "The model calls scaled_dot_product_attention with a mask, causally or with grouped "
            "queries; only full self-attention is exported. Call the model without masks."
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    constant: Any = op.Constant(value_float=float(factor))
    scaled = op.Mul(query, op.CastLike(constant, query))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def antialiased_bicubic(
    image: Any,
    output_size: Any,
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Any:
    """Antialiased bicubic resampling as two matrix products: ``rows (H', h) @ image @ columns (w,
    W')``.

    Position embeddings are resampled like this (timm, DINOv2 with registers) where the resolution
    is dynamic, and TensorRT refuses ``Resize`` with ``antialias=1``. The filter is separable, so
    each axis is one small matrix whose entries depend on the output size alone.

    Args:
        image: fp32 ``(B, C, h, w)`` with known ``h`` and ``w``.
        output_size: ``(H', W')`` as an int64 tensor.

    Raises:
        ExportError: ``align_corners``, or an image whose own size is dynamic.
    """
    from onnxscript import opset18 as op

    height, width = image.shape[2], image.shape[3]
    if align_corners or not isinstance(height, int) or not isinstance(width, int):
        raise ExportError(
            f"Antialiased bicubic resampling of a {height} x {width} image with "
            f"align_corners={align_corners} has no lowering; only images of a fixed size, such as "
            f"position embeddings, are resampled in an exported model."
        )
    sizes: Any = op.Cast(output_size, to=7)
    first: Any = op.Constant(value_ints=[0])
    second: Any = op.Constant(value_ints=[1])
    end: Any = op.Constant(value_ints=[2])
    rows = _filter_matrix(op, op.Slice(sizes, first, second), height)
    columns = _filter_matrix(op, op.Slice(sizes, second, end), width)
    return op.MatMul(op.MatMul(rows, image), op.Transpose(columns, perm=[1, 0]))


def _filter_matrix(op: Any, out: Any, size: int) -> Any:
    """Weights ``(out, size)`` of every input position for every output position, rows summing to 1.

    ``w[i, j] = cubic((j + 1/2 - s (i + 1/2)) / max(s, 1))`` with ``s = size / out`` and Keys' cubic
    (a = -1/2), which is zero from distance 2 on.
    """

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    zero, one = (op.Constant(value_int=value) for value in (0, 1))
    scalar = op.Squeeze(out)
    scale = op.Div(number(float(size)), op.Cast(scalar, to=1))
    i = op.Cast(op.Range(zero, scalar, one), to=1)
    centre = op.Unsqueeze(op.Mul(op.Add(i, number(0.5)), scale), op.Constant(value_ints=[1]))
    j = op.Constant(value_floats=(np.arange(size) + 0.5).tolist())
    x = op.Abs(op.Div(op.Sub(j, centre), op.Max(scale, number(1.0))))
    square = op.Mul(x, x)
    cube = op.Mul(square, x)
    near = op.Add(op.Sub(op.Mul(cube, number(1.5)), op.Mul(square, number(2.5))), number(1.0))
    far = op.Add(
        op.Sub(op.Mul(square, number(2.5)), op.Mul(cube, number(0.5))),
        op.Sub(number(2.0), op.Mul(x, number(4.0))),
    )
    inside = op.Where(op.Less(x, number(1.0)), near, far)
    weights = op.Where(op.Less(x, number(2.0)), inside, number(0.0))
    return op.Div(weights, op.ReduceSum(weights, op.Constant(value_ints=[1]), keepdims=1))
