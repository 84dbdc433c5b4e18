"""The record beside an engine: what it was made of, by which TensorRT, on which device.

An engine runs only where it was built. TensorRT notices late and says it in its own terms; with the
record the answer comes before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dwattn.deploy.cuda import Device
from dwattn.errors import DeployError
from dwattn.files import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Sidecar:
    """``<engine>.json``.

    Args:
        runtime, version: which TensorRT built the engine.
        device: ``Device.to_dict()``; None where there was no GPU (TensorRT-RTX).
        onnx: name and SHA-256 of the model, and of a file with its weights (``data_sha256``).
        plugin: path and SHA-256 of the plugin library, None without.
        precision: ``"strongly typed"`` (as the file says), ``"strongly typed, fp16"`` where the file
            computes in half precision, or ``"fp16 allowed"``.
        profile: smallest, usual and largest shape by input.
        options: what was asked for.
        engine: size in bytes and SHA-256.
        seconds: how long the build took; created: date and time in UTC.
        dwattn: version of this package.
    """

    runtime: str
    version: str
    device: dict[str, Any] | None
    onnx: dict[str, str]
    plugin: dict[str, str] | None
    precision: str
    profile: dict[str, list[list[int]]]
    options: dict[str, Any]
    engine: dict[str, Any]
    seconds: float
    created: str
    dwattn: str
    schema: int = SCHEMA

    @property
    def half(self) -> bool:
        """Whether the engine may compute in half precision, whatever its inputs and outputs are."""
        return "fp16" in self.precision

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def save(self, engine: Path) -> None:
        """Write the record of ``engine``.

        Raises:
            DeployError: the file cannot be written.
        """
        with write_atomically(record_of(engine), DeployError) as path:
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, engine: Path) -> Sidecar | None:
        """The record of ``engine``, None without one.

        Raises:
            DeployError: it is not a record of this version, or of another engine file.
        """
        path = record_of(engine)
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            if values["schema"] != SCHEMA:
                raise DeployError(
                    f"{path} has schema {values['schema']}, and this version of dwattn reads "
                    f"{SCHEMA}; build the engine again."
                )
            record = cls(**{field.name: values[field.name] for field in fields(cls)})
            digest = record.engine["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DeployError):
                raise
            raise DeployError(
                f"{path} is not the record of an engine ({error!r}); delete it or build again."
            ) from error
        if digest != sha256(engine):
            raise DeployError(
                f"{path} belongs to another engine than {engine}: the file has changed since it "
                "was built. Build it again."
            )
        return record

    def require_fits(self, engine: Path, runtime: str, version: str, device: Device | None) -> None:
        """Check that the engine can run here.

        Raises:
            DeployError: another runtime, version or compute capability.
        """
        if (self.runtime, self.version) != (runtime, version):
            raise DeployError(
                f"{engine} was built by {self.runtime} {self.version}, but this machine has "
                f"{runtime} {version}. Engines do not move between versions: build it again here."
            )
        if self.device is None or device is None:
            return
        built, here = self.device["compute_capability"], device.compute_capability
        if built != here:
            raise DeployError(
                f"{engine} was built on {self.device['name']} (compute capability {built}), and "
                f"this is {device.name} ({here}). Engines do not move between kinds of devices: "
                "build it again here."
            )


def record_of(engine: Path) -> Path:
    """Where the record of an engine is."""
    return engine.with_name(engine.name + ".json")


def model_digests(path: str | Path) -> dict[str, str]:
    """SHA-256 of a model, and of its weights where ``dwattn export`` put them into ``<model>.data``."""
    data = Path(f"{path}.data")
    return {"sha256": sha256(path)} | ({"data_sha256": sha256(data)} if data.is_file() else {})


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
