"""The forms in which the layers of this package can be exported, and which layers each has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dwattn.errors import ExportError
from dwattn.export import images, native, node
from dwattn.export.target import Target, lower_layers, replaced_layers


@dataclass(frozen=True)
class Form:
    """One value of ``lowering``.

    Args:
        name: that value.
        opsets: that can be written; the first is the default.
        refusal: why a replaced layer cannot be written, or None.
        nodes: replaced layers become single nodes; bodies: which the file defines as ONNX functions.
        static: batch and size are numbers, and the operators those of a static graph.
    """

    name: str
    opsets: range
    refusal: Callable[[nn.Module], str | None]
    nodes: bool = False
    bodies: bool = False
    static: bool = False

    def check(self, model: nn.Module) -> None:
        """Refuse a model that has layers without this form.

        Raises:
            ExportError: names the layers and the remedy.
        """
        refused: dict[str, list[str]] = {}
        for name, layer in replaced_layers(model).items():
            reason = self.refusal(layer)
            if reason is not None:
                shown = name.removesuffix(".layer") or type(layer).__name__
                refused.setdefault(reason, []).append(shown)
        if refused:
            listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in refused.items())
            raise ExportError(f"lowering={self.name!r} does not cover every layer: {listed}.")

    def lower(self, target: Target) -> int:
        """Swap the replaced layers of a checked target; how many there were.

        Raises:
            ExportError: a dynamic grid in a model that has no convolution to read it from.
        """
        with torch.no_grad():
            return len(lower_layers(target, self._lowering(target)))

    def _lowering(self, target: Target) -> Callable[[nn.Module], nn.Module]:
        if self.nodes:
            grid = _patch_map(target) if target.dynamic else target.grid
            return lambda layer: node.LayerNode(layer, grid)
        if self.static:
            return lambda layer: images.ImageLayer(layer, target.grid)
        return lambda layer: native.lower(layer, None if target.dynamic else target.grid)


def _patch_map(target: Target) -> node.PatchMap:
    convolution = None if target.layout is None else target.layout.patch_convolution
    if convolution is None:
        raise ExportError(
            "With dynamic_size a layer's node reads the patch grid from the patch embedding's "
            "convolution, and this model has none; export one file for each size."
        )
    return node.PatchMap(convolution)


#: Opset 18 is read by everything of interest (TensorRT 8.6 and later, onnxruntime 1.14 and later), and
#: is the one the exporter writes without a conversion afterwards.
DEFAULT_OPSET = 18
_OPSETS = range(DEFAULT_OPSET, 22)
FORMS = {
    form.name: form
    for form in (
        Form("native", _OPSETS, lambda layer: None),
        Form("function", _OPSETS, node.refusal, nodes=True, bodies=True),
        Form("plugin", _OPSETS, node.refusal, nodes=True),
        Form("conv2d", range(17, 19), images.refusal, static=True),
    )
}
