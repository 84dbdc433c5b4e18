"""Parse an ONNX file with TensorRT-RTX and build an engine, in a process of its own.

``python -m support.rtx_build [--plugin LIBRARY] [--override] [--no-build] [--dynamic name=min:opt:max]
MODEL`` prints one line of JSON:

``parsed``: bool; ``errors``: the parser's; ``log``: the library's messages of warning and worse;
``layers``: ``[name, type]`` of the network in order; ``creators``: names that the plugin library added;
``engine_bytes``: size of the serialized engine, 0 where none was built.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import tensorrt_rtx_bindings as trt


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.WARNING:
            self.lines.append(message)


def profile(builder: Any, network: Any, sides: dict[str, list[int]]) -> Any:
    """Minimum, optimum and maximum of every input; open dimensions are 1, 2, 4 unless named."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        bounds = [
            [size if size >= 0 else sides.get(name, [1, 2, 4])[which]
             for name, size in zip(names, tensor.shape, strict=True)]
            for which in range(3)
        ]  # fmt: skip
        made.set_shape(tensor.name, *bounds)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--plugin")
    parser.add_argument("--override", action="store_true")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--dynamic", action="append", default=[])
    arguments = parser.parse_args()

    log = Log()
    registry = trt.get_plugin_registry()
    known = {creator.name for creator in registry.all_creators}
    if arguments.plugin and not registry.load_library(arguments.plugin):
        raise SystemExit(f"{arguments.plugin} does not load: {log.lines}")
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    onnx = trt.OnnxParser(network, log)
    if arguments.override:
        onnx.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    parsed = onnx.parse_from_file(arguments.model)
    layers = [network.get_layer(i) for i in range(network.num_layers)] if parsed else []
    engine = None
    if parsed and not arguments.no_build:
        sides = dict(entry.split("=") for entry in arguments.dynamic)
        config = builder.create_builder_config()
        config.add_optimization_profile(
            profile(builder, network, {n: [int(v) for v in s.split(":")] for n, s in sides.items()})
        )
        engine = builder.build_serialized_network(network, config)
    result = {
        "parsed": bool(parsed),
        "errors": [onnx.get_error(i).desc() for i in range(onnx.num_errors)],
        "log": log.lines,
        "layers": [[layer.name, str(layer.type).split(".")[-1]] for layer in layers],
        "creators": sorted({creator.name for creator in registry.all_creators} - known),
        "engine_bytes": 0 if engine is None else engine.nbytes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
