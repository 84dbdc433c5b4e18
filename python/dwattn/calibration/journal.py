"""What a calibration did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dwattn.calibration.ridge import Correction


@dataclass(frozen=True)
class LayerNote:
    """One corrected or fitted layer.

    Args:
        name: dotted name; kind: ``stencil``, ``output``, ``attention output`` or ``mlp output``.
        residual: share of the target's energy that the fit leaves; for corrections on held-out images.
        strength: ridge strength chosen on held-out images, None for stencils.
        rank: inner width of ``lowrank_dw``.
    """

    name: str
    kind: str
    residual: float
    strength: float | None = None
    rank: int | None = None


@dataclass
class CalibrationResult:
    """Parameters outside the replaced layers that calibration changed, and its diagnostics.

    Args:
        updates: new values by dotted parameter name, in the parameters' own dtype and device.
        notes: one entry per fitted layer, in depth order.
        drift: share by which the converted model's patch tokens differ from the original's after each block,
            on held-out images: ``|t' - t|^2 / |t - mean(t)|^2``.
        photos: calibration images, without the further views of each; seconds: wall time.
    """

    updates: dict[str, Tensor] = field(default_factory=dict)
    notes: list[LayerNote] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)
    photos: int = 0
    seconds: float = 0.0

    def record(self, name: str, kind: str, correction: Correction) -> None:
        """Note a ridge correction."""
        self.notes.append(LayerNote(name, kind, correction.held_out, correction.strength))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able diagnostics without the tensors; None for infinite values (the strength where no correction helped)."""
        return {
            "photos": self.photos,
            "seconds": round(self.seconds, 1),
            "drift": {name: round(value, 6) for name, value in self.drift.items()},
            "layers": [
                {key: _finite(value) for key, value in vars(note).items() if value is not None}
                for note in self.notes
            ],
            "updated_parameters": sorted(self.updates),
        }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
