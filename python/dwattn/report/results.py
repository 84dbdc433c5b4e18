"""What a run of the demo found, as a versioned JSON file that the report is written from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwattn.errors import DataError
from dwattn.files import write_atomically


class Record(BaseModel):
    """Base: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class ModelInfo(Record):
    """The model that was converted."""

    description: str
    family: str
    num_blocks: int
    num_heads: int
    dim: int
    tokens: int
    num_prefix: int
    grid: tuple[int, int]
    image_size: int
    parameters: int


class PhotoInfo(Record):
    """The photos: how many on each side of the split and from which packages.

    Args:
        calibration, held_out: photos.
        views: calibration images made of them by cropping (equal to ``calibration`` without crops).
        packages: photos by package, both sides together.
        with_mask: held-out photos with a cut-out whose alpha mask is known.
    """

    calibration: int
    held_out: int
    views: int
    packages: dict[str, int]
    with_mask: int


class BlockScore(Record):
    """Scores of one block; ``sigma`` and ``mean_kernel`` by head."""

    index: int
    name: str
    sigma: float
    residual: float | None
    perturbation: float | None = None
    head_sigma: list[float]
    mean_kernel: list[list[list[float]]]


class FidelityInfo(Record):
    """See :class:`dwattn.fidelity.Fidelity`.

    Args:
        mask_iou: against the alpha masks of the pasted cut-outs, where there are any.
        object_cosine, object_iou: ``cosine`` and ``iou`` on the photos with a cut-out alone. They
            show one object with a known outline; other photos may show none that stands out, and
            the overlap of two nearly empty maps says little.
    """

    cosine: float
    prefix_cosine: float | None
    iou: float
    mae: float
    empty: int
    images: int
    mask_iou: float | None = None
    object_cosine: float | None = None
    object_iou: float | None = None


class ConversionInfo(Record):
    """One converted model and what it kept.

    Args:
        key: unique, for example ``residual-6-dw``.
        method: ``calibrated``, or the initialisation that was left as it is: ``gaussian``,
            ``mean-map``.
        seconds: replacing and calibrating.
    """

    key: str
    label: str
    variant: str
    rank: int | None
    criterion: str
    blocks: list[int]
    method: str
    fidelity: FidelityInfo
    seconds: float


class Latency(Record):
    """One bar: milliseconds per image."""

    key: str
    label: str
    median_ms: float
    p20_ms: float
    p80_ms: float


class LatencyInfo(Record):
    """Interleaved medians of several models on one machine."""

    what: str
    batch: int
    threads: int
    rounds: int
    entries: list[Latency]

    def median(self, key: str) -> float | None:
        """Milliseconds of the bar ``key``."""
        return next((entry.median_ms for entry in self.entries if entry.key == key), None)


class LayerRow(Record):
    """One attention layer in the table of what was replaced, kept or refused."""

    layer: str
    outcome: Literal["replaced", "kept", "refused"]
    detail: str


class ExportInfo(Record):
    """The exported ONNX file and its parity with PyTorch on onnxruntime."""

    file: str
    bytes: int
    opset: int
    max_difference: float
    images: int


class PictureCell(Record):
    """One picture of a row; ``file`` is relative to the results file."""

    label: str
    file: str
    iou: float | None = None


class PictureRow(Record):
    """One held-out photo and its maps."""

    photo: str
    cells: list[PictureCell]


class Step(Record):
    """One step of the run and its wall time."""

    name: str
    seconds: float


class Results(Record):
    """Everything the report shows. Parts that a run left out are empty or None."""

    kind: Literal["dwattn-demo-results"] = "dwattn-demo-results"
    schema_version: Literal[1] = 1
    created: str
    command: str
    seed: int
    quick: bool
    seconds: float
    environment: dict[str, str]
    model: ModelInfo
    photos: PhotoInfo
    scores: list[BlockScore]
    selected: dict[str, list[int]]
    headline: str | None = None
    conversions: list[ConversionInfo] = Field(default_factory=list)
    original_mask_iou: float | None = None
    latency: list[LatencyInfo] = Field(default_factory=list)
    layers: list[LayerRow] = Field(default_factory=list)
    export: ExportInfo | None = None
    pictures: list[PictureRow] = Field(default_factory=list)
    steps: list[Step] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def conversion(self, key: str | None) -> ConversionInfo | None:
        """The conversion ``key``, or None."""
        return next((item for item in self.conversions if item.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return self.model_dump(mode="json")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON file; it appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, DataError) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a results file.

        Raises:
            DataError: the file is missing, is no results file, or is of another version.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Cannot read the results file {path} ({error}).") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(
                f"{path} is not a results file of this version of dwattn: {_first(error)}. Write one with: dwattn "
                "demo --out FOLDER"
            ) from error


def _first(error: ValidationError) -> str:
    details: Any = error.errors()[0]
    where = ".".join(str(part) for part in details["loc"]) or "the file"
    return f"{where}: {details['msg']}"
