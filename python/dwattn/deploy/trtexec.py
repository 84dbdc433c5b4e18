"""The ``trtexec`` commands that do the same, for those who want NVIDIA's own tool as a witness."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from dwattn.deploy.options import BuildOptions

Profile = Mapping[str, Sequence[Sequence[int]]]


def build_command(options: BuildOptions, profile: Profile, *, strongly_typed: bool) -> str:
    """``dwattn build`` with these options."""
    arguments = [f"--onnx={options.onnx}", f"--saveEngine={options.engine}", "--skipInference"]
    for index, name in enumerate(("min", "opt", "max")):
        if profile:
            arguments.append(f"--{name}Shapes={_shapes({k: v[index] for k, v in profile.items()})}")
    if strongly_typed:
        arguments.append("--stronglyTyped")
    if options.fp16 and not strongly_typed:
        arguments.append("--fp16")
    if options.plugin:
        arguments.append(f"--staticPlugins={options.plugin}")
    if options.timing_cache:
        arguments.append(f"--timingCacheFile={options.timing_cache}")
    if options.workspace is not None:
        arguments.append(f"--memPoolSize=workspace:{options.workspace}M")
    if options.detailed:
        arguments.append("--profilingVerbosity=detailed")
    return _join(options.runtime, arguments)


def bench_command(
    engine: str,
    shapes: Mapping[str, Sequence[int]],
    *,
    runtime: str,
    plugin: str | None,
    iterations: int,
    warmup_ms: int = 500,
) -> str:
    """``dwattn bench`` of an engine. ``trtexec`` counts its warm-up in milliseconds."""
    arguments = [f"--loadEngine={engine}"]
    if shapes:
        arguments.append(f"--shapes={_shapes(shapes)}")
    if plugin:
        arguments.append(f"--staticPlugins={plugin}")
    arguments += [
        "--useCudaGraph",
        "--useSpinWait",
        "--noDataTransfers",
        f"--warmUp={warmup_ms}",
        "--duration=0",
        f"--iterations={iterations}",
        f"--avgRuns={iterations}",
    ]
    return _join(runtime, arguments)


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _join(runtime: str, arguments: list[str]) -> str:
    tool = "tensorrt_rtx" if runtime == "tensorrt-rtx" else "trtexec"
    return shlex.join([tool, *arguments])
