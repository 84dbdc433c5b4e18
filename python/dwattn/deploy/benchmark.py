"""``bench``: latencies of engines on the GPU, or of ONNX files on a CPU core."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwattn.deploy import machine, trtexec
from dwattn.deploy.progress import progress
from dwattn.deploy.protocol import ITERATIONS, WARMUP, Runner, Timing, measure, ratios
from dwattn.deploy.provider import OnnxRunner, pinned
from dwattn.deploy.session import open_engine
from dwattn.deploy.table import ms, table
from dwattn.errors import DeployError

SCHEMA = 1
PROVIDERS = ("tensorrt", "cpu")


@dataclass(frozen=True)
class BenchResult:
    """Measured latencies.

    Args:
        timings: by file, by clock (``gpu``, ``host``).
        ratios: how many times as fast as the baseline, ``mean`` and ``median``; empty without one.
        settings: what was measured and how.
        machine: where.
        commands: the equivalent ``trtexec`` command of each engine.
    """

    timings: dict[str, dict[str, Timing]]
    ratios: dict[str, float]
    settings: dict[str, Any]
    machine: dict[str, Any]
    commands: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": SCHEMA,
            "timings": {
                name: {clock: timing.to_dict() for clock, timing in clocks.items()}
                for name, clocks in self.timings.items()
            },
            "ratios": self.ratios,
            "settings": self.settings,
            "machine": self.machine,
            "trtexec": list(self.commands),
        }

    def __str__(self) -> str:
        rows = [
            (name, clock, *(ms(v) for v in (t.mean_ms, t.median_ms, t.p20_ms, t.p80_ms, t.min_ms)))
            for name, clocks in self.timings.items()
            for clock, t in clocks.items()
        ]
        lines = [table(("ms", "clock", "mean", "median", "p20", "p80", "min"), rows)]
        if self.ratios:
            lines.append(
                f"{self.ratios['mean']:.3f} times as fast as the baseline by the mean, "
                f"{self.ratios['median']:.3f} by the median."
            )
        if self.commands:
            lines += ["The same with trtexec:", *(f"  {command}" for command in self.commands)]
        return "\n".join(lines)


def bench(
    path: str | Path,
    *,
    against: str | Path | None = None,
    provider: str = "tensorrt",
    iterations: int = ITERATIONS,
    warmup: int = WARMUP,
    batch: int | None = None,
    size: str | None = None,
    plugin: str | None = None,
    threads: int = 1,
    core: int | None = None,
    verbose: bool = False,
    show_progress: bool = True,
) -> BenchResult:
    """Measure an engine (or with ``provider="cpu"`` an ONNX file), and a baseline in turns with it.

    Args:
        provider: ``"tensorrt"``: CUDA graph, spinning, no transfers. ``"cpu"``: onnxruntime.
        iterations, warmup: of each file.
        batch, size: where they may vary.
        threads, core: of the CPU provider; one thread on the last allowed core by default, and no
            pinning with more threads or ``core=-1``.

    Raises:
        DeployError: a file that cannot be measured here.
    """
    if provider not in PROVIDERS:
        raise DeployError(
            f"There is no provider {provider!r}; choose one of {', '.join(PROVIDERS)}."
        )
    paths = [Path(path)] if against is None else [Path(path), Path(against)]
    if len({p.resolve() for p in paths}) < len(paths):
        raise DeployError(f"{path} cannot be its own baseline.")
    commands: tuple[str, ...] = ()
    settings: dict[str, Any] = {
        "provider": provider, "iterations": iterations, "warmup": warmup,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        if provider == "cpu":
            if threads < 1:
                raise DeployError(f"--threads {threads} must be at least 1.")
            used = stack.enter_context(pinned(-1 if threads > 1 and core is None else core))
            settings |= {"threads": threads, "core": used}
            runners = _cpu(paths, threads, batch, size, settings)
        else:
            runners, commands = _gpu(
                paths, stack, plugin, batch, size, verbose, iterations, settings
            )
        report = stack.enter_context(progress("Measuring", show_progress))
        timings = measure(runners, iterations=iterations, warmup=warmup, progress=report)
        info = machine.describe(settings.get("core") or 0)
    return BenchResult(timings, _ratios(timings, paths), settings, info, commands)


def _ratios(timings: dict[str, dict[str, Timing]], paths: list[Path]) -> dict[str, float]:
    if len(paths) == 1:
        return {}
    first, second = (next(iter(timings[str(path)].values())) for path in paths)
    return ratios(first, second)


def _cpu(
    paths: list[Path], threads: int, batch: int | None, size: str | None, settings: dict[str, Any]
) -> dict[str, Runner]:
    found = {str(p): OnnxRunner(p, threads=threads, batch=batch, size=size) for p in paths}
    settings["onnxruntime"] = next(iter(found.values())).version
    settings["shapes"] = {
        name: {key: list(value.shape) for key, value in runner.inputs.items()}
        for name, runner in found.items()
    }
    return dict(found)


def _gpu(
    paths: list[Path],
    stack: contextlib.ExitStack,
    plugin: str | None,
    batch: int | None,
    size: str | None,
    verbose: bool,
    iterations: int,
    settings: dict[str, Any],
) -> tuple[dict[str, Runner], tuple[str, ...]]:
    runners: dict[str, Runner] = {}
    commands = []
    settings |= {"shapes": {}, "cuda_graph": {}, "build": {}}
    for path in paths:
        session, record, library = open_engine(
            path, plugin=plugin, batch=batch, size=size, verbose=verbose
        )
        stack.enter_context(session)
        name = str(path)
        runners[name] = session
        shapes = {key: tensor.shape for key, tensor in session.inputs.items()}
        settings["shapes"][name] = {key: list(shape) for key, shape in shapes.items()}
        settings["cuda_graph"][name] = session.capture()
        settings["build"][name] = record.to_dict() if record else None
        commands.append(
            trtexec.bench_command(
                name,
                shapes if record is None or record.profile else {},
                runtime=record.runtime if record else "tensorrt",
                plugin=library,
                iterations=iterations,
            )
        )
        settings["device"] = session.device().to_dict()
    return runners, tuple(commands)
