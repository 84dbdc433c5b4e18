"""Inputs and expected outputs in a folder, to check an engine against on another machine.

``golden.json``, ``inputs/<name>.npy`` and ``outputs/<name>.npy``; arrays only, never pickles.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwattn.deploy.sidecar import model_digests
from dwattn.errors import DeployError
from dwattn.files import write_atomically

SCHEMA = 1
_RECORD = "golden.json"


@dataclass(frozen=True)
class Golden:
    """Inputs, outputs, and where they are from."""

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]
    source: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write the folder; its record comes last, so that half a folder is never read.

        Raises:
            DeployError: it cannot be written.
        """
        root = Path(folder)
        try:
            for kind in ("inputs", "outputs"):
                (root / kind).mkdir(parents=True, exist_ok=True)
            (root / _RECORD).unlink(missing_ok=True)
        except OSError as error:
            raise DeployError(f"Cannot write to {root}: {error.strerror}.") from error
        for kind, arrays in (("inputs", self.inputs), ("outputs", self.outputs)):
            for name, array in arrays.items():
                with (
                    write_atomically(_file(root, kind, name), DeployError) as path,
                    path.open("wb") as file,
                ):
                    np.save(file, array, allow_pickle=False)
        record = {
            "schema": SCHEMA,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "source": self.source,
        }
        with write_atomically(root / _RECORD, DeployError) as path:
            path.write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Golden:
        """Read a folder.

        Raises:
            DeployError: it is missing, incomplete or of another version.
        """
        root = Path(folder)
        try:
            record = json.loads((root / _RECORD).read_text())
            if record["schema"] != SCHEMA:
                raise DeployError(
                    f"{root} has schema {record['schema']}, and this version reads {SCHEMA}; write "
                    "it again with dwattn golden."
                )
            arrays = {
                kind: {
                    str(name): np.load(_file(root, kind, name), allow_pickle=False)
                    for name in record[kind]
                }
                for kind in ("inputs", "outputs")
            }
            return cls(arrays["inputs"], arrays["outputs"], dict(record["source"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            if isinstance(error, DeployError):
                raise
            raise DeployError(
                f"{root} is not a complete folder of golden outputs ({error}); write one with "
                "dwattn golden m.onnx."
            ) from error


def golden(
    onnx: str | Path,
    folder: str | Path,
    *,
    batch: int | None = None,
    size: str | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
) -> Golden:
    """Compute a model's outputs on onnxruntime and write them with the inputs.

    Args:
        onnx: a model with native or function lowering, best in fp32.
        folder: to write.
        batch, size: of random inputs, where the model leaves them open.
        inputs: real inputs by name instead.

    Raises:
        DeployError: onnxruntime is missing or refuses the model; outputs that are not finite, or no arrays of numbers.
    """
    from dwattn.deploy.provider import OnnxRunner

    runner = OnnxRunner(onnx, batch=batch, size=size, inputs=inputs)
    outputs = runner.run()
    odd = [name for name, value in outputs.items() if not _is_numbers(value)]
    if odd:
        raise DeployError(
            f"Output {', '.join(odd)} of {onnx} is not an array of numbers, and only those can be verified: take it out of "
            "the model's outputs."
        )
    broken = [name for name, value in outputs.items() if not np.isfinite(value).all()]
    if broken:
        raise DeployError(
            f"Output {', '.join(broken)} of {onnx} has NaN or infinite values on onnxruntime; "
            "nothing can be verified against it. A half-precision model may overflow: use fp32."
        )
    result = Golden(
        runner.inputs,
        outputs,
        {"onnx": Path(onnx).name, **model_digests(onnx), "onnxruntime": runner.version},
    )
    result.save(folder)
    return result


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _file(root: Path, kind: str, name: str) -> Path:
    # Names of tensors may hold slashes.
    return root / kind / (urllib.parse.quote(str(name), safe="") + ".npy")
