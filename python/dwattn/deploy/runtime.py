"""TensorRT's Python package: found, checked, and its complaints turned into sentences."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

from dwattn.deploy.options import RUNTIMES
from dwattn.errors import DeployError

_OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 0)}
_INSTALL = {
    "tensorrt": "JetPack: sudo apt install python3-libnvinfer, and a venv made with "
    "--system-site-packages; elsewhere: pip install tensorrt.",
    "tensorrt-rtx": "pip install tensorrt_rtx_cu13 (or _cu12).",
}

#: Plugin libraries that were loaded, by module of TensorRT: its registry lives as long as the process,
#: and refuses a library the second time.
_LOADED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


@dataclass
class Runtime:
    """A loaded TensorRT.

    Args:
        name: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        trt: the Python module.
        errors, warnings: what TensorRT complained about, in order.
    """

    name: str
    trt: Any
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verbose: bool = False

    def __post_init__(self) -> None:
        self.logger = _make_logger(self.trt, self.errors, self.warnings, self.verbose)

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def has_fp16_flag(self) -> bool:
        """TensorRT 10 chooses precisions; later ones do what the file says."""
        return hasattr(self.trt.BuilderFlag, "FP16")

    def load_plugin(self, path: str) -> None:
        """Register the creators of a plugin library, unless they are in this process already.

        Raises:
            DeployError: it cannot be loaded.
        """
        loaded = _LOADED.setdefault(self.trt, set())
        file = os.path.realpath(path)
        if file in loaded:
            return
        try:
            handle = self.trt.get_plugin_registry().load_library(path)
        except Exception as error:
            raise self.failure(f"The plugin library {path} cannot be loaded ({error})") from error
        if handle is None:
            raise DeployError(
                f"The plugin library {path} cannot be loaded ({self._refusal(path, loaded)})."
            )
        loaded.add(file)

    def _refusal(self, path: str, loaded: set[str]) -> str:
        """Why the registry took no library: TensorRT does not pass it on, the loader tells it again."""
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            return str(error)
        if not hasattr(library, "getCreators"):
            return "it exports no getCreators"
        creators = self.trt.get_plugin_registry().all_creators
        taken = sorted(c.name for c in creators if c.plugin_namespace == "dwattn")
        if not taken:
            return str(self.failure("TensorRT refuses its plugins")).rstrip(".")
        return (
            f"{' and '.join(taken)} are registered already, by "
            f"{' and '.join(sorted(loaded)) or 'a library that this process loaded itself'}; a process "
            "takes one library of them, so use this one in another"
        )

    def failure(self, what: str) -> DeployError:
        """An error that says what failed, why (from TensorRT's log) and what helps.

        Warnings count only where there is no error: a tactic that was skipped is no reason. Nor is
        a missing GPU for TensorRT-RTX, which says so at every start, unless nothing else was said.
        """
        log = self.errors or self.warnings
        if self.name == "tensorrt-rtx":
            log = _without_gpu(self.errors) or _without_gpu(self.warnings) or log
        return DeployError(explain(what, log))


def _without_gpu(log: list[str]) -> list[str]:
    """What a log says beside the missing GPU; the parser's words hold several messages, a line each."""
    rest = ("\n".join(x for x in m.splitlines() if not _NO_GPU.search(x)) for m in log)
    return [message for message in rest if message.strip()]


def load_runtime(name: str, *, verbose: bool = False) -> Runtime:
    """Import a TensorRT and check its version.

    Raises:
        DeployError: not installed, broken, or too old.
    """
    try:
        trt = importlib.import_module(RUNTIMES[name])
        version = str(trt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise DeployError(
            f"The Python package of {name} cannot be imported ({error}). {_INSTALL[name]}"
        ) from error
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < _OLDEST[name]:
        oldest = ".".join(map(str, _OLDEST[name]))
        raise DeployError(
            f"{name} {version} is too old; {oldest} or later is needed (JetPack 6.1 has 10.3)."
        )
    return Runtime(name, trt, verbose=verbose)


def _make_logger(trt: Any, errors: list[str], warnings: list[str], verbose: bool) -> Any:
    threshold = trt.ILogger.VERBOSE if verbose else trt.ILogger.ERROR

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                errors.append(message)
            elif int(severity) == int(trt.ILogger.WARNING):
                warnings.append(message)
            # Errors are not printed: they end up in the sentence that the user gets.
            if verbose and int(severity) <= int(threshold):
                print(f"[{str(severity).rpartition('.')[2]}] {message}", file=sys.stderr)

    return Logger()


_NO_GPU = re.compile(
    r"no CUDA-capable device|CUDA initialization failure|cudaGetDevice|CUDA driver version is "
    r"insufficient|forward compatibility|libcuda"
)
#: What TensorRT writes, and what it means for the person. The first that matches is told.
_MEANINGS = (
    (
        r"MODEL_DESERIALIZE_FAILED|Failed to parse the ONNX model|Failed to open file",
        "The file is not a complete ONNX model; export it again.",
    ),
    (
        r"Plugin not found|plugin.* not found|getPluginCreator|no importer registered|"
        r"creator.*not found|Unable to find plugin",
        "The model needs a plugin that is not registered: name its library with --plugin "
        "libdwattn_trt.so, or export the model with --lowering native.",
    ),
    (
        r"out of memory|could not be allocated|OutOfMemory|MEM_ALLOC_FAILED|insufficient memory",
        "Memory ran out: close other programs, give less scratch memory with --workspace 512, a "
        "smaller --batch, and on a board with 8 GB stop the desktop (docs/jetson.md).",
    ),
    (
        _NO_GPU,
        "No usable GPU: engines of TensorRT are built and run on the device they are for; "
        "--runtime tensorrt-rtx builds without one.",
    ),
    (
        r"kSERIALIZATION_VERSION|[Vv]ersion tag|serialization version|different version|"
        r"serialized.*version",
        "The engine is of another TensorRT version; build it again on this device.",
    ),
    (
        r"[Pp]latform|compute capability|different (models of )?device|incompatible device|"
        r"generated on.*different",
        "The engine is of another kind of device; build it again on this one.",
    ),
    (
        r"[Mm]agic tag|deserializ|corrupt|truncat",
        "The file is not a complete engine of this runtime; build it again.",
    ),
)


def explain(what: str, log: list[str]) -> str:
    """A sentence for a failure: what, TensorRT's own words, and what they mean."""
    errors = [re.sub(r"\s+", " ", line).strip() for line in log]
    # What our plugins say is more exact than what TensorRT makes of it.
    errors = [line for line in errors if line.startswith("[dwattn]")] or errors
    told = next(
        (
            (line, meaning)
            for pattern, meaning in _MEANINGS
            for line in errors
            if re.search(pattern, line)
        ),
        None,
    )
    if told is not None:
        return f"{what}. {told[1]} (TensorRT: {told[0][:300]})"
    # Where the parser stopped: its own words, in front, name the node.
    errors = [line for line in errors if not line.startswith("ModelImporter.cpp")] or errors
    reasons = "; ".join(dict.fromkeys(line[:300] for line in errors[-3:]))
    return f"{what}" + (f": {reasons}." if reasons else "; --verbose shows what TensorRT says.")
