"""``compare``: is the plugin worth it on this device, and where?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dwattn.deploy import machine
from dwattn.deploy.builder import build
from dwattn.deploy.options import BuildOptions
from dwattn.deploy.progress import progress
from dwattn.deploy.protocol import ITERATIONS, WARMUP, Timing, measure, ratios
from dwattn.deploy.session import LayerTime, Session, open_engine, random_inputs
from dwattn.deploy.sidecar import Sidecar
from dwattn.deploy.table import ms, table
from dwattn.deploy.verification import Difference, default_tolerance, differences
from dwattn.errors import DeployError
from dwattn.files import require_apart

SCHEMA = 1
_NAMES = ("native", "plugin")
_TOP = 12


@dataclass(frozen=True)
class CompareResult:
    """Two engines of one model.

    Args:
        timings: by ``"native"`` and ``"plugin"``, by clock.
        layers: their layers in order of execution, timed one by one.
        differences: the plugin engine's outputs against the native one's.
        tolerance: what these may be.
    """

    timings: dict[str, dict[str, Timing]]
    layers: dict[str, tuple[LayerTime, ...]]
    differences: tuple[Difference, ...]
    tolerance: float
    machine: dict[str, Any]

    @property
    def winner(self) -> str:
        """``"native"``, ``"plugin"``, or ``"neither"`` where the middle three fifths overlap."""
        native, plugin = (next(iter(self.timings[name].values())) for name in _NAMES)
        if native.p80_ms < plugin.p20_ms:
            return "native"
        return "plugin" if plugin.p80_ms < native.p20_ms else "neither"

    @property
    def speedup(self) -> dict[str, float]:
        """How many times as fast as native the plugin engine is."""
        native, plugin = (next(iter(self.timings[name].values())) for name in _NAMES)
        return ratios(plugin, native)

    @property
    def agrees(self) -> bool:
        """Whether both compute the same."""
        return all(d.max_rel <= self.tolerance for d in self.differences)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Milliseconds by kind of layer, for both engines."""
        kinds: dict[str, dict[str, float]] = {}
        for name, layers in self.layers.items():
            for layer in layers:
                both = kinds.setdefault(layer.kind or "unknown", dict.fromkeys(_NAMES, 0.0))
                both[name] += layer.ms
        return dict(sorted(kinds.items(), key=lambda item: -max(item[1].values())))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": SCHEMA,
            "winner": self.winner,
            "speedup": self.speedup,
            "agrees": self.agrees,
            "tolerance": self.tolerance,
            "differences": [d.to_dict() for d in self.differences],
            "timings": {
                name: {clock: timing.to_dict() for clock, timing in clocks.items()}
                for name, clocks in self.timings.items()
            },
            "kinds": self.by_kind(),
            "layers": {
                name: [{"name": layer.name, "kind": layer.kind, "ms": layer.ms} for layer in layers]
                for name, layers in self.layers.items()
            },
            "machine": self.machine,
        }

    def __str__(self) -> str:
        whole = [
            (name, *(ms(v) for v in (t.mean_ms, t.median_ms, t.p20_ms, t.p80_ms)))
            for name in _NAMES
            for t in [next(iter(self.timings[name].values()))]
        ]
        kinds = [
            (
                kind,
                ms(both["native"]),
                ms(both["plugin"]),
                f"{both['plugin'] - both['native']:+.4f}",
            )
            for kind, both in self.by_kind().items()
        ]
        parts = [
            table(("whole engine, ms", "mean", "median", "p20", "p80"), whole),
            table(("by kind of layer, ms", "native", "plugin", "difference"), kinds),
        ]
        for name in _NAMES:
            slowest = sorted(self.layers[name], key=lambda layer: -layer.ms)[:_TOP]
            rows = [(_short(layer.name), layer.kind, ms(layer.ms)) for layer in slowest]
            parts.append(table((f"slowest layers, {name}", "kind", "ms"), rows))
        worst = max((d.max_rel for d in self.differences), default=0.0)
        same = "The same outputs" if self.agrees else "NOT the same outputs"
        parts.append(f"{same}: relative difference {worst:.3g}, tolerance {self.tolerance:g}.")
        parts.append(self.verdict())
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """One sentence."""
        by = f"{self.speedup['median']:.3f} times as fast as native operators by the median"
        if self.winner == "neither":
            return f"No winner: the spread of the runs is larger than the difference ({by})."
        return f"The {self.winner} engine is faster here: the plugin is {by}."


def compare(
    native: str | Path,
    plugin_model: str | Path,
    folder: str | Path,
    options: BuildOptions,
    *,
    iterations: int = ITERATIONS,
    warmup: int = WARMUP,
    show_progress: bool = True,
) -> CompareResult:
    """Build one model with both lowerings, and measure which is faster, whole and by layers.

    Args:
        native, plugin_model: the ONNX files.
        folder: for ``native.engine`` and ``plugin.engine``; made if it is not there.
        options: of both builds; its ``onnx`` and ``engine`` do not matter.

    Raises:
        DeployError: a file that cannot be built or run here; models with other inputs.
    """
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeployError(f"Cannot make the folder {root}: {error.strerror}.") from error
    engines = {name: root / f"{name}.engine" for name in _NAMES}
    for engine in engines.values():
        require_apart(engine, DeployError, [native, plugin_model])
    records = []
    for name, onnx in zip(_NAMES, (native, plugin_model), strict=True):
        wanted = replace(options, onnx=str(onnx), engine=str(engines[name]), detailed=True)
        records.append(build(wanted, show_progress=show_progress))
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(open_engine(engine, plugin=options.plugin)[0])
            for name, engine in engines.items()
        }
        report = stack.enter_context(progress("Measuring", show_progress))
        return compare_sessions(sessions, records, iterations, warmup, report)


def compare_sessions(
    sessions: dict[str, Session],
    records: Sequence[Sidecar],
    iterations: int,
    warmup: int,
    report: Any,
) -> CompareResult:
    """:func:`compare` of engines that are loaded, by ``"native"`` and ``"plugin"``."""
    specs = {
        name: {key: (t.shape, t.dtype) for key, t in session.inputs.items()}
        for name, session in sessions.items()
    }
    if specs["native"] != specs["plugin"]:
        raise DeployError(
            f"The engines take other inputs: {specs['native']} and {specs['plugin']}. Export both "
            "from one model with the same options."
        )
    inputs = random_inputs(specs["native"])
    outputs = {name: session.run(inputs) for name, session in sessions.items()}
    for session in sessions.values():
        session.capture()
    timings = measure(sessions, iterations=iterations, warmup=warmup, progress=report)
    return CompareResult(
        timings,
        {name: tuple(session.layer_times()) for name, session in sessions.items()},
        tuple(differences(outputs["plugin"], outputs["native"])),
        default_tolerance(outputs["native"], *records),
        machine.describe(),
    )


def _short(name: str, width: int = 60) -> str:
    return name if len(name) <= width else name[: width - 3] + "..."
