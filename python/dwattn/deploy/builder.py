"""ONNX file in, engine and its record out."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dwattn
from dwattn.deploy import rtx
from dwattn.deploy.cuda import Cuda, Device
from dwattn.deploy.options import BuildOptions, Range
from dwattn.deploy.progress import make_monitor, progress
from dwattn.deploy.runtime import Runtime, load_runtime
from dwattn.deploy.sidecar import Sidecar, model_digests, sha256
from dwattn.errors import DeployError
from dwattn.files import write_atomically

Profile = dict[str, list[list[int]]]


def build(options: BuildOptions, *, show_progress: bool = True) -> Sidecar:
    """Build an engine. It and its record appear under their names only when they are complete.

    Ctrl-C ends the build at TensorRT's next step; what it measured so far is kept in the timing
    cache only by TensorRT's own rules, and no engine is written.

    Returns:
        The record that was written beside the engine.

    Raises:
        DeployError: files or options that do not fit, TensorRT missing or too old, no GPU, an
            unknown node or plugin, not enough memory, a full disk.
        KeyboardInterrupt: Ctrl-C.
    """
    options = options.checked()
    if options.runtime == "tensorrt-rtx" and not rtx.prepared():
        return rtx.build_in_subprocess(options, show_progress=show_progress)
    runtime = load_runtime(options.runtime, verbose=options.verbose)
    if options.fp16 and not runtime.has_fp16_flag:
        raise DeployError(
            f"{runtime.name} {runtime.version} has no fp16 flag: precision is what the file says. "
            "Write a half-precision file with dwattn export --fp16, and build it without --fp16."
        )
    return build_with(runtime, _device(runtime), options, show_progress=show_progress)


def build_with(
    runtime: Runtime, device: Device | None, options: BuildOptions, *, show_progress: bool = True
) -> Sidecar:
    """:func:`build` with a TensorRT that is loaded and options that are checked."""
    started = time.monotonic()
    digests = model_digests(options.onnx)
    if options.plugin:
        runtime.load_plugin(options.plugin)
    builder = _builder(runtime)
    strongly_typed = not options.fp16
    network, parser = _parse(runtime, builder, options, strongly_typed)
    half = _is_half(runtime, network)
    if options.fp16 and half:
        # The flag would let TensorRT choose other precisions than the file's.
        strongly_typed = True
        network, parser = _parse(runtime, builder, options, strongly_typed)
    config, profile = _configure(runtime, builder, network, options, strongly_typed)
    cache = _timing_cache(config, options.timing_cache)
    serialized = _serialize(runtime, builder, network, config, options, show_progress)
    del parser  # it owns weights that the network refers to, until the engine is there
    engine = Path(options.engine)
    with write_atomically(engine, DeployError) as path:
        path.write_bytes(serialized)
    record = Sidecar(
        runtime=runtime.name,
        version=runtime.version,
        device=device.to_dict() if device else None,
        onnx={"name": Path(options.onnx).name, **digests},
        plugin={"path": options.plugin, "sha256": sha256(options.plugin)}
        if options.plugin
        else None,
        precision=_precision(strongly_typed, half),
        profile=profile,
        options=asdict(options),
        engine={"bytes": engine.stat().st_size, "sha256": sha256(engine)},
        seconds=round(time.monotonic() - started, 2),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        dwattn=dwattn.__version__,
    )
    record.save(engine)
    if cache is not None and options.timing_cache:
        with write_atomically(options.timing_cache, DeployError) as path:
            path.write_bytes(bytes(config.get_timing_cache().serialize()))
    return record


def _device(runtime: Runtime) -> Device | None:
    if runtime.name != "tensorrt-rtx":
        return Cuda().device()
    try:
        return Cuda().device()
    except DeployError:  # its engines are finished on the machine that loads them
        return None


def _builder(runtime: Runtime) -> Any:
    try:
        return runtime.trt.Builder(runtime.logger)
    except TypeError as error:  # the factory returned a null pointer
        raise runtime.failure(f"{runtime.name} {runtime.version} cannot start a build") from error


def _parse(
    runtime: Runtime, builder: Any, options: BuildOptions, strongly_typed: bool
) -> tuple[Any, Any]:
    trt = runtime.trt
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag) if strongly_typed else 0)
    parser = trt.OnnxParser(network, runtime.logger)
    if not parser.parse_from_file(options.onnx):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        # In front: the parser's own words name the node, the log's only the line of its source.
        runtime.errors[:0] = [
            f"node {e.node_name() or e.node()} ({e.node_operator()}): {e.desc()}" for e in errors
        ]
        raise runtime.failure(f"{options.onnx} cannot be read by {runtime.name} {runtime.version}")
    return network, parser


def _is_half(runtime: Runtime, network: Any) -> bool:
    half = runtime.trt.float16
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return any(
        layer.get_output(index).dtype == half
        for layer in layers
        for index in range(layer.num_outputs)
    )


def _precision(strongly_typed: bool, half: bool) -> str:
    if not strongly_typed:
        return "fp16 allowed"
    return "strongly typed, fp16" if half else "strongly typed"


def _configure(
    runtime: Runtime, builder: Any, network: Any, options: BuildOptions, strongly_typed: bool
) -> tuple[Any, Profile]:
    trt = runtime.trt
    config = builder.create_builder_config()
    if not strongly_typed:
        config.set_flag(trt.BuilderFlag.FP16)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    profile = shape_profile({i.name: tuple(i.shape) for i in inputs}, options.batch, options.size)
    if profile:
        ranges = builder.create_optimization_profile()
        for name, shapes in profile.items():
            ranges.set_shape(name, *(tuple(shape) for shape in shapes))
        config.add_optimization_profile(ranges)
    return config, profile


def shape_profile(
    inputs: dict[str, tuple[int, ...]], batch: str | None, size: str | None
) -> Profile:
    """Smallest, usual and largest shape of every input that has open dimensions (-1).

    The first dimension is the batch; the last two of a 4-D input are its height and width.

    Raises:
        DeployError: an open dimension without a range, or a range for what is fixed.
    """
    batches = Range.parse("1" if batch is None else batch, "--batch")
    sizes = None if size is None else Range.parse(size, "--size").pair()
    profile: Profile = {}
    for name, shape in inputs.items():
        for axis, extent in enumerate(shape):
            image = len(shape) == 4 and axis >= 2
            if extent >= 0 or axis == 0 or (image and sizes is not None):
                continue
            raise DeployError(
                f"Dimension {axis} of input {name} {list(shape)} is open"
                + ("; give its range with --size 224 or --size 224:336:518." if image else
                   ", and only batch and image size can vary; export it with a fixed size.")
            )  # fmt: skip
        if -1 not in shape:
            continue
        shapes = []
        for which in ("smallest", "usual", "largest"):
            wanted = list(shape)
            if wanted[0] == -1:
                wanted[0] = getattr(batches, which)[0]
            for axis in range(2, len(shape)):
                if wanted[axis] == -1 and sizes is not None:
                    wanted[axis] = getattr(sizes, which)[axis - 2]
            shapes.append(wanted)
        profile[name] = shapes
    _refuse_unused(inputs, None if batch is None else batches, sizes)
    return profile


def _refuse_unused(
    inputs: dict[str, tuple[int, ...]], batches: Range | None, sizes: Range | None
) -> None:
    """A range for what is fixed must be what it is fixed at."""
    described = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
    images = [shape[2:] for shape in inputs.values() if len(shape) == 4]
    if sizes and not any(-1 in image for image in images) and set(images) != sizes.values:
        raise DeployError(
            f"--size {sizes}, but the image size of this model is fixed: {described}. Export it "
            "with --dynamic-size, or leave --size out."
        )
    fixed = {shape[:1] for shape in inputs.values() if shape and shape[0] != -1}
    if batches and fixed and fixed != batches.values:
        raise DeployError(
            f"--batch {batches}, but the batch of this model is fixed: {described}. Export it "
            "without --static-batch, or leave --batch out."
        )


def _timing_cache(config: Any, path: str | None) -> Any:
    """The cache in use, None where it was not asked for."""
    if path is None:
        return None
    old = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(old)
    # A cache of another device or version is refused: times measured there mean nothing here.
    if cache is None or not config.set_timing_cache(cache, False):
        warnings.warn(
            f"{path} holds times of another device or TensorRT version; a new one takes its place.",
            stacklevel=2,
        )
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _serialize(
    runtime: Runtime, builder: Any, network: Any, config: Any, options: BuildOptions, shown: bool
) -> bytes:
    with _interruptible() as interrupted, progress("Building the engine", shown) as report:
        config.progress_monitor = make_monitor(runtime.trt, report, interrupted)
        serialized = builder.build_serialized_network(network, config)
        stop = interrupted()
    if stop is not None:
        signal.raise_signal(stop)  # to the handler that it was meant for
    if serialized is None:
        raise runtime.failure(f"No engine could be built from {options.onnx}")
    return bytes(serialized)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], signal.Signals | None]]:
    """Whether Ctrl-C was pressed, or SIGTERM came: an exception must not pass through TensorRT's C++.

    TensorRT may ask from a thread of its own while the main thread, which alone runs Python's
    handlers, waits for it; the interpreter's wake-up file is written to at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    came: signal.Signals | None = None

    def interrupted() -> signal.Signals | None:
        nonlocal came
        with contextlib.suppress(BlockingIOError):
            read = os.read(reading, 4096)
            came = came or next((which for which in taken if which in read), None)
        return came

    # One without a handler in Python ends the process, also from within C++.
    taken = [s for s in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(s))]
    handlers = {which: signal.signal(which, lambda *_: None) for which in taken}
    file = signal.set_wakeup_fd(writing)
    try:
        yield interrupted
    finally:
        signal.set_wakeup_fd(file)
        for which, handler in handlers.items():
            signal.signal(which, handler)
        os.close(reading)
        os.close(writing)
