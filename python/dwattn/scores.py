"""The result of scoring: numbers per block and head, saved as safetensors with JSON metadata."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table
from torch import Tensor

from dwattn.errors import ScoreError
from dwattn.files import parse_json, write_tensors
from dwattn.plan import ModelInfo, problems
from dwattn.printed import Printed

if TYPE_CHECKING:
    from collections.abc import Mapping

_TENSORS = (
    "sigma",
    "mean_kernel",
    "prefix_mass",
    "uniform",
    "residual",
    "residual_plain",
    "perturbation",
)
_STORED = (*_TENSORS, "mean_map", "std_map")
_OPTIONAL = ("residual", "residual_plain", "perturbation", "mean_map", "std_map")


@dataclass(repr=False)
class LayerScore:
    """Statistics of one attention layer over the scored images, fp64 on the CPU.

    Args:
        name: dotted name of the attention layer; block: its index in depth order.
        sigma: ``(n_h,)``, Sigma_h of Eq. 16.
        mean_kernel: ``(n_h, 3, 3)``, mean of E at the 3x3 displacements ``[dr][dc]``.
        prefix_mass: ``(n_h, P)``, mean attention of a patch to each prefix token.
        uniform: ``(n_h,)``, mean of E between patches outside the 3x3 window.
        residual: ``(n_h,)`` or None: share of the head's output that the best static replacement
            leaves unexplained, channels weighted by the squared column norms of Wo; block_residual
            of the layer.
        residual_plain, block_residual_plain: the same with equal weights.
        perturbation: ``(n_h,)`` or None: what that unexplained part does to the residual stream,
            the mean square it adds to a token that is scaled to unit variance (as the next
            LayerNorm scales it).
        mean_map, std_map: ``(n_h, n, n)`` fp32 if the maps were kept.
    """

    name: str
    block: int
    sigma: Tensor
    mean_kernel: Tensor
    prefix_mass: Tensor
    uniform: Tensor
    residual: Tensor | None = None
    residual_plain: Tensor | None = None
    perturbation: Tensor | None = None
    block_residual: float | None = None
    block_residual_plain: float | None = None
    mean_map: Tensor | None = None
    std_map: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """``n_h``."""
        return len(self.sigma)

    @property
    def sigma_block(self) -> float:
        """``Sigma_b``: mean of Sigma_h over the heads."""
        return float(self.sigma.mean())

    def __repr__(self) -> str:
        residual = "" if self.block_residual is None else f", residual {self.block_residual:.4g}"
        return f"<LayerScore {self.name}: Sigma_b {self.sigma_block:.4g}{residual}>"


@dataclass(repr=False)
class Scores(Printed):
    """What :func:`dwattn.score` measured; ``print()`` shows the table.

    Args:
        layers: the scored layers in depth order; ``refused`` names the others with the reason.
        num_images: images scored, over all processes.
        entries: ``patches`` or ``all``, see :class:`dwattn.variance.AttentionVariance`.
        grid: patch grid ``(H, W)`` of the images; num_prefix: ``P``.
        model: the model's description and fingerprint.
    """

    layers: list[LayerScore]
    num_images: int
    entries: str
    grid: tuple[int, int]
    num_prefix: int
    model: ModelInfo
    refused: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.grid))
        return f"<Scores of {self.model.family}: {len(self.layers)} layers, {self.num_images} images, grid {size}>"

    @property
    def sigma_blocks(self) -> list[float]:
        """``Sigma_b`` of the scored layers, in depth order."""
        return [layer.sigma_block for layer in self.layers]

    @property
    def residual_blocks(self) -> list[float | None]:
        """Block residuals of the scored layers, in depth order."""
        return [layer.block_residual for layer in self.layers]

    def order(self, criterion: str = "variance") -> list[int]:
        """Block indices in the order in which to replace them, lowest score first; equal scores in depth order.

        Raises:
            ScoreError: an unknown criterion, or scores that are missing or NaN.
        """
        return [
            layer.block
            for layer in sorted(self.layers, key=lambda x: (block_score(x, criterion), x.block))
        ]

    def table(self) -> Table:
        """Per block: Sigma_b, residual, mean attention to itself, its 3x3 window and the prefix
        tokens.
        """
        table = Table(
            title=f"{self.model.family}, {self.num_images} images, {self.entries} entries"
        )
        for heading in ("block", "layer", "Sigma_b", "residual", "self", "3x3", "prefix"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for layer in self.layers:
            kernel = layer.mean_kernel.mean(0)
            residual = "-" if layer.block_residual is None else f"{layer.block_residual:.3f}"
            shares = (kernel[1, 1], kernel.sum(), layer.prefix_mass.mean(0).sum())
            table.add_row(
                str(layer.block),
                layer.name,
                f"{layer.sigma_block:.4g}",
                residual,
                *(f"{float(s):.3f}" for s in shares),
            )
        for name, reason in self.refused.items():
            table.add_row("-", name, "refused", "", "", "", reason)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: everything but full maps and fingerprint."""
        return {
            "num_images": self.num_images,
            "entries": self.entries,
            "grid": list(self.grid),
            "num_prefix": self.num_prefix,
            "family": self.model.family,
            "refused": dict(self.refused),
            "layers": [
                {
                    "name": layer.name,
                    "block": layer.block,
                    "sigma_block": layer.sigma_block,
                    "block_residual": layer.block_residual,
                    **{
                        key: None if getattr(layer, key) is None else getattr(layer, key).tolist()
                        for key in _TENSORS
                    },
                }
                for layer in self.layers
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with the JSON description in its metadata, by temporary name
        and rename.

        Raises:
            ScoreError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            for key in _STORED:
                tensor = getattr(layer, key)
                if tensor is not None:
                    tensors[f"layers.{index}.{key}"] = tensor.contiguous()
        header = _Header(
            num_images=self.num_images,
            entries=self.entries,  # type: ignore[arg-type]
            grid=self.grid,
            num_prefix=self.num_prefix,
            model=self.model,
            refused=self.refused,
            layers=[
                _HeaderLayer(
                    name=x.name,
                    block=x.block,
                    block_residual=x.block_residual,
                    block_residual_plain=x.block_residual_plain,
                )
                for x in self.layers
            ],
        )
        write_tensors(path, tensors, ScoreError, {"dwattn": header.model_dump_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read and validate a file of :meth:`save`.

        Raises:
            ScoreError: a file that is missing, truncated, of another kind or version, or
                inconsistent.
        """
        header, tensors = _read(Path(path))
        layers = [
            _layer(entry, i, header, tensors, str(path)) for i, entry in enumerate(header.layers)
        ]
        return cls(
            layers=layers,
            num_images=header.num_images,
            entries=header.entries,
            grid=header.grid,
            num_prefix=header.num_prefix,
            model=header.model,
            refused=dict(header.refused),
        )


def block_score(layer: LayerScore, criterion: str) -> float:
    """The number by which blocks are ranked, smallest first.

    Raises:
        ScoreError: an unknown criterion, or a score that is missing or NaN.
    """
    values = {
        "variance": layer.sigma_block,
        "residual": layer.block_residual,
        "perturbation": None if layer.perturbation is None else float(layer.perturbation.sum()),
    }
    return _known(values[check_criterion(criterion)], layer, criterion)


def head_scores(layer: LayerScore, criterion: str) -> list[float]:
    """The numbers by which the heads of a layer are ranked, smallest first; raises as
    :func:`block_score`.
    """
    values = {
        "variance": layer.sigma,
        "residual": layer.residual,
        "perturbation": layer.perturbation,
    }[check_criterion(criterion)]
    if values is None:
        return [_known(None, layer, criterion)]
    return [_known(value, layer, criterion) for value in values.tolist()]


CRITERIA = ("variance", "residual", "perturbation")


def check_criterion(criterion: str) -> str:
    """Return ``criterion``, or raise :class:`ScoreError` unless it is one of ``CRITERIA``."""
    if criterion not in CRITERIA:
        raise ScoreError(
            f"criterion={criterion!r} must be {', '.join(map(repr, CRITERIA[:-1]))} or "
            f"{CRITERIA[-1]!r}, or pass order=[...]."
        )
    return criterion


def _known(value: float | None, layer: LayerScore, criterion: str) -> float:
    if value is None:
        raise ScoreError(
            f"{layer.name} has no {criterion} score: the model was scored with residual=False "
            "(--no-residual). Score it again, or select with criterion='variance' (--criterion variance)."
        )
    if value != value or value in (float("inf"), float("-inf")):
        raise ScoreError(
            f"The {criterion} score of {layer.name} is {value}; score the model again on finite "
            "data."
        )
    return value


class _HeaderLayer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    block: Annotated[int, Field(ge=0)]
    block_residual: float | None = None
    block_residual_plain: float | None = None


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["dwattn-scores"] = "dwattn-scores"
    schema_version: Literal[1] = 1
    num_images: Annotated[int, Field(ge=2)]
    entries: Literal["patches", "all"]
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    num_prefix: Annotated[int, Field(ge=0)]
    model: ModelInfo
    refused: dict[str, str]
    layers: Annotated[list[_HeaderLayer], Field(min_length=1)]


def _read(path: Path) -> tuple[_Header, Mapping[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # safetensors takes a file that may not be read for a missing one
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("dwattn")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ScoreError(
            f"There is no scores file {str(path)!r}; write one with Scores.save() (dwattn score)."
        ) from None
    except (OSError, SafetensorError) as error:
        raise ScoreError(
            f"{str(path)!r} is not a readable safetensors file ({error}); score the model again."
        ) from None
    try:
        data = parse_json(text or "")
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("kind") != "dwattn-scores":
        raise ScoreError(
            f"{str(path)!r} holds no dwattn scores; write them with Scores.save() (dwattn score)."
        )
    if data.get("schema_version") != 1:
        raise ScoreError(
            f"{str(path)!r} has schema_version={data.get('schema_version')!r}, this dwattn reads "
            "version 1. Score the model again, or use the dwattn that wrote it."
        )
    try:
        return _Header.model_validate(data), tensors
    except ValidationError as error:
        raise ScoreError(
            f"The scores {str(path)!r} are malformed: {problems(error)}. Score the model again."
        ) from None


def _layer(
    entry: _HeaderLayer, index: int, header: _Header, tensors: Mapping[str, Tensor], path: str
) -> LayerScore:
    found = {key: tensors.get(f"layers.{index}.{key}") for key in _STORED}
    sigma = found["sigma"]
    heads = 0 if sigma is None or sigma.dim() != 1 else len(sigma)
    map_size = header.grid[0] * header.grid[1] + (
        header.num_prefix if header.entries == "all" else 0
    )
    shapes: dict[str, tuple[int, ...]] = {
        "sigma": (heads,),
        "mean_kernel": (heads, 3, 3),
        "prefix_mass": (heads, header.num_prefix),
        "uniform": (heads,),
        "residual": (heads,),
        "residual_plain": (heads,),
        "perturbation": (heads,),
        "mean_map": (heads, map_size, map_size),
        "std_map": (heads, map_size, map_size),
    }
    for key, shape in shapes.items():
        tensor = found[key]
        if (
            (tensor is None and key not in _OPTIONAL)
            or (tensor is not None and tuple(tensor.shape) != shape)
            or not heads
        ):
            got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ScoreError(
                f"The scores {path!r} are malformed: {key} of {entry.name} is {got}, expected "
                f"{shape}."
            )
        if tensor is not None and not tensor.is_floating_point():
            raise ScoreError(
                f"The scores {path!r} are malformed: {key} of {entry.name} holds {tensor.dtype} "
                "instead of floating-point numbers."
            )
    return LayerScore(
        name=entry.name,
        block=entry.block,
        block_residual=entry.block_residual,
        block_residual_plain=entry.block_residual_plain,
        **found,  # type: ignore[arg-type]
    )


def map_statistics(mean: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Mean of a map at the 3x3 displacements and outside of them.

    Args:
        mean: ``(n_h, H*W, H*W)``, mean attention between patches.

    Returns:
        ``(n_h, 3, 3)``: average over the positions where the neighbour exists (0 where none does),
        and ``(n_h,)``: average over all other entries (0 if there are none).
    """
    heads = mean.shape[0]
    index = torch.arange(height * width, device=mean.device).view(height, width)
    kernel = mean.new_zeros(heads, 3, 3)
    inside, count = mean.new_zeros(heads), 0
    for r in range(3):
        for s in range(3):
            dr, ds = r - 1, s - 1
            query = index[
                max(0, -dr) : height - max(0, dr), max(0, -ds) : width - max(0, ds)
            ].flatten()
            if len(query):
                total = mean[:, query, query + dr * width + ds].sum(1)
                kernel[:, r, s] = total / len(query)
                inside += total
                count += len(query)
    rest = mean.shape[1] ** 2 - count
    uniform = (mean.sum((1, 2)) - inside) / rest if rest else torch.zeros_like(inside)
    return kernel, uniform
