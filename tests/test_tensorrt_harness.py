"""The TensorRT plugins without TensorRT: the harness with emulated kernels, under sanitizers.

``plugins/tensorrt/harness`` says what it asks of the plugins; results are compared with the fp64 reference.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from support import cuda_sources, tensorrt, tensorrt_build, tensorrt_cases

BUILD, TARGET = "tensorrt-emulated", "dwattn_trt_harness_emulated"


@pytest.fixture(scope="module")
def harness() -> Path:
    return tensorrt_build.emulated_harness(tensorrt.include_dir())


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("golden")
    return [str(tensorrt_cases.write(case, folder)) for case in tensorrt_cases.CASES]


@pytest.mark.slow
def test_the_plugins_keep_their_contract(harness: Path) -> None:
    done = cuda_sources.run(harness)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith("0 failure(s)\n")


@pytest.mark.slow
def test_layers_agree_with_the_reference(harness: Path, golden: list[str]) -> None:
    done = cuda_sources.run(harness, *golden)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("largest error") == len(tensorrt_cases.CASES)


def test_the_cases_cover_every_input() -> None:
    cases = tensorrt_cases.CASES
    assert {name for case in cases for name in case.shapes()} == set(tensorrt_cases.ORDER)
    assert {(case.plugin, case.prefix) for case in cases} == {
        (plugin, prefix)
        for plugin in ("DWAttention", "LowRankDWAttention")
        for prefix in ("drop", "exact", "static")
    }


class Bug(NamedTuple):
    what: str
    file: str
    find: str
    replace: str


BUGS = [
    Bug("tokens are not compared with the grid", "layer.cpp",
        "values[kN] >= 0 && values[kN] != tokens", "false"),
    Bug("the output lacks the prefix rows", "plugin.cpp",
        "builder.constant(s.tokens - dropped)", "builder.constant(s.height * s.width)"),
    Bug("a dynamic output keeps dropped rows", "plugin.cpp", "else if (dropped > 0)", "else if (false)"),
    Bug("LayerScale is forgotten", "plugin.cpp", "p.gamma = floats(Role::kGamma);", ""),
    Bug("biases of prefix rows are mixed up", "plugin.cpp",
        "floats(Role::kPrefixOutBias)", "floats(Role::kBo)"),
    Bug("coefficients may be half", "plugin.cpp",
        "return type == DataType::kFLOAT;", "return is_supported(type);"),
    Bug("the workspace is that of the smallest shapes", "plugin.cpp", "inputs[i].max", "inputs[i].min"),
    Bug("a field is not saved", "fields.cpp",
        '{"num_heads", &Fields::num_heads}', '{"num_heads", &Fields::num_prefix}'),
    Bug("unknown fields are ignored", "fields.cpp", "  refuse_name(field);\n}\n\n}", "}\n\n}"),
    Bug("refusals are silent", "log.cpp", "logger->log(", "if (false) logger->log("),
]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_found(bug: Bug, harness: Path, golden: list[str], tmp_path: Path) -> None:
    text = (tensorrt_build.SOURCES / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.find) == 1, "the place of the bug is not unique any more"
    changed = tmp_path / bug.file
    changed.write_text(text.replace(bug.find, bug.replace), encoding="utf-8")

    *compile_commands, link = tensorrt_build.commands(BUILD, TARGET)
    source = str(tensorrt_build.SOURCES / bug.file)
    (command,) = [c for c in compile_commands if c.endswith(f"-c {source}")]
    match = re.search(r" -o (\S+)", command)
    assert match is not None
    compiled = tmp_path / "changed.o"
    command = command.replace(source, str(changed)).replace(match[1], str(compiled))
    tensorrt_build.run_command(BUILD, f"{command} -Wno-error -w")
    assert match[1] in link
    link = link.replace(match[1], str(compiled)).replace(f"-o {TARGET}", f"-o {tmp_path / TARGET}")
    tensorrt_build.run_command(BUILD, link)

    done = cuda_sources.run(tmp_path / TARGET, *golden)
    said = done.stdout + done.stderr
    assert done.returncode != 0, "the bug went unnoticed"
    assert re.search(r"FAIL |ERROR: AddressSanitizer|simt: |runtime error", said), said[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_layers_agree_with_the_reference_on_the_gpu(golden: list[str]) -> None:
    """The same harness on the library itself, with real kernels."""
    harness = tensorrt_build.harness(tensorrt.include_dir())
    done = subprocess.run(
        [str(harness), *golden], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("largest error") == len(golden)
