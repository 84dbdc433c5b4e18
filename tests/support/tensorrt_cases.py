"""Golden cases of the TensorRT plugins: inputs, and what the fp64 reference makes of them.

``python -m support.tensorrt_cases FOLDER`` writes them all, for a run of the harness on another machine
(``plugins/tensorrt/harness/golden.h`` describes the files).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dwattn import reference
from dwattn.geometry import Geometry

#: Inputs that always are float; the others have the dtype of x.
COEFFICIENTS = {
    "bv", "kernel", "kappa", "mu", "beta", "bo", "gamma", "query_bias", "prefix_value_bias",
    "prefix_out_bias", "static_a", "static_b",
}  # fmt: skip

#: In the order of the node's inputs.
ORDER = (
    "x", "residual", "grid", "wv", "bv", "kernel", "kappa", "mu", "beta", "wo", "bo", "gamma", "query",
    "query_bias", "key", "prefix_value", "prefix_value_bias", "prefix_out", "prefix_out_bias", "static_a",
    "static_b",
)  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """One node. ``options`` names the optional inputs; ``prefix_channels`` 0: prefix rows use wv and wo."""

    name: str
    plugin: str
    dtype: torch.dtype
    prefix: str = "drop"
    num_prefix: int = 0
    grid: tuple[int, int] = (3, 5)
    batch: int = 2
    dim: int = 32
    channels: int = 32
    dim_out: int = 40
    num_heads: int = 0
    prefix_channels: int = 0
    options: tuple[str, ...] = ()

    @property
    def geometry(self) -> Geometry:
        return Geometry(*self.grid, self.num_prefix)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the inputs that are present."""
        d, c, o, p, cp = (
            self.dim, self.channels, self.dim_out, self.num_prefix, self.prefix_channels or self.channels,
        )  # fmt: skip
        rows = self.geometry.num_tokens - (p if self.prefix == "drop" else 0)
        every = {
            "x": (self.batch, self.geometry.num_tokens, d), "residual": (self.batch, rows, o),
            "grid": (1, 1, *self.grid), "wv": (c, d), "bv": (c,), "kernel": (c, 3, 3),
            "kappa": (p, c), "mu": (c,), "beta": (c,), "wo": (o, c), "bo": (o,), "gamma": (o,),
            "query": (cp, d), "query_bias": (cp,), "key": (cp, d), "prefix_value": (cp, d),
            "prefix_value_bias": (cp,), "prefix_out": (o, cp), "prefix_out_bias": (o,),
            "static_a": (p, cp), "static_b": (p, cp),
        }  # fmt: skip
        present = {"x", "wv", "kernel", "wo", *self.options}
        present |= {"exact": {"query", "key"}, "static": {"static_a", "static_b"}}.get(
            self.prefix, set()
        )
        if self.prefix_channels:
            present |= {"prefix_value", "prefix_out"}
        return {name: every[name] for name in ORDER if name in present}

    def inputs(self) -> dict[str, Tensor]:
        """Random, each in its own dtype."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        made = {}
        for name, shape in self.shapes().items():
            values = torch.randn(shape, generator=generator)
            if name in ("wv", "wo", "query", "key", "prefix_value", "prefix_out", "kernel"):
                values /= shape[-1] ** 0.5
            made[name] = values.to(torch.float32 if name in COEFFICIENTS else self.dtype)
        return made


def evaluate(case: Golden, inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What the node computes, by the reference in ``dtype``: ``(B, N_out, D_out)``."""
    t = {name: value.to(dtype) for name, value in inputs.items()}
    geometry = case.geometry
    out = reference.dw_layer(
        t["x"], t["wv"], t.get("bv"), t["kernel"], t["wo"], t.get("bo"), geometry,
        kappa=t.get("kappa"), mu=t.get("mu"), beta=t.get("beta"),
    )  # fmt: skip
    if case.prefix != "drop":
        own = "prefix_value" in t
        value, bias = (
            (t["prefix_value"], t.get("prefix_value_bias")) if own else (t["wv"], t.get("bv"))
        )
        if case.prefix == "exact":  # query is scaled already
            rows = reference.exact_prefix_rows(
                t["x"], case.num_prefix, t["query"], t["key"], value, case.num_heads,
                bq=t.get("query_bias"), bv=bias, scale=1.0,
            )  # fmt: skip
        else:
            values = F.linear(t["x"], value, bias)
            rows = reference.static_prefix_rows(values, geometry, t["static_a"], t["static_b"])
        weight, bias = (
            (t["prefix_out"], t.get("prefix_out_bias"))
            if "prefix_out" in t
            else (t["wo"], t.get("bo"))
        )
        out = torch.cat([F.linear(rows, weight, bias), out], dim=1)
    if "gamma" in t:
        out = out * t["gamma"]
    return out + t["residual"] if "residual" in t else out


WIDE, NARROW = "DWAttention", "LowRankDWAttention"
CONTEXT = ("bv", "kappa", "mu", "beta", "bo")
CASES = (
    Golden("plain", WIDE, torch.float32),
    Golden(
        "wide-exact", WIDE, torch.float16, "exact", 1, num_heads=4,
        options=(*CONTEXT, "gamma", "residual", "query_bias"),
    ),
    Golden(
        "wide-static", WIDE, torch.bfloat16, "static", 2, grid=(4, 3), options=(*CONTEXT, "residual"),
    ),
    Golden(
        "wide-exact-dynamic-grid", WIDE, torch.float32, "exact", 3, grid=(2, 7), num_heads=2,
        options=("grid", "bv", "bo"),
    ),
    Golden(
        "narrow-drop-dynamic-grid", NARROW, torch.float16, "drop", 1, channels=16,
        options=("grid", *CONTEXT, "gamma", "residual"),
    ),
    Golden(
        "narrow-exact", NARROW, torch.float16, "exact", 1, channels=16, num_heads=3, prefix_channels=24,
        options=(*CONTEXT, "gamma", "residual", "query_bias", "prefix_value_bias", "prefix_out_bias"),
    ),
    Golden(
        "narrow-static", NARROW, torch.float32, "static", 2, channels=16, prefix_channels=24,
        options=(*CONTEXT, "prefix_value_bias"),
    ),
    Golden("narrow-bfloat16", NARROW, torch.bfloat16, channels=24, options=("mu", "bv", "residual")),
)  # fmt: skip


def write(case: Golden, folder: Path) -> Path:
    """``folder/NAME`` with case.txt and the tensors."""
    target = folder / case.name
    target.mkdir(parents=True)
    inputs = case.inputs()
    expected = evaluate(case, inputs, torch.float64)
    plain = evaluate(case, inputs, case.dtype).double()
    # Twice the error of the plain computation in the same dtype, as for the kernels, and a little
    # for tensors as small as these.
    allowed = (
        2 * (plain - expected).abs().max() + torch.finfo(case.dtype).eps * expected.abs().max()
    )
    height, width = (0, 0) if "grid" in inputs else case.grid
    lines = [
        f"plugin {case.plugin}", f"field height {height}", f"field width {width}",
        f"field num_prefix {case.num_prefix}", f"field num_heads {case.num_heads}",
        f"field prefix {case.prefix}",
    ]  # fmt: skip
    for name, tensor in inputs.items():
        lines.append(f"input {name} {_text(tensor)}")
        _save(tensor, target / f"{name}.bin")
    lines.append(f"output {_text(expected.to(case.dtype))}")
    lines.append(f"tolerance {float(allowed)!r}")
    _save(expected, target / "expected.bin")
    (target / "case.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _text(tensor: Tensor) -> str:
    return " ".join([str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)])


def _save(tensor: Tensor, path: Path) -> None:
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    for golden in CASES:
        print(write(golden, Path(sys.argv[1])))
