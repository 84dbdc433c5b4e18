"""The options of a build, checked before any work starts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dwattn.errors import DeployError
from dwattn.files import require_apart

#: Names of the runtimes and of the Python packages that hold them.
RUNTIMES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
#: Where the plugin library is when ``--plugin`` does not say so.
PLUGIN_VARIABLE = "DWATTN_TRT_PLUGIN"
#: Where a build of the whole package puts it.
PACKAGED_PLUGIN = Path(__file__).parents[1] / "libdwattn_trt.so"
#: The end of both names of plugin nodes.
PLUGIN_NODE = "DWAttention"


@dataclass(frozen=True)
class Range:
    """Smallest, most frequent and largest size of a dynamic dimension pair; a batch is ``(n,)``."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, option: str) -> Range:
        """``8``, ``1:8:16``, ``224``, ``224x336`` or ``224x224:336x336:518x518``.

        Raises:
            DeployError: anything else, zeros, or sizes that do not grow.
        """
        parts = text.strip().split(":")
        if len(parts) not in (1, 3) or not all(re.fullmatch(r"\d+(x\d+)?", p) for p in parts):
            raise DeployError(
                f"{option} {text} is neither one size such as 8 (or 224x336 for height x width) "
                "nor three of them, smallest:usual:largest, such as 1:8:16."
            )
        sizes = [tuple(int(number) for number in part.split("x")) for part in parts]
        if any(len(size) == 2 for size in sizes):  # 224 beside 224x336 is 224x224
            sizes = [size * 2 if len(size) == 1 else size for size in sizes]
        if len(sizes) == 1:
            sizes *= 3
        return cls(*sizes).checked(option)

    def checked(self, option: str) -> Range:
        """Itself.

        Raises:
            DeployError: zeros, or sizes that do not grow.
        """
        numbers = list(zip(self.smallest, self.usual, self.largest, strict=True))
        if any(not 1 <= low <= middle <= high for low, middle, high in numbers):
            raise DeployError(
                f"{option} {self} must have sizes of at least 1 that do not shrink from the "
                "smallest to the largest."
            )
        return self

    def pair(self) -> Range:
        """As height x width: a single number stands for both."""
        wide = (s * 2 if len(s) == 1 else s for s in (self.smallest, self.usual, self.largest))
        return Range(*wide)

    @property
    def values(self) -> set[tuple[int, ...]]:
        """The different ones among the three."""
        return {self.smallest, self.usual, self.largest}

    def __str__(self) -> str:
        texts = ["x".join(map(str, s)) for s in (self.smallest, self.usual, self.largest)]
        return texts[0] if len(set(texts)) == 1 else ":".join(texts)


@dataclass(frozen=True)
class BuildOptions:
    """One build.

    Args:
        onnx: the model.
        engine: the file to write; a record of how it was made goes to ``<engine>.json``.
        runtime: ``"tensorrt"``, or ``"tensorrt-rtx"``, whose engines are built without a GPU.
        fp16: let TensorRT 10 choose half precision for an fp32 model. TensorRT 11 and TensorRT-RTX
            have no such flag: export the model in fp16.
        plugin: plugin library; default the variable ``DWATTN_TRT_PLUGIN``, then the one in the
            package, where it was built and the model has nodes for it.
        timing_cache: file of measured kernel times, read if it is there and written afterwards.
        workspace: most MiB of scratch memory that a layer may take; default TensorRT's (all).
        batch: range of a dynamic batch; default 1.
        size: range of a dynamic image size in pixels, height x width.
        detailed: keep the layers' details in the engine, for ``dwattn compare``.
        verbose: print everything that TensorRT says.
    """

    onnx: str
    engine: str
    runtime: str = "tensorrt"
    fp16: bool = False
    plugin: str | None = None
    timing_cache: str | None = None
    workspace: int | None = None
    batch: str | None = None
    size: str | None = None
    detailed: bool = False
    verbose: bool = False

    def checked(self) -> BuildOptions:
        """The options with the plugin of the environment, or of the package, filled in.

        Raises:
            DeployError: an unknown runtime, a missing file or folder, a file to write that is also read, a number out
                of range.
        """
        if self.runtime not in RUNTIMES:
            raise DeployError(
                f"There is no runtime {self.runtime!r}; choose one of {', '.join(RUNTIMES)}."
            )
        require_file(self.onnx, "model", "Write one with dwattn export.")
        for file in filter(None, (self.engine, self.timing_cache)):
            if not Path(file).absolute().parent.is_dir():
                raise DeployError(f"The folder of {file} does not exist; make it first.")
            if Path(file).is_dir():
                raise DeployError(f"{file} is a folder; give the name of a file in it.")
        if self.workspace is not None and self.workspace < 1:
            raise DeployError(f"--workspace {self.workspace} must be at least 1 MiB.")
        if self.batch is not None and len(Range.parse(self.batch, "--batch").usual) != 1:
            raise DeployError(f"--batch {self.batch} counts images; write 8 or 1:8:16.")
        if self.size is not None:
            Range.parse(self.size, "--size")
        plugin = plugin_path(self.plugin)
        # Only where it is needed: the engine then needs it too.
        if (
            plugin is None
            and PACKAGED_PLUGIN.is_file()
            and PLUGIN_NODE.encode() in Path(self.onnx).read_bytes()
        ):
            plugin = str(PACKAGED_PLUGIN)
        read = [self.onnx, f"{self.onnx}.data", plugin]
        for file in (self.engine, f"{self.engine}.json"):
            require_apart(file, DeployError, [*read, self.timing_cache])
        if self.timing_cache is not None:
            require_apart(self.timing_cache, DeployError, read)
        return replace(self, plugin=plugin)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BuildOptions:
        """The inverse of ``dataclasses.asdict``."""
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})


def require_file(path: str | os.PathLike[str], what: str, remedy: str) -> Path:
    """The path.

    Raises:
        DeployError: there is no such file.
    """
    if not Path(path).is_file():
        raise DeployError(f"There is no {what} {os.fspath(path)}. {remedy}")
    return Path(path)


def plugin_path(given: str | None) -> str | None:
    """The plugin library that was named, by option or variable, as an absolute path.

    Raises:
        DeployError: it does not exist.
    """
    name = given or os.environ.get(PLUGIN_VARIABLE)
    if not name:
        return None
    remedy = "Build it (docs/jetson.md), and name it with --plugin or in " + PLUGIN_VARIABLE + "."
    return str(require_file(name, "plugin library", remedy).absolute())
