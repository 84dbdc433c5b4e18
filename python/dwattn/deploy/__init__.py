"""From an ONNX file to a measured TensorRT engine, on the device and without torch.

::

    from dwattn import deploy

    deploy.build(deploy.BuildOptions("m.onnx", "m.engine", plugin="libdwattn_trt.so"))
    deploy.bench("m.engine", against="baseline.engine")
    deploy.verify("m.engine", "golden/")

Python 3.10, numpy and TensorRT's own Python package are enough; CUDA is called through ctypes.
onnxruntime is needed only by :func:`golden` and by ``bench`` of an ONNX file. Nothing is imported
before it is used, so that this package also loads where there is no GPU.
"""

from __future__ import annotations

from dwattn.deploy.bench import BenchResult, bench
from dwattn.deploy.builder import build
from dwattn.deploy.compare import CompareResult, compare
from dwattn.deploy.golden import Golden, golden
from dwattn.deploy.options import BuildOptions, Range
from dwattn.deploy.protocol import Timing, measure
from dwattn.deploy.sidecar import Sidecar
from dwattn.deploy.verify import VerifyResult, verify
from dwattn.errors import DeployError

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
