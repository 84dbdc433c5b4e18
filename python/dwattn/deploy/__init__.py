"""From an ONNX file to a measured TensorRT engine, on the device and without torch.

::

    from dwattn import deploy

    deploy.build(deploy.BuildOptions("m.onnx", "m.engine", plugin="libdwattn_trt.so"))
    deploy.bench("m.engine", against="baseline.engine")
    deploy.verify("m.engine", "golden/")

Python 3.10, numpy and TensorRT's own Python package are enough; CUDA is called through ctypes.
onnxruntime is needed only by :func:`golden` and by ``bench`` of an ONNX file. Names are loaded when
they are first used, and TensorRT and CUDA when something runs: this package also loads where there
is no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwattn.deploy.benchmark import BenchResult, bench
    from dwattn.deploy.builder import build
    from dwattn.deploy.comparison import CompareResult, compare
    from dwattn.deploy.golden_outputs import Golden, golden
    from dwattn.deploy.options import BuildOptions, Range
    from dwattn.deploy.protocol import Timing, measure
    from dwattn.deploy.sidecar import Sidecar
    from dwattn.deploy.verification import VerifyResult, verify
    from dwattn.errors import DeployError

_WHERE = {
    "BenchResult": "deploy.benchmark",
    "BuildOptions": "deploy.options",
    "CompareResult": "deploy.comparison",
    "DeployError": "errors",
    "Golden": "deploy.golden_outputs",
    "Range": "deploy.options",
    "Sidecar": "deploy.sidecar",
    "Timing": "deploy.protocol",
    "VerifyResult": "deploy.verification",
    "bench": "deploy.benchmark",
    "build": "deploy.builder",
    "compare": "deploy.comparison",
    "golden": "deploy.golden_outputs",
    "measure": "deploy.protocol",
    "verify": "deploy.verification",
}

__all__ = [
    "BenchResult",
    "BuildOptions",
    "CompareResult",
    "DeployError",
    "Golden",
    "Range",
    "Sidecar",
    "Timing",
    "VerifyResult",
    "bench",
    "build",
    "compare",
    "golden",
    "measure",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dwattn.deploy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dwattn.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
