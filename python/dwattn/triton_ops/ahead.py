"""Triton kernels compiled to PTX for another machine: ``python -m dwattn.triton_ops.ahead``.

The file is what :mod:`dwattn.deploy.aot_plugin` makes TensorRT plugins of, on a device that has
neither Triton nor torch. Compiling needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dwattn
from dwattn.deploy.aot_plugin import SCHEMA
from dwattn.errors import DeployError
from dwattn.files import write_atomically
from dwattn.triton_ops import aggregate, lowrank
from dwattn.triton_ops.kernels import ahead as kernels

_SIZES = {"fp32": 4, "fp16": 2}
#: How many of the tuned tiles of `expand` are used: those that spill no register in any form.
_EXPAND_TILES = {"fp32": 1, "fp16": 2}
_POINTERS = {
    "aggregate": {"v": "", "weight": "fp32", "ctx": "fp32", "y": ""},
    "expand": {"v": "", "weight": "fp32", "ctx": "fp32", "wo": "", "bo": "fp32", "out": ""},
}
#: Promised to be multiples of 16, which the plugins check: rows are then read 16 bytes at a time.
_ALIGNED = ("channels", "dim")


def bundle(capability: int) -> dict[str, Any]:
    """Every kernel in every dtype and tile, as JSON-able data.

    Args:
        capability: of the device, 87 for Jetson Orin.

    Raises:
        DeployError: Triton does not know the architecture, or a kernel uses scratch memory, which
            TensorRT does not provide.
    """
    built = [
        compile_kernel(name, dtype, tile, capability)
        for name in _POINTERS
        for dtype in _SIZES
        for tile in tiles(name, dtype)
    ]
    return {
        "schema": SCHEMA,
        "capability": capability,
        "triton": triton.__version__,
        "dwattn": dwattn.__version__,
        "kernels": built,
    }


def tiles(name: str, dtype: str) -> list[dict[str, Any]]:
    """Constants and options of a kernel's variants: the tuned ones, the best guesses first."""
    size = _SIZES[dtype]
    if name == "aggregate":
        return [_settings(config) for config in aggregate.CONFIGS]
    held = [c for c in (32, 64, 128) if c <= lowrank.CHANNELS_IN_REGISTERS[size]]
    widths = [{"CHANNELS": c, "ONE_CHUNK": True} for c in held]
    tuned = lowrank.CONFIGS[size][: _EXPAND_TILES[dtype]]
    widths.append({"CHANNELS": lowrank.CHANNELS_PER_CHUNK, "ONE_CHUNK": False})
    return [_settings(config) | width for config in tuned for width in widths]


def _settings(config: Any) -> dict[str, Any]:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {**config.kwargs, **options}


def compile_kernel(name: str, dtype: str, tile: dict[str, Any], capability: int) -> dict[str, Any]:
    """One kernel: ``plugin``, ``dtype``, ``tile``, ``name``, ``ptx``, ``threads``, ``shared``."""
    function = getattr(kernels, name)
    names = function.arg_names
    constants = {key: value for key, value in tile.items() if key in names}
    options = {key: value for key, value in tile.items() if key not in names}
    signature = dict.fromkeys(names, "i32")
    signature |= {key: f"*{kind or dtype}" for key, kind in _POINTERS[name].items()}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {*_POINTERS[name], *(key for key in _ALIGNED if key in names)}
    source = ASTSource(
        function,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in aligned},
    )
    try:
        # Paths of this machine have no place in a file for others.
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True
            binary = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=options
            )
    except Exception as error:
        raise DeployError(f"Triton cannot compile {name} for sm_{capability}: {error}") from error
    arguments = len(names) - len(constants)
    return {
        "plugin": name,
        "dtype": dtype,
        "tile": constants,
        "name": binary.metadata.name,
        "ptx": without_scratch(binary.asm["ptx"], binary.metadata.name, arguments),
        "threads": 32 * binary.metadata.num_warps,
        "shared": binary.metadata.shared,
    }


def without_scratch(ptx: str, name: str, arguments: int) -> str:
    """PTX without the pointers to scratch memory that Triton adds after the ``arguments``.

    TensorRT passes the plugin's arguments and nothing else.

    Raises:
        DeployError: the kernel uses them.
    """
    head, body = ptx.split(")", 1) if "(" in ptx else (ptx, "")
    opening, parameters = head.rsplit("(", 1)
    declared = [line.strip() for line in parameters.split(",")]
    kept, dropped = declared[:arguments], declared[arguments:]
    for line in dropped:
        parameter = line.split()[-1]
        if re.search(rf"\b{re.escape(parameter)}\b", body):
            raise DeployError(f"Kernel {name} uses scratch memory ({parameter}).")
    return f"{opening}(\n\t" + ",\n\t".join(kept) + f"\n){body}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Compile the kernels of the AOT plugins to PTX.")
    parser.add_argument("--capability", type=int, default=87, help="87: Jetson Orin")
    parser.add_argument("--out", type=Path, help="default: dwattn-sm87.json")
    parsed = parser.parse_args()
    out = parsed.out or Path(f"dwattn-sm{parsed.capability}.json")
    result = bundle(parsed.capability)
    with write_atomically(out, DeployError) as path:
        path.write_text(json.dumps(result))
    print(f"{out}: {len(result['kernels'])} kernels for sm_{parsed.capability}.")


if __name__ == "__main__":
    main()
