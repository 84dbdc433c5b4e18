"""The CUDA kernels as nvcc compiles them: every architecture, no local memory, the right instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from support import cuda_sources
from test_build import configure

ROOT = cuda_sources.ROOT
ARCHITECTURES = ("80", "86", "87", "89", "90a", "100", "120")


class Code(NamedTuple):
    """What the machine code of some kernels has to use, and what it must not."""

    kernels: str  #: pattern of their names in the object file
    architectures: tuple[str, ...]
    uses: set[str]
    avoids: frozenset[str] = frozenset()


#: In names of object files, __half and __nv_bfloat16 are 6__half and 13__nv_bfloat16.
SIXTEEN_BITS = r"I(6__half|13__nv_bfloat16)"
#: Tensor cores, most of them fed by asynchronous copies and matrix loads.
STAGED = {"HMMA", "LDGSTS", "LDSM"}


def on_tensor_cores(kernels: str, uses: set[str] = STAGED) -> Code:
    return Code(kernels + SIXTEEN_BITS, ("80", "87"), uses)


def in_two_precisions(kernel: str) -> tuple[Code, Code]:
    """Kernels that exist for fp32 twice: in TF32 on the tensor cores, and in fp32, which must not go there."""
    architectures = ("80", "87", "90a")
    return (
        Code(rf"{kernel}INS\w+4Tf32E", architectures, {"HMMA.1688.F32.TF32", "LDSM"}),
        Code(rf"{kernel}If", architectures, {"FFMA"}, frozenset({"HMMA"})),
    )


EXPECTED: dict[str, tuple[Code, ...]] = {
    "dw_attention.cu": (
        Code(rf"dw_attention_kernel{SIXTEEN_BITS}Lb1", ("80", "87"), STAGED),
        *in_two_precisions("dw_attention_kernel"),
    ),
    "lowrank_dw_attention.cu": (
        on_tensor_cores("lowrank_dw_kernel"),
        *in_two_precisions("lowrank_dw_kernel"),
    ),
    "linear.cu": (on_tensor_cores("linear_kernel"), *in_two_precisions("linear_kernel")),
    "exact_prefix_rows.cu": (on_tensor_cores("(score|pool)_tensor_kernel", {"HMMA"}),),
    "attention_variance.cu": (on_tensor_cores("(attend|fold)_kernel"),),
    # Hopper's kernels compile to nothing elsewhere.
    "dw_attention_sm90.cu": (
        Code(rf"dw_attention_sm90_kernel{SIXTEEN_BITS}", ("90a",), {"HGMMA", "UTMALDG", "SYNCS"}),
    ),
}


def need_nvcc() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")


def compile_cubin(source: str, architecture: str, target: Path) -> str:
    """Compiles one file; returns what ptxas reports."""
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-I", str(ROOT / "csrc"),
            "-Xptxas=-v,-warn-spills,-warn-lmem-usage", "-Xcompiler=-Wall",
            "-o", str(target), str(ROOT / cuda_sources.KERNELS / source),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.compilers
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_sources.with_kernels())
def test_machine_code(source: str, architecture: str, tmp_path: Path) -> None:
    """No kernel uses local memory, and each the instructions that it is written for."""
    need_nvcc()
    cubin = tmp_path / "kernel.cubin"
    report = compile_cubin(source, architecture, cubin)
    assert "warning" not in report, report
    # ptxas says so where it makes asynchronous products wait for each other.
    assert not re.search(r"C75\d\d|serialized|is injected", report), report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert frames, report
    assert all(frame == ("0", "0") for frame in frames), report
    expected = [code for code in EXPECTED.get(source, ()) if architecture in code.architectures]
    found = instructions(cubin, cuobjdump()) if expected else {}
    for code in expected:
        kernels = {name: used for name, used in found.items() if re.search(code.kernels, name)}
        assert kernels, f"no kernel has the name {code.kernels}"
        for name, opcodes in kernels.items():
            assert code.uses <= opcodes, name
            assert not ({"LDL", "STL"} | code.avoids) & opcodes, name


def cuobjdump() -> str:
    """The disassembler, of the CUDA toolkit or of the packages nvidia-cuda-{cuobjdump,nvdisasm}."""
    folders = [Path(path) for path in os.environ.get("PATH", "").split(os.pathsep)]
    folders += Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return str(folder / "cuobjdump")
    pytest.skip("cuobjdump and nvdisasm are not installed")


def instructions(cubin: Path, tool: str) -> dict[str, set[str]]:
    """Opcodes of every kernel, each with its modifiers and without."""
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    text = subprocess.run(
        [tool, "-sass", str(cubin)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    kernels = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        full = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)", body))
        kernels[name.strip()] = full | {opcode.partition(".")[0] for opcode in full}
    return kernels


def test_a_build_for_a_pytorch_without_cuda_says_so(tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA")
    done = configure(tmp_path / "build")
    assert done.returncode == 0, done.stderr
    assert "CPU-only build: the PyTorch of the build has no CUDA" in done.stdout


def test_cuda_can_be_switched_off(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", "-DDWATTN_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    assert "CPU-only build: switched off (DWATTN_CUDA=OFF)" in done.stdout


def test_a_demanded_cuda_build_without_nvcc_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on in the same folder once there is one."""
    before = os.environ["PATH"]
    without = [d for d in before.split(os.pathsep) if not (Path(d) / "nvcc").exists()]
    with monkeypatch.context() as patched:
        patched.setenv("PATH", os.pathsep.join(without))
        patched.delenv("CUDACXX", raising=False)
        done = configure(tmp_path / "build", "-DDWATTN_CUDA=ON")
    assert done.returncode != 0
    assert "DWATTN_CUDA=ON, but no nvcc was found" in " ".join(done.stderr.split())
    need_nvcc()
    done = configure(tmp_path / "build", "-DDWATTN_CUDA=ON")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "expected"),
    [("12.6.68", "80-real;87-real;90a-real;90-virtual"), ("13.0.88", "80-real;87-real;90a-real;100-real;120-real;90-virtual")],
)  # fmt: skip
def test_architectures_that_this_nvcc_does_not_know_are_left_out(
    version: str, expected: str, tmp_path: Path
) -> None:
    script = tmp_path / "choose.cmake"
    script.write_text(f"""
include("{ROOT}/cmake/CudaKernels.cmake")
set(CMAKE_CUDA_COMPILER_VERSION {version})
set(DWATTN_CUDA_ARCHITECTURES "80-real;87-real;90a-real;100-real;120-real;90-virtual")
dwattn_choose_cuda_architectures()
message("${{CMAKE_CUDA_ARCHITECTURES}}")
""")
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == expected


@pytest.mark.compilers
def test_a_cuda_build_also_loads_in_a_pytorch_without_cuda(tmp_path: Path) -> None:
    """One binary for both: everything of PyTorch's CUDA that it uses is a weak reference."""
    need_nvcc()
    options = ("-DDWATTN_CUDA=ON", "-DDWATTN_CUDA_ARCHITECTURES=87-real")
    done = configure(tmp_path / "build", *options)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        ["cmake", "--build", str(tmp_path / "build"), "--target", "_C"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    library = tmp_path / "build" / "_C.so"
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
y = torch.ops.dwattn.dw_aggregate(torch.ones(1, 6, 8), torch.ones(8, 3, 3), None, None, None, 2, 3, 0)
assert y[0, :, 0].tolist() == [4, 6, 4, 4, 6, 4]
assert "CUDA: registered" in torch._C._dispatch_dump("dwattn::dw_attention")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(ROOT).encode() not in library.read_bytes(), "the binary holds a path of the build"


def test_a_launch_leaves_an_error_of_other_code_alone(tmp_path: Path) -> None:
    need_nvcc()
    folder = ROOT / cuda_sources.PROGRAMS
    built, program = tmp_path / "foreign_error.o", tmp_path / "foreign_error"
    flags = ["-std=c++17", "-arch=sm_80", "-I", str(ROOT / "csrc")]
    for command in (
        ["nvcc", *flags, "-c", str(folder / "foreign_error.cu"), "-o", str(built)],
        ["g++", str(built), str(folder / "foreign_error_runtime.cpp"), "-o", str(program)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == "status 0, pending 704\n"
