"""Models by name: ``timm:NAME``, ``hf:DIR_OR_ID``, ``hub:NAME``, ``module:function`` or
``file.py:function``.

A question mark passes options on: ``timm:vit_small_patch14_dinov2?img_size=224x336&num_classes=0``.
Weights
come with the model (pretrained), or from a local file; nothing is ever unpickled as code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dwattn.errors import CheckpointError, DwattnError
from dwattn.files import parse_json
from dwattn.weights import load_state, mismatch, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_HUB_REPOSITORY = "facebookresearch/dinov2"
#: The part that sees images, by the model type of what pairs it with text.
_VISION_TOWERS = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "metaclip_2": "MetaClip2VisionModel",
    "altclip": "AltCLIPVisionModel",
    "chinese_clip": "ChineseCLIPVisionModel",
    "clipseg": "CLIPSegVisionModel",
    "owlvit": "OwlViTVisionModel",
    "owlv2": "Owlv2VisionModel",
}

Triple = tuple[float, float, float]


class ModelError(DwattnError):
    """A model that cannot be made from its name."""


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model name.

    Args:
        kind: ``timm``, ``hf``, ``hub`` or ``python``.
        name: what follows the colon; for ``python`` the module or file.
        function: the factory's name, for ``python`` only.
        options: keyword arguments after the question mark.
    """

    kind: str
    name: str
    function: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Parse a name.

        Raises:
            ModelError: the text has none of the forms.
        """
        body, _, query = text.partition("?")
        # The last colon, so that a path may contain one; the libraries' prefixes stand first.
        kind, colon, name = body.partition(":")
        if colon and name and kind in ("timm", "hf", "hub"):
            return cls(kind, name, "", _parse_options(query, text))
        place, colon, function = body.rpartition(":")
        if colon and place and function.isidentifier():
            return cls("python", place, function, _parse_options(query, text))
        raise ModelError(
            f"{text!r} is not a model name; use timm:NAME, hf:DIRECTORY_OR_ID, hub:NAME, "
            "package.module:function or path/to/file.py:function, optionally followed by "
            "?option=value&option=value."
        )


@dataclass(frozen=True)
class Preprocessing:
    """How a model's pixels are normalised: ``(pixel - mean) / std`` for pixels in [0, 1]; ``source`` says where that is
    known from.
    """

    mean: Triple
    std: Triple
    source: str


def load_model(
    spec: str, weights: str | Path | None = None, *, pretrained: bool = True, **options: Any
) -> nn.Module:
    """Make a model, in eval mode on the CPU.

    Args:
        spec: see :mod:`dwattn.models`.
        weights: a local ``.safetensors`` file, or a ``.pth``/``.pt``/``.bin`` of tensors; instead
            of the pretrained weights that a library would download.
        pretrained: without ``weights``, whether timm, hf and hub models get their pretrained ones
            or random ones; ``?pretrained=false`` in the name says the same.
        options: further keyword arguments of the factory, beside those in ``spec``.

    Raises:
        ModelError: a library that is not installed, a name it does not know, no network, a factory
            that fails.
        CheckpointError: a weights file that is missing, damaged, pickled code, or of another model.
    """
    parsed = ModelSpec.parse(spec)
    state = None if weights is None else read_weights(weights)
    makers: dict[str, Callable[..., nn.Module]] = {
        "timm": _timm, "hf": _transformers, "hub": _hub, "python": _python,
    }  # fmt: skip
    options = {**parsed.options, **options}
    if parsed.kind != "python":
        options["pretrained"] = bool(options.get("pretrained", pretrained)) and state is None
    model = makers[parsed.kind](parsed, state, options)
    if state is not None and parsed.kind != "hf":
        load_state(model, state, f"{weights}")
    return model.eval()


def preprocessing(model: nn.Module, spec: str | None = None) -> Preprocessing:
    """Mean and standard deviation the model was trained with, else ImageNet's."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("mean") and config.get("std"):
        return Preprocessing(_triple(config["mean"]), _triple(config["std"]), "timm pretrained_cfg")
    parsed = None if spec is None else ModelSpec.parse(spec)
    if parsed is not None and parsed.kind == "hf":
        found = _hf_preprocessor(parsed.name)
        if found.get("image_mean") and found.get("image_std"):
            mean, std = _triple(found["image_mean"]), _triple(found["image_std"])
            return Preprocessing(mean, std, "preprocessor_config.json")
    return Preprocessing(IMAGENET_MEAN, IMAGENET_STD, "ImageNet defaults")


def import_timm() -> ModuleType:
    """timm, or a sentence that says what to install.

    Raises:
        ModelError: timm is not installed, or torchvision, which it imports, is broken.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        if error.name not in (None, "timm"):
            raise ModelError(
                f"timm cannot be imported: {error}. Install with pip install 'dwattn[timm]'."
            ) from error
        raise ModelError(
            "timm is not installed; install it with pip install 'dwattn[timm]'."
        ) from error
    except (RuntimeError, AttributeError) as error:
        if "torchvision" not in str(error):
            raise ModelError(f"timm cannot be imported: {error}.") from error
        raise ModelError(_mismatched_torchvision("timm", error)) from error


def _mismatched_torchvision(library: str, error: BaseException) -> str:
    return (
        f"{library} cannot be imported, because the installed torchvision is built for another "
        f"torch than {torch.__version__} ({_first_line(error)}). Install the "
        "torchvision build that belongs to it: CPU-only for a CPU-only torch, and of the "
        "release that goes with this torch."
    )


def _parse_options(query: str, text: str) -> dict[str, Any]:
    options = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise ModelError(f"{item!r} in {text!r} is not of the form option=value.")
        options[key] = _parse_value(value)
    return options


def _parse_value(value: str) -> Any:
    """``224x336`` as a tuple, JSON (and Python's True, False, None) as what it says, anything else
    as text.
    """
    if re.fullmatch(r"\d+x\d+", value):
        return tuple(int(side) for side in value.split("x"))
    constants = {"True": True, "False": False, "None": None}
    if value in constants:
        return constants[value]
    try:
        return parse_json(value)
    except ValueError:
        return value


def _timm(spec: ModelSpec, state: dict[str, Tensor] | None, options: dict[str, Any]) -> nn.Module:
    timm = import_timm()
    try:
        model: nn.Module = timm.create_model(spec.name, **options)
    except Exception as error:
        raise ModelError(
            _library_failure("timm", spec.name, error, options["pretrained"])
        ) from error
    return model


def _transformers(
    spec: ModelSpec, state: dict[str, Tensor] | None, options: dict[str, Any]
) -> nn.Module:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"transformers cannot be imported ({error}); install it with pip install 'dwattn[hf]'."
        ) from error
    pretrained, head = options.pop("pretrained"), options.pop("head", True)
    try:
        config = transformers.AutoConfig.from_pretrained(spec.name, **options)
        cls, config, arguments = _hf_class(transformers, config, head)
        if pretrained:
            # use_safetensors: the alternative on the hub is a pickle.
            model, info = cls.from_pretrained(
                spec.name,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **arguments,
            )
            _settle(model, info["missing_keys"], spec)
            if head and cls is transformers.AutoModel:
                _note_left_out(model, info["unexpected_keys"], spec)
            return cast(nn.Module, model)
        make = cls.from_config if cls is transformers.AutoModel else cls
        model = make(config, **arguments)
    except DwattnError:
        raise
    except Exception as error:
        if "torchvision" in f"{error} {error.__cause__}":
            raise ModelError(
                _mismatched_torchvision("transformers", error.__cause__ or error)
            ) from error
        raise ModelError(_library_failure("transformers", spec.name, error, pretrained)) from error
    return model if state is None else _load_renamed(type(model), config, state, spec, arguments)


def _hf_class(transformers: Any, config: Any, head: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The class to make, its configuration and further arguments: of the model as it was saved where that classifies (and
    ``head``), of the vision tower, of the bare model (``AutoModel``), or of the model as it was saved where transformers has
    no bare one (ViTPose, Depth Anything).

    The configuration alone decides, for a student's file is read into a model that is made without its checkpoint.
    """
    saved = config.architectures[0] if config.architectures else ""
    if head and "ForImageClassification" in saved and hasattr(transformers, saved):
        return getattr(transformers, saved), config, {}
    tower = _VISION_TOWERS.get(config.model_type.removesuffix("_vision_model"))
    if tower is not None:
        return getattr(transformers, tower), getattr(config, "vision_config", config), {}
    if type(config) not in transformers.MODEL_MAPPING and saved:
        return getattr(transformers, saved), config, {}
    bare = transformers.MODEL_MAPPING.get(type(config), None)
    # A model with a head holds the bare one without pooler; by itself that would be given a random one.
    pooled = bare is not None and "add_pooling_layer" in inspect.signature(bare).parameters
    without = pooled and saved not in ("", bare.__name__)
    return transformers.AutoModel, config, {"add_pooling_layer": False} if without else {}


def _settle(model: nn.Module, missing: Collection[str], spec: ModelSpec) -> None:
    """transformers fills what a checkpoint lacks with random weights: those of a pooler become zero, others are refused."""
    lacking = sorted(set(missing) & dict(model.named_parameters()).keys())
    pooler = [key for key in lacking if key.startswith("pooler.")]
    others = [key for key in lacking if key not in pooler and "mask_token" not in key]
    if others:
        raise _unfitting(spec, type(model), others, [])
    if pooler:
        with torch.no_grad():
            for key in pooler:
                model.get_parameter(key).zero_()
        warnings.warn(
            f"hf:{spec.name} holds no pooler, so pooler_output is zero; export with output='last_hidden_state' (--output) "
            "leaves it out.",
            stacklevel=2,
        )


def _unfitting(
    spec: ModelSpec, cls: Any, missing: list[str], unexpected: list[str]
) -> CheckpointError:
    text = mismatch(f"hf:{spec.name} as {cls.__name__}", missing, unexpected)
    classifies = "ForImageClassification" in cls.__name__
    return CheckpointError(
        text + (" ?head=false makes it without its classifier." if classifies else "")
    )


def _note_left_out(model: nn.Module, unexpected: Collection[str], spec: ModelSpec) -> None:
    parts = sorted({key.split(".")[0] for key in unexpected})
    if parts:
        warnings.warn(
            f"hf:{spec.name} is made as {type(model).__name__}, without these parts of the checkpoint: {', '.join(parts)}.",
            stacklevel=2,
        )


def _load_renamed(
    cls: Any, config: Any, state: dict[str, Tensor], spec: ModelSpec, arguments: dict[str, Any]
) -> nn.Module:
    """Load through ``from_pretrained``, which knows the key names of older releases, and insist on
    all of them.
    """
    try:
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **arguments
        )
    except Exception as error:
        raise CheckpointError(f"The weights file does not fit hf:{spec.name}: {error}") from error
    mismatched = [
        str(item[0] if isinstance(item, tuple) else item)
        for item in info.get("mismatched_keys", [])
    ]
    missing = sorted([*info.get("missing_keys", []), *mismatched])
    if missing:
        raise _unfitting(spec, cls, missing, sorted(info.get("unexpected_keys", [])))
    loaded: nn.Module = model
    return loaded


def _hub(spec: ModelSpec, state: dict[str, Tensor] | None, options: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = torch.hub.load(
            _HUB_REPOSITORY, spec.name, verbose=False, skip_validation=True, **options
        )
    except Exception as error:
        raise ModelError(
            f"torch.hub could not make {spec.name!r} from {_HUB_REPOSITORY} "
            f"({type(error).__name__}: {_first_line(error)}). The first use needs network access; "
            f"afterwards the code is taken from {torch.hub.get_dir()}. Names are those of the "
            "repository, for example hub:dinov2_vits14."
        ) from error
    return model


def _python(spec: ModelSpec, state: dict[str, Tensor] | None, options: dict[str, Any]) -> nn.Module:
    module = _module_from_file(Path(spec.name)) if spec.name.endswith(".py") else _module(spec.name)
    factory = getattr(module, spec.function, None)
    if not callable(factory):
        raise ModelError(f"{spec.name} has no function {spec.function!r}.")
    try:
        model = factory(**options)
    except DwattnError:
        raise
    except Exception as error:
        raise ModelError(
            f"{spec.name}:{spec.function} failed with {type(error).__name__}: {_first_line(error)}."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec.name}:{spec.function} returned {type(model).__name__}; it must return a "
            "torch.nn.Module."
        )
    return model


def _module(name: str) -> ModuleType:
    # Like python -m: a module in the current directory is found.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"The module {name!r} cannot be imported ({error}); give it as package.module, "
            "importable from here, or as a path ending in .py."
        ) from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"dwattn_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ModelError(
            f"{path} failed with {type(error).__name__}: {_first_line(error)}."
        ) from error
    return module


def _library_failure(library: str, name: str, error: Exception, downloads: bool) -> str:
    hint = (
        " If the weights have to be downloaded, network access is needed; give a local file with "
        "weights= (--weights)."
        if downloads
        else ""
    )
    return f"{library} could not make {name!r}: {type(error).__name__}: {_first_line(error)}.{hint}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no message"


def _hf_preprocessor(name: str) -> dict[str, Any]:
    """``preprocessor_config.json`` of a local directory or of the local hub cache, or nothing."""
    local = Path(name) / "preprocessor_config.json"
    try:
        if not local.is_file():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(name, local.name)
            if not isinstance(cached, str):
                return {}
            local = Path(cached)
        config: dict[str, Any] = json.loads(local.read_text(encoding="utf-8"))
    except (
        Exception
    ):  # an optional convenience must not stop the caller; defaults are reported as such
        return {}
    return config


def _triple(values: Any) -> Triple:
    numbers = [float(value) for value in values]
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise ModelError(f"Expected three numbers, one for each colour, got {numbers}.")
    return (numbers[0], numbers[1], numbers[2])
