"""Load the plugin library into TensorRT's registry and create plugins, in a process of its own.

``python -m support.plugin_registry BINDINGS LIBRARY NODES`` with the name of the Python bindings and a JSON
list of ``[plugin, {field: value}]`` prints one line of JSON:

``version``: of TensorRT; ``creators``: ``[name, version, namespace, [field, ...]]`` that the library added;
``created``: for each node whether a plugin was made of it.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np


def fields(trt: Any, values: dict[str, int | str | float]) -> Any:
    kinds = {
        int: (trt.PluginFieldType.INT32, np.int32),
        float: (trt.PluginFieldType.FLOAT32, np.float32),
    }
    made = []
    for name, value in values.items():
        if isinstance(value, str):
            text = np.frombuffer(value.encode(), np.int8)
            made.append(trt.PluginField(name, text, trt.PluginFieldType.CHAR))
        else:
            kind, dtype = kinds[type(value)]
            made.append(trt.PluginField(name, np.array([value], dtype), kind))
    return trt.PluginFieldCollection(made)


def names(creator: Any) -> tuple[str, str, str]:
    return creator.name, creator.plugin_version, creator.plugin_namespace


def main() -> None:
    bindings, library, nodes = sys.argv[1:]
    trt = importlib.import_module(bindings)
    trt.Logger(trt.Logger.ERROR)  # the registry needs one to exist
    registry = trt.get_plugin_registry()
    before = {names(creator) for creator in registry.all_creators}
    registry.load_library(library)
    added = [creator for creator in registry.all_creators if names(creator) not in before]
    created = []
    for plugin, values in json.loads(nodes):
        creator = registry.get_creator(plugin, "1", "dwattn")
        made = creator.create_plugin("node", fields(trt, values), trt.TensorRTPhase.BUILD)
        created.append(made is not None)
    print(
        json.dumps(
            {
                "version": trt.__version__,
                "creators": [
                    [*names(creator), [field.name for field in creator.field_names]]
                    for creator in added
                ],
                "created": created,
            }
        )
    )


if __name__ == "__main__":
    main()
