"""The names of TensorRT that the deploy kit uses exist in the versions it is for, and in the fake one.

NVIDIA's own Python packages are asked, without their libraries.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dwattn import deploy
from support import fake_tensorrt, tensorrt_bindings
from support.tensorrt import named

SOURCES = Path(deploy.__file__).parent
#: Methods and properties that are called on TensorRT's objects, by class.
MEMBERS = {
    "Builder": "build_serialized_network create_builder_config create_network "
    "create_optimization_profile",
    "IBuilderConfig": "add_optimization_profile create_timing_cache get_timing_cache "
    "profiling_verbosity progress_monitor set_flag set_memory_pool_limit set_timing_cache",
    "INetworkDefinition": "get_input get_layer num_inputs num_layers",
    "OnnxParser": "get_error num_errors parse_from_file",
    "ParserError": "desc node node_name node_operator",
    "ILayer": "get_output num_outputs",
    "IOptimizationProfile": "set_shape",
    "IPluginRegistry": "all_creators load_library",
    "ITimingCache": "serialize",
    "IProgressMonitor": "phase_finish phase_start step_complete",
    "IProfiler": "report_layer_time",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_engine_inspector create_execution_context get_tensor_dtype "
    "get_tensor_mode get_tensor_name get_tensor_profile_shape get_tensor_shape num_io_tensors",
    "IExecutionContext": "execute_async_v3 get_tensor_shape profiler set_input_shape "
    "set_tensor_address",
    "EngineInspector": "get_engine_information",
}
#: Only TensorRT 10 has it, which the code asks about first.
OPTIONAL = {"BuilderFlag.FP16"}
ASK = """
import functools, json, sys
module, wanted = sys.argv[1], json.loads(sys.argv[2])
trt = __import__(module)
missing = []
for name in wanted:
    try:
        functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        missing.append(name)
print(json.dumps({"version": trt.__version__, "missing": missing}))
"""


def used() -> set[str]:
    """Every ``trt.NAME`` of the sources, and the members above."""
    found = set()
    for path in SOURCES.glob("*.py"):
        if path.name != "aot_plugin.py":
            found |= set(re.findall(r"\btrt\.([A-Za-z_]\w*(?:\.[A-Z]\w*)*)", path.read_text()))
    found |= {f"{c}.{name}" for c, names in MEMBERS.items() for name in names.split()}
    return {name for name in found if name not in OPTIONAL}


def ask(module: str, environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, module, json.dumps(sorted(used()))],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_sources_are_found() -> None:
    assert {"Runtime", "IProfiler", "ProfilingVerbosity.DETAILED", "get_plugin_registry"} <= used()


@pytest.mark.parametrize("version", tensorrt_bindings.versions())
def test_tensorrt_has_every_name(version: str, tmp_path: Path) -> None:
    answer = ask("tensorrt", tensorrt_bindings.environment(version, tmp_path))
    assert answer == {"version": version, "missing": []}


def test_tensorrt_rtx_has_every_name() -> None:
    import os

    folder = named("DWATTN_TENSORRT_RTX", "a folder that holds tensorrt_rtx_cu13")
    answer = ask("tensorrt_rtx", {**os.environ, "PYTHONPATH": str(folder)})
    assert answer["missing"] == []


def test_the_fake_has_only_real_names() -> None:
    """Top-level names and constants; what its objects can do follows from their use."""
    module = fake_tensorrt.make()
    own = {"builders", "at_step"}
    public = {name for name in vars(module) if not name.startswith("__")} - own
    names = {name.split(".")[0] for name in used()}
    assert public <= names | {"BuilderFlag"}, public - names
