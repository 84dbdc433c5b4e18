"""Every Triton kernel is compiled for Jetson Orin (sm_87) and Hopper (sm_90) on a machine without GPU.

What the interpreter cannot show: that the compiler accepts the kernels in every dtype, bf16 too, that the
products use tensor cores and that nothing is spilled to local memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed."
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is an interpreter here."
    ),
]

FLOAT = "*fp32"


class Kernel(NamedTuple):
    """How a kernel is compiled: pointers (None: the dtype under test), constants, absent tensors."""

    module: str
    name: str
    pointers: dict[str, str | None]
    constants: dict[str, Any]
    contiguous: tuple[str, ...]  # strides that are 1
    floats: tuple[str, ...] = ()
    products: bool = False
    options: dict[str, int] | None = None


def tensors(*names: str) -> dict[str, str | None]:
    return dict.fromkeys(names)


_LOWRANK_STRIDES = ("w_column", "wo_channel", "bo_feature", "scale_feature", "residual_feature")
_EXPAND = Kernel(
    "lowrank", "expand",
    tensors("v", "weight", "wo", "bo", "scale", "residual", "out") | {"ctx": FLOAT},
    {"CHANNELS": 64, "ONE_CHUNK": True, "PATCHES": 64, "FEATURES": 128},
    (*_LOWRANK_STRIDES, "out_feature"),
    products=True,
)  # fmt: skip
_MAPS = {"QUERIES": 64, "KEYS": 64, "CHANNELS": 64}
_FOLD = Kernel(
    "attention", "fold_maps",
    tensors("q", "k") | {"lse": FLOAT, "mean": FLOAT, "m2": FLOAT}, _MAPS,
    ("q_channel", "k_channel", "mean_column", "m2_column"), ("scale",), products=True,
)  # fmt: skip
KERNELS = {
    "aggregate": Kernel(
        "aggregate", "aggregate", tensors("v", "y", "weight") | {"ctx": FLOAT},
        {"ROWS": 8, "COLUMNS": 8, "CHANNELS": 64}, ("v_channel", "y_channel", "w_column"),
    ),
    "patch_sums": Kernel(
        "aggregate", "patch_sums", tensors("v") | {"partial": FLOAT},
        {"TOKENS": 256, "ROWS": 16, "CHANNELS": 64}, ("v_channel",),
    ),
    "context": Kernel(
        "aggregate", "context",
        tensors("v", "kappa", "mu", "beta") | {"partial": FLOAT, "ctx": FLOAT},
        {"CHANNELS": 128}, ("v_channel", "kappa_channel", "mu_channel", "beta_channel"),
    ),
    "kernel_gradient": Kernel(
        "gradient", "kernel_gradient", tensors("v", "g") | {"partial": FLOAT},
        {"ROWS": 8, "COLUMNS": 8, "CHANNELS": 64}, ("v_channel", "g_channel"),
    ),
    "project": Kernel(
        "lowrank", "project", tensors("x", "wv", "bv", "v") | {"partial": FLOAT},
        {"TOKENS": 64, "CHANNELS": 64, "FEATURES": 64},
        ("x_feature", "wv_feature", "bv_channel"), products=True, options={"num_stages": 3},
    ),
    "expand": _EXPAND,
    "expand in chunks": _EXPAND._replace(constants=_EXPAND.constants | {"ONE_CHUNK": False, "CHANNELS": 32}),
    "attend": Kernel(
        "attention", "attend", tensors("q", "k", "v", "out") | {"lse": FLOAT},
        _MAPS | {"VALUES": 64}, ("q_channel", "k_channel", "v_channel", "out_channel"), ("scale",),
        products=True,
    ),
    "attend without values": Kernel(
        "attention", "attend", tensors("q", "k") | {"lse": FLOAT},
        _MAPS | {"VALUES": 16, "v": None, "out": None}, ("q_channel", "k_channel"), ("scale",),
        products=True,
    ),
    "fold_maps": _FOLD,
    "fold_maps in fp64": _FOLD._replace(
        pointers=_FOLD.pointers | {"mean": "*fp64", "m2": "*fp64"}
    ),
    "fold_maps without m2": _FOLD._replace(
        pointers={k: v for k, v in _FOLD.pointers.items() if k != "m2"},
        constants={"QUERIES": 64, "KEYS": 16, "CHANNELS": 64, "m2": None},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path) -> Iterator[None]:
    """Compile in earnest, and leave nothing behind."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def compiled(kernel: Kernel, dtype: str, capability: int, *, aligned: bool = True) -> Any:
    """The compiled kernel; ``aligned=False`` promises nothing about strides, sizes and pointers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"dwattn.triton_ops.kernels.{kernel.module}")
    function = getattr(module, kernel.name)
    names = function.arg_names
    constants = dict(kernel.constants)
    if "PRECISION" in names:
        constants["PRECISION"] = "ieee"
    if aligned:
        constants.update({name: 1 for name in kernel.contiguous if name in names})
    signature = dict.fromkeys(names, "i32")
    signature.update({name: kind or f"*{dtype}" for name, kind in kernel.pointers.items()})
    signature.update(dict.fromkeys(kernel.floats, "fp32"))
    signature.update(dict.fromkeys(constants, "constexpr"))
    hint = [["tt.divisibility", 16]]
    attributes = {
        (index,): hint
        for index, name in enumerate(names)
        if aligned and signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": 4, "num_stages": 2, **(kernel.options or {})}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [87, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, dtype: str, capability: int) -> None:
    kernel = KERNELS[name]
    binary = compiled(kernel, dtype, capability)
    assert bytes(binary.asm["cubin"][:4]) == b"\x7fELF"
    ptx = binary.asm["ptx"]
    assert re.search(r"\.target sm_(\d+)", ptx)[1] == str(capability)
    tensor_cores = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\.", ptx)
    assert bool(tensor_cores) == (kernel.products and dtype != "fp32")
    # 99 KB is what a block may have on the smallest of the supported GPUs.
    assert binary.metadata.shared <= 99 * 1024
    assert ".local" not in ptx
    assert not re.search(r"\b(?:LDL|STL)\b", binary.asm["sass"])


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_any_strides(name: str) -> None:
    binary = compiled(KERNELS[name], "fp16", 87, aligned=False)
    assert bytes(binary.asm["cubin"][:4]) == b"\x7fELF"
    assert ".local" not in binary.asm["ptx"]


def test_the_aligned_kernels_use_wide_accesses() -> None:
    ptx = compiled(KERNELS["aggregate"], "fp16", 87).asm["ptx"]
    assert re.search(r"ld\.global\.v[24]\.b32", ptx)
    assert re.search(r"st\.global\.v[24]\.b32", ptx)
