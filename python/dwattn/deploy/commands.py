"""``dwattn-deploy``, and the commands of the same names in ``dwattn``.

argparse, because a Jetson's system Python has it. Exit codes: 0 done, 1 an error in one sentence,
2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dwattn
from dwattn.deploy.options import RUNTIMES, BuildOptions, Range
from dwattn.deploy.protocol import ITERATIONS, WARMUP
from dwattn.errors import DwattnError
from dwattn.files import printing, stopped_in_order, strict_json

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

SUMMARIES = {
    "build": "Build a TensorRT engine from an ONNX file, on its device.",
    "bench": "Measure an engine's latency, or an ONNX file's on a CPU core.",
    "verify": "Compare an engine with golden outputs.",
    "compare": "Build and measure native and plugin engines, layer by layer.",
    "golden": "Compute golden outputs of an ONNX file with onnxruntime.",
}


def main(arguments: Sequence[str] | None = None, program: str = "dwattn-deploy") -> int:
    """Run a command and return the exit code."""
    parsed = _parsed(arguments, program)
    try:
        with stopped_in_order(), notes():
            return int(_RUN[parsed.command](parsed))
    except DwattnError as error:
        print(f"Error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("Interrupted; no file was left half-written.", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Print warnings as notes on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"Note: {message}", file=sys.stderr)
        yield


def script() -> None:
    """The installed command."""
    sys.exit(main())


def _parsed(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program, description="Build, measure and verify TensorRT engines on a device."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.add_argument("--version", action="version", version=f"{program} {dwattn.__version__}")
    added = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in SUMMARIES.items()
    }
    _add_build(added["build"])
    _add_bench(added["bench"])
    _add_verify(added["verify"])
    _add_compare(added["compare"])
    _add_golden(added["golden"])
    for command in added.values():
        command.add_argument(
            "--json", action="store_true", help="print the result as JSON and nothing else"
        )
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse itself would show the usage of the program, not of the command
        added[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="M.ONNX")
    parser.add_argument("-o", "--out", metavar="FILE", help="engine to write; default: M.engine")
    _add_build_options(parser)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime", choices=list(RUNTIMES), default="tensorrt",
        help="tensorrt-rtx builds without a GPU; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--fp16", action="store_true",
        help="let TensorRT 10 use half precision for an fp32 file; later ones need an fp16 file",
    )  # fmt: skip
    _add_plugin(parser)
    parser.add_argument(
        "--timing-cache", metavar="FILE", help="file of kernel times, which a later build uses"
    )
    parser.add_argument(
        "--workspace", type=int, metavar="MIB", help="limit of scratch memory; default: all memory"
    )
    parser.add_argument(
        "--batch", metavar="MIN:OPT:MAX", help="range of batch sizes, or one number; default 1"
    )
    parser.add_argument(
        "--size", metavar="MIN:OPT:MAX", help="range of pixels, for a model of dynamic image size"
    )
    parser.add_argument("--verbose", action="store_true", help="print all of TensorRT's messages")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="an engine, or with --provider cpu an ONNX file"
    )
    parser.add_argument("--against", metavar="FILE", help="baseline, measured in turns with FILE")
    parser.add_argument(
        "--provider", choices=["tensorrt", "cpu"], default="tensorrt",
        help="cpu: onnxruntime on one pinned core; default %(default)s",
    )  # fmt: skip
    _add_protocol(parser)
    _add_shape(parser)
    _add_plugin(parser)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of the cpu provider; default %(default)s",
    )
    parser.add_argument(
        "--core", type=int, metavar="N",
        help="CPU core to pin to; default: the last allowed one; -1: none",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="print all of TensorRT's messages")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", metavar="M.ENGINE")
    parser.add_argument("golden", metavar="DIR", help="folder written by the command golden")
    parser.add_argument("--tolerance", type=float, metavar="X", help="bound on the relative error")
    _add_plugin(parser)
    parser.add_argument("--verbose", action="store_true", help="print all of TensorRT's messages")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("native", metavar="NATIVE.ONNX")
    parser.add_argument("plugin_model", metavar="PLUGIN.ONNX")
    parser.add_argument(
        "-o",
        "--out",
        metavar="DIR",
        default="compare",
        help="folder for the engines; default %(default)s",
    )
    _add_build_options(parser)
    _add_protocol(parser)


def _add_golden(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="M.ONNX", help="ONNX file, exported with --lowering native or function"
    )
    parser.add_argument(
        "-o", "--out", metavar="DIR", default="golden", help="folder to write; default %(default)s"
    )
    _add_shape(parser)


def _add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin", metavar="LIBRARY", help="path of the plugin library, libdwattn_trt.so"
    )


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--iterations",
        type=int,
        default=ITERATIONS,
        metavar="N",
        help="timed calls; default %(default)s",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=WARMUP,
        metavar="N",
        help="untimed calls before them; default %(default)s",
    )


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=int, metavar="N", help="batch size, if the file leaves it open"
    )
    parser.add_argument(
        "--size", metavar="HxW", help="image size in pixels, if the file leaves it open"
    )


def _build(parsed: argparse.Namespace) -> int:
    from dwattn.deploy.builder import build

    engine = parsed.out or str(Path(parsed.model).with_suffix(".engine"))
    options = _build_options(parsed, parsed.model, engine)
    record = build(options)
    text = (
        f"{engine}: {record.engine['bytes'] / 2**20:.1f} MiB, {record.precision}, by "
        f"{record.runtime} {record.version} in {record.seconds:.0f} s."
    )
    if record.runtime == "tensorrt":
        from dwattn.deploy.trtexec import build_command

        typed = record.precision.startswith("strongly typed")
        text += "\nThe same with trtexec:\n  " + build_command(
            options, record.profile, strongly_typed=typed
        )
    return _emit(record, parsed, text)


def _build_options(parsed: argparse.Namespace, onnx: str, engine: str) -> BuildOptions:
    return BuildOptions(
        onnx, engine, runtime=parsed.runtime, fp16=parsed.fp16, plugin=parsed.plugin,
        timing_cache=parsed.timing_cache, workspace=parsed.workspace, batch=parsed.batch,
        size=parsed.size, verbose=parsed.verbose,
    )  # fmt: skip


def _bench(parsed: argparse.Namespace) -> int:
    from dwattn.deploy.benchmark import bench

    result = bench(
        parsed.file, against=parsed.against, provider=parsed.provider,
        iterations=parsed.iterations, warmup=parsed.warmup, batch=parsed.batch,
        size=_one_size(parsed.size), plugin=parsed.plugin, threads=parsed.threads,
        core=parsed.core, verbose=parsed.verbose,
    )  # fmt: skip
    return _emit(result, parsed)


def _verify(parsed: argparse.Namespace) -> int:
    from dwattn.deploy.verification import verify

    result = verify(
        parsed.engine, parsed.golden, tolerance=parsed.tolerance, plugin=parsed.plugin,
        verbose=parsed.verbose,
    )  # fmt: skip
    code = _emit(result, parsed)
    result.require()
    return code


def _compare(parsed: argparse.Namespace) -> int:
    from dwattn.deploy.comparison import compare

    result = compare(
        parsed.native, parsed.plugin_model, parsed.out, _build_options(parsed, "", ""),
        iterations=parsed.iterations, warmup=parsed.warmup,
    )  # fmt: skip
    return _emit(result, parsed)


def _golden(parsed: argparse.Namespace) -> int:
    from dwattn.deploy.golden_outputs import golden

    result = golden(parsed.model, parsed.out, batch=parsed.batch, size=_one_size(parsed.size))
    shapes = {name: list(value.shape) for name, value in result.outputs.items()}
    text = f"Wrote {parsed.out}: outputs {shapes}."
    return _emit({"folder": parsed.out, "outputs": shapes, "source": result.source}, parsed, text)


def _one_size(text: str | None) -> str | None:
    if text is not None:
        Range.parse(text, "--size")
    return text


def _emit(result: Any, parsed: argparse.Namespace, text: str | None = None) -> int:
    with printing():
        if parsed.json:
            print(strict_json(result.to_dict() if hasattr(result, "to_dict") else result))
        else:
            print(text if text is not None else result)
    return 0


_RUN = {
    "build": _build,
    "bench": _bench,
    "verify": _verify,
    "compare": _compare,
    "golden": _golden,
}
