"""Every Triton kernel is compiled for Jetson Orin (sm_87) and Hopper (sm_90) on a machine without GPU.

What the interpreter cannot show: that the compiler accepts the kernels in every dtype, bf16 too, that the
products use tensor cores and that nothing is spilled to local memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = [
    pytest.mark.compilers,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed."
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is an interpreter here."
    ),
]

FLOAT = "*fp32"
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
DTYPES = tuple(SIZES)


class Kernel(NamedTuple):
    """How a kernel is compiled: pointers (None: the dtype under test), constants, strides of 1."""

    module: str
    name: str
    pointers: dict[str, str | None]
    constants: dict[str, Any]
    contiguous: tuple[str, ...]
    floats: tuple[str, ...] = ()
    products: bool = False
    tuned_in: str = ""  # the module whose committed configurations it is launched with


def tensors(*names: str) -> dict[str, str | None]:
    return dict.fromkeys(names)


EXPAND = Kernel(
    "lowrank", "expand",
    tensors("v", "weight", "wo", "bo", "scale", "residual", "out") | {"ctx": FLOAT},
    {"ONE_CHUNK": True},
    ("w_column", "wo_channel", "bo_feature", "scale_feature", "residual_feature", "out_feature"),
    products=True, tuned_in="lowrank",
)  # fmt: skip
FOLD_MAPS = Kernel(
    "attention", "fold_maps",
    tensors("q", "k") | {"lse": FLOAT, "mean": FLOAT, "m2": FLOAT}, {"CHANNELS": 64},
    ("q_channel", "k_channel", "mean_column", "m2_column"), ("scale",),
    products=True, tuned_in="variance",
)  # fmt: skip
ATTEND = Kernel(
    "attention", "attend", tensors("q", "k", "v", "out") | {"lse": FLOAT},
    {"CHANNELS": 64, "VALUES": 64}, ("q_channel", "k_channel", "v_channel", "out_channel"),
    ("scale",), products=True, tuned_in="variance",
)  # fmt: skip
PROJECT = Kernel(
    "lowrank", "project", tensors("x", "wv", "bv", "v") | {"partial": FLOAT},
    {"TOKENS": 64, "CHANNELS": 64}, ("x_feature", "wv_feature", "bv_channel"), products=True,
)  # fmt: skip
KERNELS = {
    "aggregate": Kernel(
        "aggregate", "aggregate", tensors("v", "y", "weight") | {"ctx": FLOAT}, {},
        ("v_channel", "y_channel", "w_column"), tuned_in="aggregate",
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
    "project": PROJECT,
    "project to few tokens": PROJECT._replace(constants={"TOKENS": 16, "CHANNELS": 128}),
    "project to many channels": PROJECT._replace(constants={"TOKENS": 64, "CHANNELS": 256}),
    "expand": EXPAND,
    "expand in chunks": EXPAND._replace(constants={"ONE_CHUNK": False}),
    "attend": ATTEND,
    "attend without values": ATTEND._replace(
        pointers=tensors("q", "k") | {"lse": FLOAT},
        constants={"CHANNELS": 64, "VALUES": 16, "v": None, "out": None},
    ),
    "fold_maps": FOLD_MAPS,
    "fold_maps in fp64": FOLD_MAPS._replace(
        pointers=FOLD_MAPS.pointers | {"mean": "*fp64", "m2": "*fp64"}
    ),
    "fold_maps without m2": FOLD_MAPS._replace(
        pointers={k: v for k, v in FOLD_MAPS.pointers.items() if k != "m2"},
        constants={"QUERIES": 32, "KEYS": 16, "CHANNELS": 64, "m2": None}, tuned_in="",
    ),
}  # fmt: skip


def configurations(kernel: Kernel, dtype: str) -> list[dict[str, Any]]:
    """The constants and options that the kernel is launched with: all committed configurations."""
    size, fixed = SIZES[dtype], dict(kernel.constants)
    lowrank = importlib.import_module("dwattn.triton_ops.lowrank")
    if kernel.name == "expand":
        one = fixed["ONE_CHUNK"]
        fixed["CHANNELS"] = (
            lowrank.CHANNELS_IN_REGISTERS[size] if one else lowrank.CHANNELS_PER_CHUNK
        )
    if kernel.name == "project":
        fixed |= lowrank.projection_tile(fixed["CHANNELS"], size)
    if not kernel.tuned_in:
        return [fixed]
    configs = importlib.import_module(f"dwattn.triton_ops.{kernel.tuned_in}").CONFIGS
    return [
        fixed | config.kwargs | {"num_warps": config.num_warps, "num_stages": config.num_stages}
        for config in (configs[size] if isinstance(configs, dict) else configs)
    ]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path) -> Iterator[None]:
    """Compile in earnest, and leave nothing behind."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def compiled(
    kernel: Kernel, dtype: str, capability: int, settings: dict[str, Any], *, aligned: bool = True
) -> Any:
    """The compiled kernel; ``aligned=False`` promises nothing about strides, sizes and pointers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"dwattn.triton_ops.kernels.{kernel.module}")
    function = getattr(module, kernel.name)
    names = function.arg_names
    constants = {name: value for name, value in settings.items() if name in names}
    options = {name: value for name, value in settings.items() if name not in names}
    if "PRECISION" in names:
        constants.setdefault("PRECISION", "ieee")
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
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_good(binary: Any, kernel: Kernel, dtype: str, capability: int) -> None:
    assert bytes(binary.asm["cubin"][:4]) == b"\x7fELF"
    ptx = binary.asm["ptx"]
    assert re.search(r"\.target sm_(\d+)", ptx)[1] == str(capability)
    tensor_cores = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\.", ptx)
    assert bool(tensor_cores) == (kernel.products and dtype != "fp32")
    # 99 KB is what a block may have on the smallest of the supported GPUs.
    assert binary.metadata.shared <= 99 * 1024
    # No local memory: neither arrays nor spilled registers.
    assert ".local" not in ptx
    assert not re.search(r"\b(?:LDL|STL)\b", binary.asm["sass"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_both(name: str, dtype: str) -> None:
    kernel = KERNELS[name]
    settings = configurations(kernel, dtype)[0]
    for capability in (87, 90):
        assert_good(compiled(kernel, dtype, capability, settings), kernel, dtype, capability)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.tuned_in])
def test_no_configuration_spills(name: str, dtype: str) -> None:
    kernel = KERNELS[name]
    for settings in configurations(kernel, dtype)[1:]:
        assert_good(compiled(kernel, dtype, 87, settings), kernel, dtype, 87)


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_any_strides(name: str) -> None:
    kernel = KERNELS[name]
    binary = compiled(kernel, "fp16", 87, configurations(kernel, "fp16")[0], aligned=False)
    assert bytes(binary.asm["cubin"][:4]) == b"\x7fELF"
    assert ".local" not in binary.asm["ptx"]


@pytest.mark.parametrize("name", ["project", "expand", "attend", "fold_maps"])
def test_tf32_uses_tensor_cores(name: str) -> None:
    kernel = KERNELS[name]
    settings = configurations(kernel, "fp32")[0] | {"PRECISION": "tf32"}
    assert "tf32" in compiled(kernel, "fp32", 87, settings).asm["ptx"]


def test_the_aligned_kernels_use_wide_accesses() -> None:
    kernel = KERNELS["aggregate"]
    ptx = compiled(kernel, "fp16", 87, configurations(kernel, "fp16")[1]).asm["ptx"]
    assert re.search(r"ld\.global\.v[24]\.b32", ptx)
    assert re.search(r"st\.global\.v[24]\.b32", ptx)
