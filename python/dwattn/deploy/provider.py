"""onnxruntime on one pinned CPU core, as the paper measures its CPU targets; also the oracle."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwattn.deploy.builder import shape_profile
from dwattn.deploy.options import PLUGIN_NODE, require_file
from dwattn.deploy.session import random_inputs
from dwattn.errors import DeployError

#: numpy's types of numbers, by what onnxruntime calls them.
_DTYPES = {f"tensor({np.dtype(code).name})": np.dtype(code) for code in "?bBhHiIlLe"} | {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
}


class OnnxRunner:
    """A model on onnxruntime's CPU provider with fixed input shapes.

    Args:
        path: the model.
        threads: of one operator.
        batch, size: where the model leaves them open; default 1, and no default.
        inputs: values instead of random ones; they decide the shapes.

    Raises:
        DeployError: no onnxruntime, no such file, a model it refuses, or an open size.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        batch: int | None = None,
        size: str | None = None,
        inputs: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        file = require_file(path, "model", "Write one with dwattn export.")
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = str(error).rstrip(".")
            advice = (
                " A model with plugin nodes runs only on TensorRT; export it with --lowering native."
                if PLUGIN_NODE in reason
                else ""
            )
            raise DeployError(
                f"onnxruntime {onnxruntime.__version__} does not load {file}: {reason}.{advice}"
            ) from error
        self.version = str(onnxruntime.__version__)
        self.inputs = dict(inputs) if inputs is not None else self._random(batch, size)
        self.output_names = [output.name for output in self._session.get_outputs()]

    def run(self) -> dict[str, NDArray[Any]]:
        """Outputs by name.

        Raises:
            DeployError: onnxruntime fails.
        """
        try:
            results = self._session.run(self.output_names, self.inputs)
        except Exception as error:
            raise DeployError(f"onnxruntime fails: {str(error).splitlines()[0]}") from error
        return dict(zip(self.output_names, results, strict=True))

    def sample(self) -> dict[str, float]:
        """Milliseconds of one run."""
        started = time.perf_counter()
        self.run()
        return {"host": (time.perf_counter() - started) * 1e3}

    def _random(self, batch: int | None, size: str | None) -> dict[str, NDArray[Any]]:
        declared: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, np.dtype[Any]] = {}
        for value in self._session.get_inputs():
            if value.type not in _DTYPES:
                raise DeployError(f"Input {value.name} is a {value.type}; only numbers can be fed.")
            declared[value.name] = tuple(d if isinstance(d, int) else -1 for d in value.shape)
            dtypes[value.name] = _DTYPES[value.type]
        profile = shape_profile(declared, None if batch is None else str(batch), size)
        return random_inputs(
            {
                name: (tuple(profile[name][1]) if name in profile else shape, dtypes[name])
                for name, shape in declared.items()
            }
        )


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[int | None]:
    """Run on one CPU core, the highest allowed one by default; then as before.

    Args:
        core: its number; -1: leave the process where it may run now.

    Returns:
        The core, None where nothing was pinned.

    Raises:
        DeployError: this process may not run there.
    """
    if core == -1 or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    allowed = os.sched_getaffinity(0)
    # Interrupts and the system's own work tend to live on the first cores.
    chosen = max(allowed) if core is None else core
    if chosen not in allowed:
        raise DeployError(f"Core {chosen} cannot be used; allowed are {sorted(allowed)}.")
    os.sched_setaffinity(0, {chosen})
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DeployError(
            f"onnxruntime cannot be imported ({error}); pip install onnxruntime."
        ) from error
    return onnxruntime
