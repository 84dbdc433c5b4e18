"""What is installed, what was built, which backend would run and why not the others.

:func:`collect` answers with plain data for bug reports and ``dwattn doctor --json``;
:func:`explain` says the same in sentences. Only the standard library is imported here: what else is
missing or broken is what this module has to be able to tell.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "timm",
    "transformers",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "torchvision",
)
#: (operator, device type, dtype) for which the backends are asked.
QUESTIONS = tuple(
    (op, device, dtype)
    for device in ("cpu", "cuda")
    for dtype in ("float32", "bfloat16", "float16")
    for op in ("dw_attention", "dw_layer", "attention_variance")
)
_VARIABLES = ("DWATTN_", "OMP_", "MKL_", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
#: Programs with which extensions are built and GPUs are looked at.
TOOLS = ("c++", "cmake", "ninja", "nvcc", "nvidia-smi", "trtexec")


def collect() -> dict[str, Any]:
    """Everything ``dwattn doctor`` knows, as JSON-able data.

    Returns:
        ``dwattn`` (version), ``location`` of the package, ``system``, ``packages`` (name -> version
        or None), ``tools`` (programs on PATH), ``torch``, ``operators`` and ``native``
        (``available``, ``error``), ``build``, ``cpu``, ``backends`` (per operator, device and dtype:
        the one that would run, and the others' reasons) and ``variables`` (environment variables
        of the package, and those that set threads and devices).
    """
    info: dict[str, Any] = {
        "dwattn": _version("dwattn"),
        "location": str(Path(__file__).parent),
        "system": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()).strip(),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "usable_cpus": cores(),
            "memory_bytes": memory_bytes(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": [name for name in TOOLS if shutil.which(name)],
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }
    info["torch"] = _torch()
    info.update(_compiled())
    info["backends"] = _backends() if info["torch"]["error"] == "" else []
    return info


def explain(info: dict[str, Any]) -> str:
    """The answer of :func:`collect` as text for a person."""
    system, torch, build = info["system"], info["torch"], info["build"]
    lines = [
        f"dwattn {info['dwattn'] or '(not installed, run from its source tree)'}",
        f"Python {system['python']} on {system['platform']}",
        f"{system['cpu']}, {system['usable_cpus']} of {system['cpus']} CPUs usable",
        _torch_line(torch),
        "",
        "Packages: " + ", ".join(f"{k} {v}" for k, v in info["packages"].items() if v),
    ]
    missing = [name for name, found in info["packages"].items() if not found]
    if missing:
        lines.append("Not installed (needed only by the features of that name): " + _join(missing))
    lines += ["", *_compiled_lines(info, build)]
    lines += ["", "Backends, best first:"]
    for answers in _alike(info["backends"]):
        lines += _backend_lines(answers)
    if info["variables"]:
        lines += ["", "Set in the environment:"]
        lines += [f"  {name}={value}" for name, value in info["variables"].items()]
    return "\n".join(lines)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, where the system tells it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    try:
        torch = importlib.import_module("torch")
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {
            "error": "",
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "devices": devices,
            "capabilities": [
                ".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(len(devices))
            ],
            "cudnn": torch.backends.cudnn.version(),
            "onednn": torch.backends.mkldnn.is_available(),
            "threads": torch.get_num_threads(),
        }
    except (ImportError, OSError, RuntimeError) as error:
        return {"error": f"torch could not be imported: {error}. Install it: pip install torch."}


def _compiled() -> dict[str, Any]:
    try:
        library = importlib.import_module("dwattn.library")
    except (ImportError, OSError) as error:
        state = {"available": False, "error": f"{error}"}
        return {"operators": state, "native": state, "build": None, "cpu": None}
    native = library.native
    return {
        "operators": {"available": library.AVAILABLE, "error": library.load_error()},
        "native": {"available": native is not None, "error": library.native_error()},
        "build": native.build_info() if native else None,
        "cpu": native.cpu_info() if native else None,
    }


def _backends() -> list[dict[str, Any]]:
    torch = importlib.import_module("torch")
    backends = importlib.import_module("dwattn.backends")
    answers = []
    for op, device, dtype in QUESTIONS:
        question = {"device": device, "dtype": getattr(torch, dtype)}
        verdicts = backends.explain(op, **question)
        try:
            chosen, error = backends.choose(op, **question), ""
        except backends.BackendError as refused:  # forced to one that cannot run
            chosen, error = None, str(refused)
        answers.append(
            {
                "op": op,
                "device": device,
                "dtype": dtype,
                "chosen": chosen,
                "error": error,
                "verdicts": [
                    {"backend": v.backend, "can_run": bool(v), "reasons": list(v.reasons)}
                    for v in verdicts
                ],
            }
        )
    return answers


def _torch_line(torch: dict[str, Any]) -> str:
    if torch["error"]:
        return str(torch["error"])
    cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    devices = _join(torch["devices"]) or "no GPU"
    return f"torch {torch['version']} {cuda}, {devices}, {torch['threads']} threads"


def _compiled_lines(info: dict[str, Any], build: dict[str, Any] | None) -> list[str]:
    lines = []
    for key, label in (("operators", "Compiled operators"), ("native", "Module over numpy arrays")):
        state = info[key]
        lines.append(f"{label}: {'loaded' if state['available'] else state['error']}")
    if build is None:
        return lines
    cpu = info["cpu"]
    archs = build["cuda_architectures"]
    return [
        *lines,
        f"Built with {build['compiler']} ({build['flags']}), for torch >= {build['torch_target']}",
        f"CPU kernels: {_join(build['cpu_isas'])} compiled; {cpu['chosen_isa']} runs here",
        f"Products of 16-bit tensors on this CPU: bf16 in {cpu['bf16_products']}, "
        f"fp16 in {cpu['fp16_products']}",
        f"CUDA kernels: {_join(archs)}" if archs else f"CUDA kernels: none ({build['cuda']})",
        *([_hopper_line()] if any("90a" in arch for arch in archs) else []),
    ]


def _hopper_line() -> str:
    asked = os.environ.get("DWATTN_CUDA_HOPPER") == "1"
    state = (
        "asked for by DWATTN_CUDA_HOPPER=1" if asked else "off; DWATTN_CUDA_HOPPER=1 asks for it"
    )
    return f"CUDA kernel for Hopper (90a): {state}; untested on a device"


def _alike(answers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbouring answers on one device that differ in nothing but operator and dtype."""

    def answer(a: dict[str, Any]) -> tuple[Any, ...]:
        return a["device"], a["chosen"], a["error"], a["verdicts"]

    return [list(group) for _, group in groupby(answers, answer)]


def _backend_lines(answers: list[dict[str, Any]]) -> list[str]:
    """One answer for all of ``answers``, see :func:`_alike`."""
    answer = answers[0]
    ops, dtypes = (list(dict.fromkeys(a[key] for a in answers)) for key in ("op", "dtype"))
    where = f"  {_join(ops)} on {answer['device']} in {_join(dtypes)}: "
    if answer["chosen"] is None:
        return [where + answer["error"]]
    refused = (verdict for verdict in answer["verdicts"] if not verdict["can_run"])
    return [
        where + str(answer["chosen"]),
        *(f"    not {verdict['backend']}: {' '.join(verdict['reasons'])}" for verdict in refused),
    ]


def _join(names: list[str]) -> str:
    return ", ".join(names)
