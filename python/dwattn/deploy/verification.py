"""Does an engine compute what the model computes?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwattn.deploy.golden_outputs import Golden
from dwattn.deploy.session import open_engine
from dwattn.deploy.sidecar import Sidecar
from dwattn.deploy.table import table
from dwattn.errors import DeployError

#: Bounds on ``max|difference| / max|golden|``: products of fp32 engines are TF32 by default.
TOLERANCE = {"float32": 5e-3, "float16": 2e-2}


@dataclass(frozen=True)
class Difference:
    """One output against its golden values; ``max_rel`` is ``max_abs`` over the largest of them."""

    output: str
    max_abs: float
    max_rel: float
    rms_rel: float
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class VerifyResult:
    """All outputs, and whether they are within ``tolerance``."""

    differences: tuple[Difference, ...]
    tolerance: float
    source: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(d.max_rel <= self.tolerance for d in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ok": self.ok}

    def require(self) -> VerifyResult:
        """This result, if it is within the tolerance.

        Raises:
            DeployError: an output is not within the tolerance.
        """
        if self.ok:
            return self
        worst = max(self.differences, key=lambda d: d.max_rel)
        raise DeployError(
            f"The engine does not agree with its golden outputs: {worst.output} differs by "
            f"{worst.max_abs:.3g} (relative {worst.max_rel:.3g}, tolerance {self.tolerance:.3g}; "
            f"cosine {worst.cosine:.6f}). Half precision may overflow or lose too many bits here: "
            "build in fp32, or accept it with --tolerance."
        )

    def __str__(self) -> str:
        rows = [
            (
                d.output,
                f"{d.max_abs:.3g}",
                f"{d.max_rel:.3g}",
                f"{d.rms_rel:.3g}",
                f"{d.cosine:.6f}",
            )
            for d in self.differences
        ]
        text = table(("output", "max abs", "max rel", "rms rel", "cosine"), rows)
        return (
            f"{text}\n{'Agrees' if self.ok else 'Does not agree'} (tolerance {self.tolerance:g})."
        )


def verify(
    engine: str | Path,
    folder: str | Path,
    *,
    tolerance: float | None = None,
    plugin: str | None = None,
    verbose: bool = False,
) -> VerifyResult:
    """Run an engine on saved inputs and compare.

    Args:
        folder: written by :func:`dwattn.deploy.golden`.
        tolerance: on the relative error; default :data:`TOLERANCE` of the coarsest output, or of fp16
            where the engine's record says that it may compute in that.

    Raises:
        DeployError: the engine or the folder cannot be used, or their inputs and outputs differ in
            name or shape. A disagreement in values is in the result; see ``require()``.
    """
    expected = Golden.load(folder)
    shapes = {name: value.shape for name, value in expected.inputs.items()}
    opened, record, _ = open_engine(engine, plugin=plugin, shapes=shapes, verbose=verbose)
    with opened as session:
        found = session.run(expected.inputs)
    return VerifyResult(
        tuple(differences(found, expected.outputs)),
        tolerance if tolerance is not None else default_tolerance(found, record),
        expected.source,
    )


def default_tolerance(outputs: Mapping[str, NDArray[Any]], *records: Sidecar | None) -> float:
    """For the coarsest dtype among the outputs and what the engines of these records compute in."""
    dtypes = {str(value.dtype) for value in outputs.values()}
    if any(record is not None and record.half for record in records):
        dtypes.add("float16")
    return max(TOLERANCE.get(dtype, TOLERANCE["float32"]) for dtype in dtypes)


def differences(
    found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]
) -> list[Difference]:
    """Compare outputs by name, in fp64.

    Raises:
        DeployError: other names or shapes.
    """
    if set(found) != set(expected):
        raise DeployError(
            f"The engine returns {', '.join(found)}, but the golden outputs are "
            f"{', '.join(expected)}: they belong to another model."
        )
    return [_difference(name, found[name], expected[name]) for name in expected]


def _difference(name: str, found: NDArray[Any], expected: NDArray[Any]) -> Difference:
    if found.shape != expected.shape:
        raise DeployError(
            f"{name} has shape {list(found.shape)} in the engine and {list(expected.shape)} in "
            "the golden outputs: they are of another model or size."
        )
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Difference(name, float("inf"), float("inf"), float("inf"), 0.0)
    scale = max(float(np.abs(b).max(initial=0.0)), 1e-30)
    norm = max(float(np.linalg.norm(b)), 1e-30)
    worst = float(np.abs(a - b).max(initial=0.0))
    return Difference(
        output=name,
        max_abs=worst,
        max_rel=worst / scale,
        rms_rel=float(np.linalg.norm(a - b)) / norm,
        cosine=float(a @ b) / max(float(np.linalg.norm(a)) * norm, 1e-30),
    )
