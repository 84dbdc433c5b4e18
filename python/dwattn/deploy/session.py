"""An engine on the GPU: its tensors, a run with data, and timed runs without."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwattn.deploy.builder import shape_profile
from dwattn.deploy.cuda import Cuda, Device
from dwattn.deploy.options import plugin_path, require_file
from dwattn.deploy.runtime import Runtime, load_runtime
from dwattn.deploy.sidecar import Sidecar, record_of
from dwattn.errors import DeployError

Arrays = Mapping[str, NDArray[Any]]
_SEED = 0


@dataclass(frozen=True)
class Tensor:
    """An input or output: shape in this session, dtype, address on the GPU."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one layer of the engine, and what TensorRT calls its kind."""

    name: str
    kind: str
    ms: float


class Session:
    """One engine with one set of shapes; made by :func:`open_engine`.

    Args:
        runtime, cuda: what runs it.
        engine: the deserialized engine.
        shapes: of every input.
    """

    def __init__(
        self, runtime: Runtime, cuda: Cuda, engine: Any, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._runtime, self._cuda, self._engine = runtime, cuda, engine
        names = {n for n in self._names() if engine.get_tensor_mode(n) == _input(runtime)}
        if set(shapes) != names:
            raise DeployError(
                f"The engine takes {', '.join(sorted(names))}, but got {', '.join(shapes)}: they "
                "belong to another model."
            )
        self._cleanup = contextlib.ExitStack()
        self._graph: int | None = None
        with self._cleanup as undo:  # a failure releases what there is; else close() does
            self._context = engine.create_execution_context()
            if self._context is None:
                raise runtime.failure("The engine's working memory cannot be allocated")
            self._stream = cuda.stream()
            undo.callback(cuda.destroy, "Stream", self._stream)
            self._start, self._stop = cuda.event(), cuda.event()
            undo.callback(cuda.destroy, "Event", self._start)
            undo.callback(cuda.destroy, "Event", self._stop)
            self.inputs = {name: self._bind(name, shape, undo) for name, shape in shapes.items()}
            outputs = [name for name in self._names() if name not in shapes]
            self.outputs = {name: self._bind(name, None, undo) for name in outputs}
            self._fill()
            self._cleanup = undo.pop_all()

    def close(self) -> None:
        """Release memory, stream and graph."""
        self._cleanup.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def device(self) -> Device:
        """The GPU it runs on."""
        return self._cuda.device()

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The outputs for inputs of this session's shapes; floating point is cast to the engine's.

        Raises:
            DeployError: missing or unknown inputs, other shapes, or a failed run.
        """
        if set(inputs) != set(self.inputs):
            raise DeployError(
                f"The engine takes {', '.join(self.inputs)}; got {', '.join(inputs) or 'nothing'}."
            )
        for name, value in inputs.items():
            tensor = self.inputs[name]
            if value.shape != tensor.shape:
                raise DeployError(
                    f"Input {name} has shape {list(value.shape)}, and this session "
                    f"{list(tensor.shape)}."
                )
            host = np.ascontiguousarray(value, tensor.dtype)
            self._cuda.upload(tensor.address, host.ctypes.data, host.nbytes)
        self._enqueue()
        self._cuda.synchronize(self._stream)
        results = {}
        for name, tensor in self.outputs.items():
            host = np.empty(tensor.shape, tensor.dtype)
            self._cuda.download(host.ctypes.data, tensor.address, host.nbytes)
            results[name] = host
        return results

    def capture(self) -> bool:
        """Record a run as a CUDA graph, which :meth:`sample` then launches.

        Returns:
            False where the engine cannot be recorded; its runs are then enqueued one by one.
        """
        # The first run does what must not be recorded: loading kernels, allocating.
        self._enqueue()
        self._cuda.synchronize(self._stream)
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue()
            finally:
                graph = self._cuda.end_capture(self._stream)
        except DeployError:
            return False
        self._graph = graph
        self._cleanup.callback(self._cuda.destroy, "GraphExec", graph)
        return True

    def sample(self) -> dict[str, float]:
        """Milliseconds of a run on the GPU's clock (``gpu``) and on the host's (``host``)."""
        started = time.perf_counter()
        self._cuda.record(self._start, self._stream)
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)
        self._cuda.record(self._stop, self._stream)
        self._cuda.wait(self._stop)
        host = (time.perf_counter() - started) * 1e3
        return {"gpu": self._cuda.elapsed_ms(self._start, self._stop), "host": host}

    def layer_times(self, iterations: int = 20) -> list[LayerTime]:
        """Mean time of every layer, in order of execution; not recorded as a graph.

        Layers are timed one by one, so they sum up to more than a run takes.
        """
        sums: dict[str, float] = {}

        self._enqueue()
        self._cuda.synchronize(self._stream)
        self._context.profiler = _make_profiler(self._runtime.trt, sums)
        for _ in range(iterations):
            self._enqueue()
            self._cuda.synchronize(self._stream)
        kinds = layer_kinds(self._runtime, self._engine)
        return [LayerTime(name, kinds.get(name, ""), ms / iterations) for name, ms in sums.items()]

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _bind(self, name: str, shape: tuple[int, ...] | None, undo: contextlib.ExitStack) -> Tensor:
        if shape is not None and not self._context.set_input_shape(name, shape):
            raise self._runtime.failure(
                f"Input {name} cannot have the shape {list(shape)} in this engine"
            )
        actual = tuple(self._context.get_tensor_shape(name))
        if -1 in actual:
            raise DeployError(f"The shape of {name} {list(actual)} depends on the data.")
        dtype = self._engine.get_tensor_dtype(name)
        try:
            numpy_dtype = np.dtype(self._runtime.trt.nptype(dtype))
        except TypeError as error:
            raise DeployError(
                f"{name} is of type {dtype}, which numpy does not have; export with fp32 or fp16 "
                "inputs and outputs."
            ) from error
        size = int(np.prod(actual)) * numpy_dtype.itemsize
        address = self._cuda.malloc(size)
        undo.callback(self._cuda.free, address)
        if not self._context.set_tensor_address(name, address):
            raise self._runtime.failure(f"{name} cannot be bound to memory")
        return Tensor(actual, numpy_dtype, address)

    def _fill(self) -> None:
        """Random inputs, so that nothing is timed on whatever the memory holds."""
        for name, value in random_inputs(
            {name: (tensor.shape, tensor.dtype) for name, tensor in self.inputs.items()}
        ).items():
            self._cuda.upload(self.inputs[name].address, value.ctypes.data, value.nbytes)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._runtime.failure("The engine failed to run")


def open_engine(
    path: str | Path,
    *,
    plugin: str | None = None,
    batch: int | None = None,
    size: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    verbose: bool = False,
) -> tuple[Session, Sidecar | None, str | None]:
    """Load an engine and give its inputs shapes.

    Args:
        plugin: library; default the one of the build, then ``DWATTN_TRT_PLUGIN``.
        batch, size: where these may vary; default the usual ones of the build.
        shapes: of all inputs, instead.

    Returns:
        The session, the engine's record (None without one) and the plugin library that was loaded.

    Raises:
        DeployError: no such file, an engine of another version or device, a missing plugin, a shape
            outside of what the engine was built for, no GPU, not enough memory.
    """
    file = require_file(path, "engine", "Build one with dwattn build.")
    if file.suffix == ".onnx":
        raise DeployError(
            f"{file} is a model, not an engine: build it first with dwattn build, or measure it on "
            "a CPU with --provider cpu."
        )
    record = Sidecar.load(file)
    if record is None:
        warnings.warn(
            f"{file} has no record ({record_of(file).name}): whether it was built by this TensorRT "
            "and on this device is not checked.",
            stacklevel=2,
        )
    name = record.runtime if record else "tensorrt"
    runtime = load_runtime(name, verbose=verbose)
    cuda = Cuda()
    if record is not None:
        record.require_fits(file, name, runtime.version, cuda.device())
    library = _plugin_of(plugin, record)
    if library is not None:
        runtime.load_plugin(library)
    engine = deserialize(runtime, file)
    wanted = shapes or input_shapes(engine, runtime, batch, size)
    return Session(runtime, cuda, engine, wanted), record, library


def _plugin_of(given: str | None, record: Sidecar | None) -> str | None:
    named = plugin_path(given)
    if named is None and record is not None and record.plugin is not None:
        return plugin_path(record.plugin["path"])
    return named


def deserialize(runtime: Runtime, file: Path) -> Any:
    """The engine in a file.

    Raises:
        DeployError: it is not one, or not one for here.
    """
    loader = runtime.trt.Runtime(runtime.logger)
    engine = loader.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise runtime.failure(f"{file} cannot be loaded by {runtime.name} {runtime.version}")
    return engine


def input_shapes(
    engine: Any, runtime: Runtime, batch: int | None, size: str | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs: fixed, as asked for, or the usual ones of the engine's profile."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    declared = {
        name: tuple(engine.get_tensor_shape(name))
        for name in names
        if engine.get_tensor_mode(name) == _input(runtime)
    }
    usual = {
        name: tuple(engine.get_tensor_profile_shape(name, 0)[1]) if -1 in shape else shape
        for name, shape in declared.items()
    }
    asked = {
        # What is not asked for is filled in from the profile.
        name: tuple(
            u if d == -1 and (batch is None or axis > 0) and (size is None or axis < 2) else d
            for axis, (d, u) in enumerate(zip(shape, usual[name], strict=True))
        )
        for name, shape in declared.items()
    }
    profile = shape_profile(asked, None if batch is None else str(batch), size)
    return {name: tuple(profile[name][1]) if name in profile else asked[name] for name in asked}


def _input(runtime: Runtime) -> Any:
    return runtime.trt.TensorIOMode.INPUT


def _make_profiler(trt: Any, sums: dict[str, float]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            sums[layer_name] = sums.get(layer_name, 0.0) + ms

    return Profiler()


def layer_kinds(runtime: Runtime, engine: Any) -> dict[str, str]:
    """Kind of every layer by name, where the engine was built with details (``detailed``)."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(runtime.trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        layer["Name"]: str(layer.get("LayerType", ""))
        for layer in layers
        if isinstance(layer, dict) and "Name" in layer
    }


def random_inputs(
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
) -> dict[str, NDArray[Any]]:
    """Standard normal numbers (zeros for integers), the same ones every time."""
    generator = np.random.default_rng(_SEED)
    return {
        name: generator.standard_normal(shape).astype(dtype)
        if np.issubdtype(dtype, np.floating)
        else np.zeros(shape, dtype)
        for name, (shape, dtype) in specs.items()
    }
