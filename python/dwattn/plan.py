"""Which layers or heads to replace: a small versioned JSON file to read, edit and review."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from torch import nn

from dwattn.adapters import BackboneLayout, describe
from dwattn.errors import PlanError
from dwattn.files import parse_json, write_atomically
from dwattn.fingerprint import WEIGHT_TOLERANCE, Fingerprint, fingerprint, relative_name
from dwattn.numeric import is_whole
from dwattn.untouched import unwrap

__all__ = ["KernelInit", "LayerPlan", "ModelInfo", "Plan", "fingerprint"]

Row3 = Annotated[list[FiniteFloat], Field(min_length=3, max_length=3)]
Kernel3x3 = Annotated[list[Row3], Field(min_length=3, max_length=3)]


class KernelInit(BaseModel):
    """Mean attention of each replaced head, from which its weights can start without calibration.

    Args:
        kernel: per head, the mean attention at the 3x3 displacements ``[dr][dc]``.
        prefix: per head, the mean attention mass on each of the ``P`` prefix tokens.
        uniform: per head, the mean attention on one patch outside the 3x3 neighbourhood.
    """

    model_config = ConfigDict(extra="forbid")

    kernel: list[Kernel3x3]
    prefix: list[list[FiniteFloat]]
    uniform: list[FiniteFloat]

    @model_validator(mode="after")
    def _one_of_each_per_head(self) -> KernelInit:
        counts = (len(self.kernel), len(self.prefix), len(self.uniform))
        if len(set(counts)) != 1:
            raise ValueError(
                f"kernel, prefix and uniform cover {counts} heads; they must cover the same"
            )
        return self

    def of(self, rows: list[int]) -> KernelInit:
        """The maps of the heads at these indices, in this order."""
        return KernelInit(
            kernel=[self.kernel[row] for row in rows],
            prefix=[self.prefix[row] for row in rows],
            uniform=[self.uniform[row] for row in rows],
        )


class LayerPlan(BaseModel):
    """One attention layer.

    Args:
        name: its dotted name.
        heads: that are replaced; None for all of them.
        score: that it was chosen by.
        kernel_init: of all heads of the layer, or of ``heads`` in their order.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    heads: list[Annotated[int, Field(strict=True, ge=0)]] | None = None
    score: FiniteFloat | None = None
    kernel_init: KernelInit | None = None

    @model_validator(mode="after")
    def _heads_are_distinct(self) -> LayerPlan:
        if self.heads is not None and (not self.heads or len(set(self.heads)) != len(self.heads)):
            raise ValueError(f"heads={self.heads} of {self.name} must be distinct and at least one")
        return self


class ModelInfo(BaseModel):
    """The model a plan was made for; ``backbone`` is the dotted path of the ViT inside it."""

    model_config = ConfigDict(extra="forbid")

    family: str
    backbone: str = ""
    blocks: int
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: nn.Module | BackboneLayout) -> ModelInfo:
        """Describe ``model`` (or its layout)."""
        layout = model if isinstance(model, BackboneLayout) else describe(model)
        return cls(
            family=layout.family,
            backbone=layout.name,
            blocks=len(layout.blocks),
            fingerprint=fingerprint(layout),
        )


class Plan(BaseModel):
    """What :func:`dwattn.select` chooses and :func:`dwattn.replace` carries out."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["dwattn-plan"] = "dwattn-plan"
    schema_version: Literal[1] = 1
    criterion: str = "manual"
    layers: Annotated[list[LayerPlan], Field(min_length=1)]
    model: ModelInfo

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Plan:
        names = [layer.name for layer in self.layers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"layers are listed twice: {', '.join(repeated)}")
        return self

    @classmethod
    def for_layers(
        cls,
        model: nn.Module,
        layers: Sequence[int | str],
        heads: Sequence[Sequence[int] | None] | None = None,
        *,
        criterion: str = "manual",
    ) -> Plan:
        """A plan from a list of block indices (negative ones count from the end) or attention layer
        names.

        Args:
            heads: for each of ``layers`` the heads to replace, None for all of them.

        Raises:
            PlanError: a block that does not exist, or lists of different lengths.
        """
        layout = describe(unwrap(model))
        if heads is not None and len(heads) != len(layers):
            raise PlanError(
                f"heads lists {len(heads)} entries for {len(layers)} layers; give one per layer."
            )
        names = [_site_name(layout, layer) for layer in layers]
        chosen = [None if entry is None else list(entry) for entry in heads or [None] * len(names)]
        entries = [
            {"name": name, "heads": entry} for name, entry in zip(names, chosen, strict=True)
        ]
        return cls.validated(
            {"criterion": criterion, "model": ModelInfo.of(layout), "layers": entries},
            "The list of layers",
        )

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "The plan") -> Plan:
        """Parse and validate.

        Raises:
            PlanError: not JSON, another schema version, or fields that are wrong, each named.
        """
        try:
            data = parse_json(text)
        except UnicodeDecodeError:
            raise PlanError(
                f"{source} is not text. A plan is a JSON file, written by dwattn.select (dwattn select) from the scores."
            ) from None
        except ValueError as error:
            raise PlanError(
                f"{source} is not valid JSON: {error}. Correct it, or select again (dwattn.select, dwattn select)."
            ) from None
        if not isinstance(data, dict) or data.get("kind") != "dwattn-plan":
            raise PlanError(f"{source} is not a dwattn plan: its 'kind' must be 'dwattn-plan'.")
        if data.get("schema_version") != 1:
            raise PlanError(
                f"{source} has schema_version={data.get('schema_version')!r}, this dwattn reads "
                "version 1. Select again with dwattn.select(), or use the dwattn that wrote it."
            )
        return cls.validated(data, source)

    @classmethod
    def validated(cls, data: dict[str, Any], source: str) -> Plan:
        """A plan made of these fields.

        Raises:
            PlanError: ``source`` and the fields that are wrong.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(
                f"{source} is malformed: {problems(error)}. Correct these fields."
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: missing, unreadable or malformed, with the path and the reason; or no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise PlanError(
                f"Expected a plan or the path of one, got a {type(path).__name__}. Make a plan with "
                "dwattn.select() or Plan.for_layers(), or read one with Plan.from_json()."
            )
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise PlanError(
                f"Cannot read the plan {os.fspath(path)!r}: {error.strerror or error}."
            ) from None
        return cls.from_json(text, f"The plan {os.fspath(path)!r}")

    def to_json(self) -> str:
        """Readable JSON: one field a line, rows of numbers kept together."""
        return readable_json(self.model_dump(mode="json", exclude_none=True)) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan; the old file stays as it was if that fails.

        Raises:
            PlanError: the file cannot be written.
        """
        with write_atomically(path, PlanError) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def check_model(self, layout: BackboneLayout, *, allow_stale: bool = False) -> Fingerprint:
        """Check that the plan was made for this model; returns the model's fingerprint.

        Args:
            allow_stale: accept other weights; never another architecture.

        Raises:
            PlanError: the difference, and by how much the weights have changed.
        """
        current = fingerprint(layout)
        planned = self.model.fingerprint
        difference = planned.architecture_difference(current)
        if difference is not None:
            raise PlanError(
                f"The plan was made for another model ({self.model.family}, {self.model.blocks} "
                f"blocks) than this {layout.family}: {difference}. Score this model and select "
                "again."
            )
        change, name = planned.weight_distance(current)
        if allow_stale or change <= WEIGHT_TOLERANCE:
            return current
        raise PlanError(
            f"The plan is stale: since it was made, the attention weights of {name} changed by "
            f"about {change:.0%} (up to {WEIGHT_TOLERANCE:.0%} is accepted). Score these weights "
            "and select again, or pass allow_stale=True if the plan is meant for them too."
        )

    def relative_names(self) -> list[str]:
        """Layer names without the path of the backbone inside the model that was scored."""
        prefix = f"{self.model.backbone}." if self.model.backbone else ""
        return [layer.name.removeprefix(prefix) for layer in self.layers]


def _site_name(layout: BackboneLayout, layer: Any) -> str:
    names = [site.attention_name for site in layout.blocks]
    if not is_whole(layer) and not isinstance(layer, str):
        raise PlanError(f"Layers are block indices or names, got {layer!r}.")
    if is_whole(layer):
        index = int(layer)
        if not -len(names) <= index < len(names):
            raise PlanError(
                f"There is no block {layer}: {layout.family} has blocks 0 to {len(names) - 1}."
            )
        return names[index]
    for site in layout.blocks:
        known = (site.attention_name, site.name)
        if layer in known or layer in (relative_name(layout, name) for name in known):
            return site.attention_name
    raise PlanError(f"There is no attention layer {layer!r}; there are {', '.join(names)}.")


def problems(error: ValidationError) -> str:
    """The findings of pydantic as ``field: what is wrong (got ...)``, at most five."""
    found = []
    for item in error.errors(include_url=False)[:5]:
        where = ".".join(str(part) for part in item["loc"]) or "file"
        got = repr(item.get("input"))
        found.append(f"{where}: {item['msg']} (got {got if len(got) <= 60 else got[:57] + '...'})")
    return "; ".join(found)


def readable_json(value: Any, indent: int = 0) -> str:
    """JSON with two spaces of indent, in which lists of plain values (also nested ones) stay on one
    line.
    """
    pad, inner = "  " * indent, "  " * (indent + 1)
    if isinstance(value, dict) and value:
        items = [
            f"{inner}{json.dumps(key)}: {readable_json(v, indent + 1)}" for key, v in value.items()
        ]
        return "{\n" + ",\n".join(items) + f"\n{pad}}}"
    if isinstance(value, list) and any(_has_dict(item) for item in value):
        items = [inner + readable_json(item, indent + 1) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{pad}]"
    return json.dumps(value)


def _has_dict(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_dict, value)))
