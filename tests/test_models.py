"""Models by name, weights from local files, and errors that say what to install or fix."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dwattn.errors import CheckpointError
from dwattn.fingerprint import fingerprint
from dwattn.models import (
    IMAGENET_MEAN,
    ModelError,
    ModelSpec,
    import_timm,
    load_model,
    preprocessing,
)
from dwattn.weights import read_weights
from support.models import hf_model

TINY = "timm:vit_tiny_patch16_224?img_size=32x48&depth=1&num_classes=0&pretrained=false"

FACTORY = """
import torch
def make(width=4):
    return torch.nn.Linear(width, 2)
def wrong():
    return "a string"
def broken():
    raise RuntimeError("no such device")
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "my_models.py"
    path.write_text(FACTORY)
    return str(path)


def test_names_are_parsed() -> None:
    spec = ModelSpec.parse("timm:vit_base?img_size=224x336&qkv_bias=false&act=gelu&depth=2&x=[1,2]")
    assert (spec.kind, spec.name) == ("timm", "vit_base")
    assert spec.options == {
        "img_size": (224, 336), "qkv_bias": False, "act": "gelu", "depth": 2, "x": [1, 2]
    }  # fmt: skip
    assert ModelSpec.parse("hf:facebook/dinov2-small").name == "facebook/dinov2-small"
    spec = ModelSpec.parse("a.b.c:make")
    assert (spec.kind, spec.name, spec.function) == ("python", "a.b.c", "make")
    assert ModelSpec.parse("some/x.py:make?flag=True&none=None").options == {
        "flag": True, "none": None
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "resnet50", "timm:", ":f", "a.py:", "m:f?x", "m:f?1=2", "m:not-a-name"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ModelError):
        ModelSpec.parse(text)


def test_timm_models_with_options() -> None:
    model: Any = load_model(TINY)
    assert not model.training
    assert model.patch_embed.grid_size == (2, 3)
    assert len(model.blocks) == 1
    assert preprocessing(model).source == "timm pretrained_cfg"


def test_a_name_that_timm_does_not_know() -> None:
    with pytest.raises(ModelError, match=r"timm could not make 'vit_nonexistent'"):
        load_model("timm:vit_nonexistent", pretrained=False)


def test_weights_from_safetensors_and_from_a_tensor_pickle(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = load_model(TINY)
    state = source.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = load_model(TINY.replace("&pretrained=false", ""), tmp_path / name)
        assert all(torch.equal(state[k], v) for k, v in loaded.state_dict().items())


def test_weights_that_were_saved_in_a_wrapper(tmp_path: Path) -> None:
    source = load_model(TINY)
    state = source.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(source)
    wrapped = {
        "compiled": torch.compile(source),
        "parallel": nn.DataParallel(torch.compile(source)),
        "average": averaged,
    }
    for name, wrapper in wrapped.items():
        torch.save(wrapper.state_dict(), tmp_path / f"{name}.pth")
        save_file(wrapper.state_dict(), tmp_path / f"{name}.safetensors")
        for ending in ("pth", "safetensors"):
            loaded = load_model(TINY, tmp_path / f"{name}.{ending}").state_dict()
            assert all(torch.equal(state[k], v) for k, v in loaded.items())


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    state = dict(load_model(TINY).state_dict())
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    save_file({k: v for k, v in state.items() if "mlp" not in k}, tmp_path / "less.safetensors")
    wide = load_model(TINY, img_size=(32, 32)).state_dict()
    save_file(wide, tmp_path / "size.safetensors")
    with pytest.raises(CheckpointError, match=r"1 in the file are not in the model \(extra\)"):
        load_model(TINY, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointError, match=r"4 weights of the model are not in the file"):
        load_model(TINY, tmp_path / "less.safetensors")
    with pytest.raises(
        CheckpointError, match=r"pos_embed is \(1, 5, 192\) instead of \(1, 7, 192\)"
    ):
        load_model(TINY, tmp_path / "size.safetensors")


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("code.pth", pickle.dumps({"a": Malicious()}), "weights_only|run code"),
        ("short.safetensors", b"\x10\x00\x00", "not a complete safetensors file"),
        ("short.pth", b"PK", "damaged"),
        ("weights.h5", b"x", "ending '.h5'"),
    ],
    ids=["code", "safetensors", "pickle", "ending"],
)
def test_unsafe_and_damaged_files(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_weights(path)
    assert "code ran" not in capsys.readouterr().out


def test_files_that_are_missing_or_hold_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no weights file"):
        read_weights(tmp_path / "none.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list, not a state dict"):
        read_weights(tmp_path / "list.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "student.safetensors", {"dwattn": "{}"})
    with pytest.raises(CheckpointError, match="as STUDENT after MODEL"):
        read_weights(tmp_path / "student.safetensors")


def test_transformers_from_a_directory(tmp_path: Path) -> None:
    model = hf_model("Dinov2", num_hidden_layers=1)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_model(f"hf:{tmp_path}")
    assert type(loaded).__name__ == "Dinov2Model"
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        assert torch.equal(loaded(x).last_hidden_state, expected)
        # The file by itself, in the key names that save_pretrained writes, into a fresh model.
        again = load_model(f"hf:{tmp_path}", tmp_path / "model.safetensors")
        assert torch.equal(again(x).last_hidden_state, expected)
        random = load_model(f"hf:{tmp_path}?pretrained=false")
        assert not torch.equal(random(x).last_hidden_state, expected)
    assert preprocessing(loaded, f"hf:{tmp_path}").mean == IMAGENET_MEAN
    config = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = preprocessing(loaded, f"hf:{tmp_path}")
    assert (found.mean, found.source) == ((0.5, 0.5, 0.5), "preprocessor_config.json")


def test_a_classifier_of_transformers_keeps_its_head(tmp_path: Path) -> None:
    model: Any = hf_model("ViT", "ViTForImageClassification", num_hidden_layers=1, num_labels=5)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    loaded = load_model(f"hf:{tmp_path}")
    again = load_model(f"hf:{tmp_path}", tmp_path / "model.safetensors")
    untrained = load_model(f"hf:{tmp_path}", pretrained=False)
    bare = load_model(f"hf:{tmp_path}?head=false")
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(loaded(x).logits, expected)
        torch.testing.assert_close(again(x).logits, expected)
        assert untrained(x).logits.shape == expected.shape
        assert bare(x).pooler_output is None
        torch.testing.assert_close(model.classifier(bare(x).last_hidden_state[:, 0]), expected)
    assert fingerprint(bare) == fingerprint(loaded)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"\?head=false makes it without its classifier"):
        load_model(f"hf:{tmp_path}", tmp_path / "bare" / "model.safetensors")


def test_a_pooler_that_a_checkpoint_lacks_is_not_random(tmp_path: Path) -> None:
    from transformers import ViTModel

    model: Any = hf_model("ViT", num_hidden_layers=1)
    ViTModel(model.config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds no pooler, so pooler_output is zero"):
        loaded = load_model(f"hf:{tmp_path}")
    assert not loaded(torch.randn(1, 3, 32, 32)).pooler_output.any()
    assert (
        loaded.state_dict().keys()
        == load_model(f"hf:{tmp_path}", pretrained=False).state_dict().keys()
    )


def test_heads_that_are_left_out_are_told(tmp_path: Path) -> None:
    model: Any = hf_model("ViT", "ViTForMaskedImageModeling", num_hidden_layers=1, encoder_stride=8)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="made as ViTModel, without these parts.*: decoder"):
        loaded = load_model(f"hf:{tmp_path}")
    assert loaded(torch.randn(1, 3, 32, 32)).pooler_output is None


def test_transformers_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    model: Any = hf_model("Dinov2", num_hidden_layers=1)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        CheckpointError, match=r"2 weights of the model are not in the file \(layernorm"
    ):
        load_model(f"hf:{tmp_path}")


def test_a_torchvision_that_breaks_transformers_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> None:
        cause = RuntimeError("operator torchvision::nms does not exist")
        raise ModuleNotFoundError("Could not import module 'ViTModel'.") from cause

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"transformers cannot be imported.*torchvision.*CPU-only"):
        load_model(f"hf:{tmp_path}")


def test_transformers_weights_of_another_model(tmp_path: Path) -> None:
    hf_model("Dinov2", num_hidden_layers=1).save_pretrained(tmp_path / "one")  # type: ignore[operator]
    hf_model("Dinov2", num_hidden_layers=2).save_pretrained(tmp_path / "two")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="weights of the model are not in the file"):
        load_model(f"hf:{tmp_path / 'two'}", tmp_path / "one" / "model.safetensors")


def test_the_vision_tower_of_a_clip_model(tmp_path: Path) -> None:
    from support.models import clip_both

    both: Any = clip_both()
    both.save_pretrained(tmp_path)
    tower = load_model(f"hf:{tmp_path}")
    assert type(tower).__name__ == "CLIPVisionModel"
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = both.vision_model(pixel_values=x).last_hidden_state
        assert torch.equal(tower(x).last_hidden_state, expected)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="transformers could not make"):
        load_model(f"hf:{tmp_path}")


def test_hub_needs_network_or_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(
        ModelError, match=r"dinov2_vits14.*Name or service not known.*network access"
    ):
        load_model("hub:dinov2_vits14")


def test_python_factories(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(f"{factory}:make?width=7").in_features == 7
    monkeypatch.chdir(Path(factory).parent)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    model = load_model("my_models:make", width=3)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}:absent", "has no function 'absent'"),
        ("{}:wrong", "returned str"),
        ("{}:broken", "RuntimeError: no such device"),
        ("{}:make?height=1", "TypeError"),
        ("{}.gone.py:make", "There is no file"),
        ("no_such_module_anywhere:make", "cannot be imported"),
    ],
)
def test_python_factories_that_fail(factory: str, name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(name.format(factory))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            r"pip install 'dwattn\[timm\]'",
        ),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision.*CPU-only"),
        (RuntimeError("something else"), "something else"),
    ],
)
def test_a_broken_timm_is_explained(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModelError, match=words):
        import_timm()


def test_missing_transformers_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'dwattn\[hf\]'"):
        load_model("hf:anything")
