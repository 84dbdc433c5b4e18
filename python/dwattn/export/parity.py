"""Whether an ONNX file computes what the PyTorch model computes, on onnxruntime's CPU provider."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwattn.errors import ExportError

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Parity:
    """Errors of one output for one input, against fp32 PyTorch.

    Args:
        output: its name; batch: images; size: pixels (patches for a bare layer).
        max_abs: largest absolute difference; scale: largest absolute value of PyTorch's output.
        max_rel: ``max_abs / scale``; rms_rel: root mean square of the difference over that of the
            output.
    """

    output: str
    batch: int
    size: tuple[int, int]
    max_abs: float
    max_rel: float
    rms_rel: float
    scale: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """An input and what PyTorch makes of it."""

    batch: int
    size: tuple[int, int]
    inputs: NDArray[np.float32]
    expected: Arrays


def require_onnxruntime(purpose: str) -> Any:
    """The module, or a sentence that says how to get it.

    Raises:
        ExportError: onnxruntime cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            f"onnxruntime is needed to {purpose} and cannot be imported ({error}); install it with "
            "pip install 'dwattn[onnx]', or pass check=False to write the file unchecked."
        ) from error
    return onnxruntime


def session(path: Path, threads: int | None = None) -> Any:
    """A CPU inference session on a file.

    Raises:
        ExportError: onnxruntime refuses the file.
    """
    onnxruntime = require_onnxruntime("run the exported file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime does not load the exported file: {error}") from error


def compare(path: Path, cases: Sequence[Case], io_dtype: type[np.floating[Any]]) -> list[Parity]:
    """Run every case and measure every output.

    Raises:
        ExportError: onnxruntime fails, or an output has another shape than PyTorch's.
    """
    running = session(path)
    name = running.get_inputs()[0].name
    names = [output.name for output in running.get_outputs()]
    measured = []
    for case in cases:
        try:
            results = running.run(names, {name: case.inputs.astype(io_dtype)})
        except Exception as error:
            raise ExportError(
                f"onnxruntime fails on batch {case.batch} at size {case.size}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        for output, result in zip(names, results, strict=True):
            measured.append(_measure(output, case, np.asarray(result, np.float32)))
    return measured


def _measure(output: str, case: Case, result: NDArray[np.float32]) -> Parity:
    expected = case.expected[output]
    if result.shape != expected.shape:
        raise ExportError(
            f"{output} has shape {result.shape} on onnxruntime and {expected.shape} in PyTorch "
            f"(batch {case.batch}, size {case.size}): the graph has baked in the shapes of its "
            "example."
        )
    difference = np.abs(result.astype(np.float64) - expected)
    scale = float(np.abs(expected).max(initial=0.0))
    rms = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    # An infinite or NaN difference must not pass a comparison with the tolerance.
    worst = float(difference.max(initial=0.0)) if np.isfinite(difference).all() else float("inf")
    return Parity(
        output=output,
        batch=case.batch,
        size=case.size,
        max_abs=worst,
        max_rel=worst / max(scale, 1e-30) if worst else 0.0,
        rms_rel=float(np.sqrt(np.mean(np.square(difference)))) / max(rms, 1e-30) if worst else 0.0,
        scale=scale,
    )


def require_parity(
    measured: Sequence[Parity], tolerance: float, dtype: str, *, usual: float
) -> None:
    """Raise unless every ``max_rel`` is within the tolerance.

    Args:
        usual: the tolerance where none is asked for; within it an error is rounding.

    Raises:
        ExportError: with the worst output and its numbers.
    """
    worst = max(measured, key=lambda parity: parity.max_rel)
    if worst.max_rel <= tolerance:
        return
    if worst.max_rel <= usual:
        advice = f"By default {usual:g} is accepted; ask for no less than rounding allows."
    elif dtype == "fp16":
        advice = (
            "Activations of this model overflow or lose too many bits in half precision: export with "
            "dtype='fp32', or accept the error with tolerance= (--tolerance)."
        )
    else:
        advice = "The file is not what the model computes; this is a bug worth reporting."
    raise ExportError(
        f"The exported graph does not agree with PyTorch: {worst.output} at batch {worst.batch}, "
        f"size {worst.size} differs by {worst.max_abs:.3g} at an output scale of {worst.scale:.3g} "
        f"(relative {worst.max_rel:.3g}, tolerance {tolerance:.3g}). No file was written. {advice}"
    )


def measure_latency(
    path: Path,
    inputs: NDArray[np.float32],
    io_dtype: type[np.floating[Any]],
    *,
    threads: int,
    repeats: int,
) -> float:
    """Median milliseconds of a run on onnxruntime's CPU provider, after two warm-up runs."""
    running = session(path, threads)
    feed = {running.get_inputs()[0].name: inputs.astype(io_dtype)}
    times = []
    for index in range(repeats + 2):
        start = time.perf_counter()
        running.run(None, feed)
        if index >= 2:
            times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3
