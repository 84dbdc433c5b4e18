"""A TensorRT 10.3 of plain Python for the logic around it, with the names and the habits of the real
one: failures are null objects and log messages. tests/test_deploy_api.py checks the names against
NVIDIA's own Python packages.

A "model" is a JSON file: ``inputs`` (shapes, -1 open), ``scale`` (every output is its input times
this), ``half``, ``fp32_io`` (of a half-precision model), ``plugin`` (a name that must be registered),
``layers``, ``memory`` (MiB that a build takes) and ``says`` (pairs of severity and message; an ERROR
ends the build). An "engine" is the same with the profile and the version added.
"""

from __future__ import annotations

import ctypes
import enum
import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np

AVAILABLE_MIB = 100


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class IProfiler:
    pass


class Registry:
    def __init__(self) -> None:
        self.names: set[str] = set()

    @property
    def all_creators(self) -> list[Any]:
        return [types.SimpleNamespace(name=n, plugin_namespace="dwattn") for n in self.names]

    def load_library(self, path: str) -> Any:
        """A library names its plugins somewhere in the file; a second one with the same is refused."""
        found = re.search(rb"plugins:([\w ]+)", Path(path).read_bytes())
        names = set(found[1].decode().split()) if found else set()
        if not names or names & self.names:
            return None
        self.names |= names
        return object()


class Config:
    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.workspace: int | None = None
        self.profile: dict[str, Any] = {}
        self.progress_monitor: Any = None
        self.profiling_verbosity: Any = None
        self.cache: bytes | None = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace = size

    def add_optimization_profile(self, profile: Any) -> None:
        self.profile = profile.shapes

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache and not cache.startswith(b"times of this device"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return types.SimpleNamespace(serialize=lambda: b"times of this device" + b"+" * 3)


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = [list(shape) for shape in shapes]


class Network:
    def __init__(self, strongly_typed: bool) -> None:
        self.strongly_typed = strongly_typed
        self.model: dict[str, Any] = {}

    @property
    def num_inputs(self) -> int:
        return len(self.model["inputs"])

    def get_input(self, index: int) -> Any:
        name, shape = list(self.model["inputs"].items())[index]
        return types.SimpleNamespace(name=name, shape=tuple(shape))

    num_layers = 1

    def get_layer(self, index: int) -> Any:
        dtype = "half" if self.model.get("half") else "float"
        output = types.SimpleNamespace(dtype=dtype)
        return types.SimpleNamespace(num_outputs=1, get_output=lambda index: output)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.model["profile"].get(name, [shape] * 3)
        self.shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name.removeprefix("out_")]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.model.get("fails"):
            self.engine.logger.log(
                ILogger.ERROR, "Error Code 1: Cuda Runtime (unspecified failure)"
            )
            return False
        dtype = nptype(self.engine.get_tensor_dtype(""))
        for name, shape in self.shapes.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            views = [
                np.frombuffer((ctypes.c_char * size).from_address(self.addresses[key]), dtype)
                for key in (name, f"out_{name}")
            ]
            views[1][:] = views[0] * self.engine.model["scale"]
        if self.profiler is not None:
            for index, (layer, _) in enumerate(self.engine.model["layers"]):
                self.profiler.report_layer_time(layer, 0.5 + index)
        return True


class Engine:
    def __init__(self, model: dict[str, Any], logger: Any) -> None:
        self.model, self.logger = model, logger
        self.names = [*model["inputs"], *(f"out_{name}" for name in model["inputs"])]
        self.num_io_tensors = len(self.names)

    def create_execution_context(self) -> Context | None:
        if self.model.get("context_fails"):
            self.logger.log(ILogger.ERROR, "Requested amount of GPU memory could not be allocated")
            return None
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.OUTPUT if name.startswith("out_") else TensorIOMode.INPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.model["inputs"][name])

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return self.model["profile"][name]

    def get_tensor_dtype(self, name: str) -> str:
        return "half" if self.model.get("half") and not self.model.get("fp32_io") else "float"

    def create_engine_inspector(self) -> Any:
        layers = [{"Name": name, "LayerType": kind} for name, kind in self.model["layers"]]
        text = json.dumps({"Layers": layers}) if self.model["detailed"] else '{"Layers": ["a"]}'
        return types.SimpleNamespace(get_engine_information=lambda form: text)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


def nptype(dtype: str) -> Any:
    if dtype == "bfloat16":
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return {"half": np.float16, "float": np.float32}[dtype]


def make(version: str = "10.3.0") -> types.ModuleType:
    """The module, with a registry of its own."""
    registry = Registry()
    module = types.ModuleType("tensorrt")
    flags = ["FP16", "TF32"] if version.startswith("10") else ["TF32"]

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger
            module.builders.append(self)

        def create_network(self, flags: int) -> Network:
            return Network(bool(flags & 2))

        def create_builder_config(self) -> Config:
            self.config = Config()
            return self.config

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            monitor = config.progress_monitor
            monitor.phase_start("Building Engine", None, 3)
            for step in range(3):
                module.at_step(step)
                if not monitor.step_complete("Building Engine", step):
                    return None
            monitor.phase_finish("Building Engine")
            for severity, message in network.model.get("says", []):
                self.logger.log(ILogger.Severity[severity], message)
            if any(severity == "ERROR" for severity, _ in network.model.get("says", [])):
                return None
            if network.model.get("memory", 0) > AVAILABLE_MIB:
                self.logger.log(ILogger.ERROR, "[virtualMemoryBuffer] CUDA error 2: out of memory")
                return None
            engine = {
                **network.model,
                "profile": config.profile,
                "version": version,
                "typed": network.strongly_typed,
                "detailed": config.profiling_verbosity == "detailed",
            }
            return json.dumps(engine).encode()

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self.network, self.errors = network, []

        def parse_from_file(self, path: str) -> bool:
            self.network.model = {
                "layers": [["conv", "Conv"]],
                **json.loads(Path(path).read_text()),
            }
            wanted = self.network.model.get("plugin")
            if wanted and wanted not in registry.names:
                self.errors.append(f"Plugin not found, is {wanted} registered?")
            return not self.errors

        @property
        def num_errors(self) -> int:
            return len(self.errors)

        def get_error(self, index: int) -> Any:
            return types.SimpleNamespace(
                node=lambda: 7, node_name=lambda: "/blocks.3/attn", node_operator=lambda: "DWAttention",
                desc=lambda: self.errors[index],
            )  # fmt: skip

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            model = json.loads(data)
            if model["version"] != version:
                self.logger.log(ILogger.ERROR, "Version tag does not match. Current Version: 240")
                return None
            return Engine(model, self.logger)

    module.__dict__.update(
        __version__=version, ILogger=ILogger, IProgressMonitor=IProgressMonitor, IProfiler=IProfiler,
        Builder=Builder, OnnxParser=OnnxParser, Runtime=Runtime, TensorIOMode=TensorIOMode,
        BuilderFlag=enum.Enum("BuilderFlag", flags),
        NetworkDefinitionCreationFlag=enum.IntEnum("Creation", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}),
        MemoryPoolType=enum.Enum("MemoryPoolType", ["WORKSPACE"]),
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="detailed"),
        LayerInformationFormat=types.SimpleNamespace(JSON="json"),
        float16="half", nptype=nptype, get_plugin_registry=lambda: registry,
        builders=[], at_step=lambda step: None,
    )  # fmt: skip
    return module
