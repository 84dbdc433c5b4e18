"""TensorRT plugins without a library: Triton kernels as PTX inside the engine.

For TensorRT 10.9 and later (JetPack 7), an alternative to ``libdwattn_trt.so``. A file of compiled
kernels, made on any machine with ``python -m dwattn.triton_ops.ahead --capability 87``, is
registered with ``tensorrt.plugin``; the device needs neither Triton nor torch::

    aot_plugin.register(aot_plugin.load("dwattn-sm87.json"))
    layer = network.add_plugin(
        trtp.op.dwattn.aggregate(v, weight, ctx, height=16, width=16), aot=True
    )

Plugins, all tensors linear, T = fp32 or fp16:

- ``dwattn::aggregate``: ``v T (B, H*W, C)``, ``weight fp32 (C, 3, 3)``, ``ctx fp32 (B, C)`` ->
  ``y T (B, H*W, C)``.
- ``dwattn::expand``: ``v T (B, H*W, C)``, ``weight``, ``ctx``, ``wo T (D', C)``, ``bo fp32 (D')``
  -> ``T (B, H*W, D')``: the aggregation and the output projection of a narrow layer.

**No run of these has been observed**: the PTX is compiled and assembled for sm_87 and sm_90 and the
registration is tested with TensorRT's Python package, but no engine with them has been built or run.
"""

# mypy: disable-error-code="untyped-decorator"
# No `from __future__ import annotations`: tensorrt.plugin looks at the annotations themselves.
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwattn.errors import DeployError

SCHEMA = 1
_GROUPS = 2  # programs that share a tile of patches in `expand`


@dataclass(frozen=True)
class Bundle:
    """Compiled kernels of one architecture; see ``dwattn.triton_ops.ahead`` for their fields."""

    capability: int
    kernels: tuple[dict[str, Any], ...]

    def select(self, plugin: str, dtype: str, **tile: Any) -> list[dict[str, Any]]:
        """Kernels of a plugin in a dtype with these constants; tactic ``i`` is item ``i - 1``."""
        return [
            kernel
            for kernel in self.kernels
            if (kernel["plugin"], kernel["dtype"]) == (plugin, dtype)
            and all(kernel["tile"][name] == value for name, value in tile.items())
        ]


def load(path: str | Path) -> Bundle:
    """Read a file of kernels.

    Raises:
        DeployError: it is missing, broken or of another version.
    """
    try:
        values = json.loads(Path(path).read_text())
        if values["schema"] != SCHEMA:
            raise DeployError(f"{path} has schema {values['schema']}; this version reads {SCHEMA}.")
        return Bundle(int(values["capability"]), tuple(values["kernels"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DeployError):
            raise
        raise DeployError(
            f"{path} is not a file of compiled kernels ({error}); write one with python -m "
            "dwattn.triton_ops.ahead."
        ) from error


def register(bundle: Bundle) -> None:
    """Register ``dwattn::aggregate`` and ``dwattn::expand``; once in a process.

    Raises:
        DeployError: a TensorRT without ahead-of-time plugins.
    """
    trt, trtp = _modules()
    _register_aggregate(bundle, trt, trtp)
    _register_expand(bundle, trt, trtp)


def _modules() -> tuple[Any, Any]:
    try:
        trt = importlib.import_module("tensorrt")
        trtp = importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise DeployError(
            f"tensorrt.plugin cannot be imported ({error}): it needs TensorRT 10.9 or later "
            "(JetPack 7), and numpy. On JetPack 6 use libdwattn_trt.so."
        ) from error
    if not hasattr(trtp, "aot_impl"):
        raise DeployError(
            f"TensorRT {trt.__version__} has no ahead-of-time plugins; 10.9 or later is needed. "
            "On JetPack 6 use libdwattn_trt.so."
        )
    return trt, trtp


def _register_aggregate(bundle: Bundle, trt: Any, trtp: Any) -> None:
    @trtp.register("dwattn::aggregate")
    def describe(
        v: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        ctx: trtp.TensorDesc,
        height: int,
        width: int,
    ) -> trtp.TensorDesc:
        return v.like()

    @trtp.autotune("dwattn::aggregate")
    def tune(
        v: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        ctx: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return _combinations(trtp, bundle, "aggregate", "{0}, FP32, FP32, {0}")

    @trtp.aot_impl("dwattn::aggregate")
    def implement(
        v: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        ctx: trtp.TensorDesc,
        height: int,
        width: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        kernel = _kernel(bundle.select("aggregate", _dtype(trt, v.dtype)), tactic)
        tile = kernel["tile"]
        batch, _, channels = _shape(v)
        _require_multiple("channels of dwattn::aggregate", channels)
        strips = -(-height // tile["ROWS"]) * -(-width // tile["COLUMNS"])
        programs = batch * strips * trtp.cdiv(channels, tile["CHANNELS"])
        return _launch(trtp, kernel, programs, [height, width, channels])


def _register_expand(bundle: Bundle, trt: Any, trtp: Any) -> None:
    @trtp.register("dwattn::expand")
    def describe(
        v: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        ctx: trtp.TensorDesc,
        wo: trtp.TensorDesc,
        bo: trtp.TensorDesc,
        height: int,
        width: int,
    ) -> trtp.TensorDesc:
        out = v.like()
        out.shape_expr[2] = wo.shape_expr[0]
        return out

    @trtp.autotune("dwattn::expand")
    def tune(
        v: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        ctx: trtp.TensorDesc,
        wo: trtp.TensorDesc,
        bo: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return _combinations(trtp, bundle, "expand", "{0}, FP32, FP32, {0}, FP32, {0}")

    @trtp.aot_impl("dwattn::expand")
    def implement(
        v: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        ctx: trtp.TensorDesc,
        wo: trtp.TensorDesc,
        bo: trtp.TensorDesc,
        height: int,
        width: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        batch, _, channels = _shape(v)
        dim = wo.shape_expr[0]
        _require_multiple("channels of dwattn::expand", channels)
        _require_multiple("features of dwattn::expand", dim)
        width_tile = _narrowest(bundle, _dtype(trt, v.dtype), channels)
        kernel = _kernel(bundle.select("expand", _dtype(trt, v.dtype), **width_tile), tactic)
        tiles = -(-height * width // kernel["tile"]["PATCHES"])
        return _launch(
            trtp, kernel, batch * (tiles * _GROUPS), [height, width, channels, dim, _GROUPS]
        )


def _combinations(trtp: Any, bundle: Bundle, plugin: str, types: str) -> list[Any]:
    """One per dtype, with as many tactics as there are tiles for each width."""
    combinations = []
    for name, dtype in (("FP32", "fp32"), ("FP16", "fp16")):
        kernels = bundle.select(plugin, dtype)
        widths = {(k["tile"].get("ONE_CHUNK"), k["tile"]["CHANNELS"]) for k in kernels}
        count = len(kernels) // len(widths) if plugin == "expand" else len(kernels)
        combinations.append(
            trtp.AutoTuneCombination(types.format(name), "LINEAR", list(range(1, count + 1)))
        )
    return combinations


def _narrowest(bundle: Bundle, dtype: str, channels: Any) -> dict[str, Any]:
    """The tile that holds all channels at once, else the one that walks over them."""
    wanted = channels.constant_value() if channels.is_constant else None
    held = sorted({k["tile"]["CHANNELS"] for k in bundle.select("expand", dtype, ONE_CHUNK=True)})
    for width in held:
        if wanted is not None and wanted <= width:
            return {"ONE_CHUNK": True, "CHANNELS": width}
    return {"ONE_CHUNK": False}


def _kernel(kernels: list[dict[str, Any]], tactic: int) -> dict[str, Any]:
    # The default tactic, 0, is the first kernel too.
    return kernels[max(tactic, 1) - 1]


def _shape(tensor: Any) -> tuple[Any, Any, Any]:
    shape = tensor.shape_expr
    return shape[0], shape[1], shape[2]


def _require_multiple(what: str, extent: Any) -> None:
    if not extent.is_constant or extent.constant_value() % 16:
        raise DeployError(
            f"The {what} must be a fixed multiple of 16, and are "
            f"{extent.constant_value() if extent.is_constant else 'dynamic'}: use native operators "
            "or libdwattn_trt.so."
        )


def _dtype(trt: Any, dtype: Any) -> str:
    return "fp16" if dtype == trt.float16 else "fp32"


def _launch(
    trtp: Any, kernel: dict[str, Any], programs: Any, integers: list[Any]
) -> tuple[str, str, Any, Any]:
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = programs
    parameters.block_x = kernel["threads"]
    parameters.shared_mem = kernel["shared"]
    extra = trtp.SymIntExprs(len(integers))
    for index, value in enumerate(integers):
        extra[index] = trtp.SymInt32(value)
    return kernel["name"], kernel["ptx"], parameters, extra
