"""What every command shares: errors as sentences with exit codes, JSON on stdout, everything else
on stderr.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from dwattn.errors import DataError, DwattnError
from dwattn.files import printing, stopped_in_order, strict_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dwattn.image_files import ImageFolder
    from dwattn.models import Preprocessing

P = ParamSpec("P")
R = TypeVar("R")

#: Columns of tables that go to no terminal.
PIPED_WIDTH = 160
#: Folders of fewer images are checked without a progress bar; larger ones than the second number are not checked.
FEW_FILES, MOST_CHECKED = 200, 20_000
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

# Built at each call, so that they follow a redirected sys.stdout and sys.stderr.


def out() -> Console:
    """Results; in a pipe or file, where no terminal has a width, tables are not cut."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def err() -> Console:
    """Progress, notes and errors."""
    return Console(stderr=True)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the package's errors into one sentence and exit code 1, Ctrl-C into 130 and SIGTERM into
    143, both after temporary files are removed; bugs keep their traceback.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with stopped_in_order(), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return function(*args, **kwargs)
        except DwattnError as error:
            text = _escape(str(error))
            err().print(f"[bold red]Error:[/] {text}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as interrupt:
            err().print("Interrupted; no file was left half-written.", highlight=False)
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt

    return guarded


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show a warning as a note, except those that libraries address to programmers."""
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        note(f"Note: {message}")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def emit(result: Any, as_json: bool) -> None:
    """Print a result: its table, or with ``--json`` its ``to_dict()`` alone, null for numbers that are not finite."""
    with printing():
        if as_json:
            plain = result.to_dict() if hasattr(result, "to_dict") else result
            print(strict_json(plain, _plain))
        elif isinstance(result, str):
            out().print(result, markup=False, highlight=False, soft_wrap=True)
        else:
            out().print(result)


def _plain(value: Any) -> Any:
    """JSON for numpy and torch numbers, arrays, paths and dataclasses of the library."""
    if isinstance(value, Path):
        return str(value)
    for name in ("to_dict", "tolist"):
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"{type(value).__name__} has no JSON form.")


def note(text: str) -> None:
    """Print one line on stderr."""
    err().print(text, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def busy(text: str) -> Iterator[None]:
    """A spinner on stderr for work without countable steps; nothing if stderr is not a terminal."""
    console = err()
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``224x336`` (height x width) in pixels."""
    match = re.fullmatch(r"(\d+)(?:[xX,](\d+))?", text.strip())
    if match is None or int(match[1]) < 1 or (match[2] is not None and int(match[2]) < 1):
        raise typer.BadParameter(
            f"{text!r} is not a size; write 224, or 224x336 for height x width."
        )
    return int(match[1]), int(match[2] or match[1])


def parse_triple(text: str, option: str) -> tuple[float, float, float]:
    """Three finite numbers, ``0.485,0.456,0.406``; of ``--std`` above 0."""
    try:
        numbers = [float(item) for item in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise typer.BadParameter(f"{option} {text} is not three numbers such as 0.485,0.456,0.406.")
    if option == "--std" and min(numbers) <= 0:
        raise typer.BadParameter(f"--std {text} divides the pixels: its numbers must be above 0.")
    return numbers[0], numbers[1], numbers[2]


def image_size(model: nn.Module, text: str | None) -> tuple[int, int]:
    """The size that was asked for, or the one the model is converted or configured for."""
    from dwattn.adapters import describe
    from dwattn.conversion import conversion

    if text is not None:
        return parse_size(text)
    layout, record = describe(model), conversion(model)
    fixed = None if record is None or record.hook is None else record.hook[0].fixed
    grid = fixed or layout.geometry().grid
    return grid[0] * layout.patch_size[0], grid[1] * layout.patch_size[1]


def grid_option(model: nn.Module, size: str | None) -> dict[str, Any]:
    """``grid=`` of :func:`dwattn.replace` where the size that was asked for is not the model's."""
    from dwattn.adapters import describe

    layout = describe(model)
    grid = None if size is None else layout.grid_of(*parse_size(size))
    return {} if grid in (None, layout.grid) else {"grid": grid}


def normalisation(model: nn.Module, spec: str, mean: str | None, std: str | None) -> Preprocessing:
    """Mean and standard deviation from the options, else from the model, else ImageNet's."""
    from dwattn.models import Preprocessing, preprocessing

    found = preprocessing(model, spec)
    if mean is None and std is None:
        return found
    return Preprocessing(
        parse_triple(mean, "--mean") if mean else found.mean,
        parse_triple(std, "--std") if std else found.std,
        "options",
    )


def read_model(
    spec: str, weights: Path | None, device: str, *, pretrained: bool = True
) -> nn.Module:
    """The model that ``spec`` names, on ``device``."""
    from dwattn.models import load_model

    model = load_model(spec, weights, pretrained=pretrained)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DwattnError(f"The model cannot be moved to device {device!r}: {reason}") from error


def read_images(
    model: nn.Module,
    spec: str,
    folder: Path,
    size: str | None,
    mean: str | None,
    std: str | None,
    batch_size: int,
    num_images: int,
) -> Any:
    """The images of a folder, in the size and normalisation that the model wants."""
    from dwattn.image_files import image_folder

    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} to read images from.")
    pixels = image_size(model, size)
    norm = normalisation(model, spec, mean, std)
    images = image_folder(
        folder, pixels, norm.mean, norm.std, batch_size=batch_size, limit=num_images
    )
    require_readable(images)
    note(
        f"{len(images.files)} images from {folder} at {pixels[0]} x {pixels[1]}, normalised with {norm.source}."
    )
    return images


def require_readable(images: ImageFolder | Tensor) -> None:
    """Name the damaged files of a folder before long work begins on it; a folder so large that this check would be long
    work itself is not checked.
    """
    from rich.progress import track

    from dwattn import image_files

    files = images.files if isinstance(images, image_files.ImageFolder) else []
    if len(files) > MOST_CHECKED:
        return
    bar: dict[str, Any] = {"console": Console(stderr=True), "transient": True}
    bar |= {"total": len(files), "disable": len(files) < FEW_FILES}
    image_files.require_readable(files, lambda found: track(found, "looking at the images", **bar))


def parse_rank(text: str | None) -> int | float | dict[str, float] | None:
    """``96`` is a width, ``0.25`` a share of C, ``fidelity=0.95`` a target."""
    if text is None:
        return None
    try:
        if text.startswith("fidelity="):
            return {"fidelity": float(text.removeprefix("fidelity="))}
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"--rank {text} is neither a width (96), nor a share of C (0.25), nor fidelity=0.95."
        ) from None


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, hf:DIR_OR_ID, hub:NAME, module:function or file.py:function; "
        "then ?option=value&...",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        help="Local weights (.safetensors, or .pth with tensors only) instead of pretrained ones."
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Image size, 224 or 224x336 (height x width); default: the model's."
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B",
        help="Pixel mean; default: what the model was trained with, else ImageNet's.",
    ),
]
StdOption = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Pixel standard deviation; default as for --mean."),
]
DeviceOption = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, ...")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per batch.")]
AmpOption = Annotated[str, typer.Option(help="Mixed precision: no (fp32), bf16 or fp16.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout and nothing else there.")
]
ImagesOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder of images, searched with its subfolders.")
]
ProgressOption = Annotated[
    bool,
    typer.Option("--progress/--no-progress", help="Show progress and the time left, on stderr."),
]
VariantOption = Annotated[
    str, typer.Option(help="Layer to put in: dw, lowrank_dw, conv, ens_dw or spvit.")
]
RankOption = Annotated[
    str | None,
    typer.Option(
        help="lowrank_dw: inner width (96), share of C (0.25), or fidelity=0.95; default: C/4."
    ),
]
