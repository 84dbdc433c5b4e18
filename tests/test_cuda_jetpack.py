"""JetPack 6 brings CUDA 12.6: the kernels compiled for Orin by that version's run-time compiler.

Needs the packages ``nvidia-cuda-nvrtc-cu12==12.6.*`` and ``nvidia-cuda-runtime-cu12==12.6.*`` (no GPU and
no toolkit), installed or below the directory that ``DWATTN_NVRTC_126`` names.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from pathlib import Path

import pytest

from support import cuda_sources

pytestmark = pytest.mark.compilers

#: What NVRTC lacks, for the host code that a .cu file holds beside its kernels. It is only parsed.
STAND_INS = {
    "cstdint": """
        typedef signed char int8_t; typedef unsigned char uint8_t;
        typedef short int16_t; typedef unsigned short uint16_t;
        typedef int int32_t; typedef unsigned int uint32_t;
        typedef long long int64_t; typedef unsigned long long uint64_t;
        typedef unsigned long uintptr_t;
        #define INT32_MAX 2147483647
        #define INT64_MAX 9223372036854775807LL
    """,
    "cstddef": "namespace std { typedef unsigned long size_t; }",
    "cstring": "",
    "cmath": "",
    "cstdlib": "namespace std { inline const char* getenv(const char*) { return nullptr; } }",
    "algorithm": """
        namespace std {
        template <class T> constexpr T min(T a, T b) { return a < b ? a : b; }
        template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
        }
    """,
    "limits": "",
    "type_traits": """
        namespace std {
        template <class A, class B> struct is_same { static constexpr bool value = false; };
        template <class A> struct is_same<A, A> { static constexpr bool value = true; };
        template <bool first, class A, class B> struct conditional { using type = A; };
        template <class A, class B> struct conditional<false, A, B> { using type = B; };
        template <bool first, class A, class B>
        using conditional_t = typename conditional<first, A, B>::type;
        }
    """,
    "cuda_runtime.h": """
        #define INFINITY __int_as_float(0x7f800000)
        template <class... A> cudaError_t cudaGetDevice(A...) { return cudaSuccess; }
        template <class... A> cudaError_t cudaDeviceGetAttribute(A...) { return cudaSuccess; }
        template <class... A> cudaError_t cudaFuncSetAttribute(A...) { return cudaSuccess; }
        template <class... A> cudaError_t cudaLaunchKernel(A...) { return cudaSuccess; }
        inline cudaError_t cudaGetLastError() { return cudaSuccess; }
        inline const char* cudaGetErrorString(cudaError_t) { return nullptr; }
    """,
    "kernels/failure.h": "namespace dwattn { const char* launch_error; }",
}


def find_packages() -> tuple[Path, Path]:
    """The compiler library and CUDA's headers, of version 12.6."""
    named = os.environ.get("DWATTN_NVRTC_126")
    folder = Path(named) if named else Path(sysconfig.get_path("purelib"))
    library = folder / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    headers = folder / "nvidia/cuda_runtime/include"
    if not library.is_file() or not (headers / "cuda_fp16.h").is_file():
        pytest.skip("nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 (12.6) are not installed")
    version = [
        line.split()[2]
        for line in (headers / "cuda.h").read_text(encoding="utf-8").splitlines()
        if line.startswith("#define CUDA_VERSION")
    ]
    if version != ["12060"]:
        pytest.skip(f"the installed CUDA headers are of version {version}, not 12060")
    return library, headers


def compiled(
    nvrtc: ctypes.CDLL, headers: Path, source: Path, architecture: str
) -> tuple[int, str, int]:
    """NVRTC's return code, its log and the size of the machine code."""
    names = (ctypes.c_char_p * len(STAND_INS))(*(name.encode() for name in STAND_INS))
    texts = (ctypes.c_char_p * len(STAND_INS))(*(text.encode() for text in STAND_INS.values()))
    program = ctypes.c_void_p()
    code = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source.read_bytes(),
        source.name.encode(),
        len(STAND_INS),
        texts,
        names,
    )
    assert code == 0
    options = [
        f"--gpu-architecture=sm_{architecture}", "-std=c++17", "-default-device",
        f"-I{cuda_sources.ROOT / 'csrc'}", f"-I{headers}",
    ]  # fmt: skip
    code = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    size.value = 0
    if code == 0:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode(), size.value


@pytest.mark.parametrize("name", cuda_sources.with_kernels())
def test_kernels_compile_with_cuda_12_6_for_orin(name: str) -> None:
    library, headers = find_packages()
    source = cuda_sources.ROOT / cuda_sources.KERNELS / name
    nvrtc = ctypes.CDLL(str(library))
    code, log, size = compiled(nvrtc, headers, source, "87")
    assert code == 0, log
    if name.endswith("_sm90.cu"):  # nothing of it is left for Orin
        code, log, size = compiled(nvrtc, headers, source, "90a")
        assert code == 0, log
    assert size > 10_000, "the kernels were not instantiated"
