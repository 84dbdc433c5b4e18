"""One file holds the whole converted model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dwattn
from dwattn import Plan
from dwattn.conversion import conversion
from dwattn.errors import CheckpointError
from dwattn.variants import REPLACEMENTS
from support.checkpoints import IMAGES, convert, fresh, randomise_shims
from support.models import FAMILIES, Family, clip_both, hf_model, randomise, timm_vit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_every_family(family: Family, path: Path) -> None:
    model, images = family.build(), family.images()
    plan = Plan.for_layers(model, [0, 1, 3], [None, [2, 0], None])
    dwattn.replace(model, plan)
    randomise_shims(model)
    expected = family.tokens(model, images)
    dwattn.save(model, path)
    loaded = dwattn.load(fresh(family.build), path)
    assert torch.equal(family.tokens(loaded, images), expected)
    assert list(loaded.state_dict()) == list(model.state_dict())
    record = conversion(loaded)
    assert record is not None
    assert record.plan == plan


@pytest.mark.parametrize("variant", REPLACEMENTS)
@pytest.mark.parametrize("prefix", ["exact", "static"])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_every_variant(variant: str, prefix: str, dynamic: bool, path: Path) -> None:
    def build() -> nn.Module:
        return timm_vit(reg_tokens=4, qk_norm=True, dynamic_img_size=dynamic)

    options = {"rank": 24} if variant == "lowrank_dw" else {}
    model = convert(build, variant=variant, prefix=prefix, dynamic_grid=dynamic, **options)
    dwattn.save(model, path)
    loaded = dwattn.load(fresh(build), path)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    if dynamic:
        assert torch.equal(loaded(IMAGES.mT), model(IMAGES.mT))
    else:
        with pytest.raises(ValueError, match=r"4 x 3|Input height"):
            loaded(IMAGES.mT)


def test_prefix_rows_with_projections_of_their_own(path: Path) -> None:
    """Calibration may separate them; the file must say so."""
    model = convert()
    model.blocks[0].attn.layer.own_prefix_projection()
    with torch.no_grad():
        model.blocks[0].attn.layer.prefix_proj.weight += 1
    dwattn.save(model, path)
    loaded = dwattn.load(fresh, path)
    assert loaded.blocks[0].attn.layer.prefix_proj is not None
    assert loaded.blocks[2].attn.layer.prefix_proj is None
    assert torch.equal(loaded(IMAGES), model(IMAGES))


@torch.no_grad()
def test_calibrated_models(path: Path) -> None:
    model = timm_vit(reg_tokens=4)
    data = torch.randn(12, 3, 32, 24)
    dwattn.replace(model, Plan.for_layers(model, [1]), calibrate=data, progress=False)
    dwattn.save(model, path)
    loaded = dwattn.load(lambda: fresh(lambda: timm_vit(reg_tokens=4)), path)
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_factory_is_as_good_as_a_model(path: Path) -> None:
    model = convert()
    dwattn.save(model, str(path))
    assert torch.equal(dwattn.load(timm_vit, str(path))(IMAGES), model(IMAGES))


def test_saving_again_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    dwattn.save(convert(), path)
    dwattn.save(dwattn.load(fresh, path), tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, path: Path) -> None:
    """The file keeps the dtype of the model; loading casts to that of the fresh one."""
    model = convert().to(dtype)
    dwattn.save(model, path)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    same = dwattn.load(fresh().to(dtype), path)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))  # fmt: skip
    widened = dwattn.load(fresh(), path)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert torch.equal(widened.head.weight, model.head.weight.float())


def test_tied_and_overlapping_weights_are_stored_once_and_come_back(path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = timm_vit()
            self.head, self.tail = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.tail.weight = self.head.weight
            base = torch.arange(10.0)
            self.register_buffer("low", base[:6])
            self.register_buffer("high", base[4:])
            self.register_buffer("column", base.view(5, 2))
            self.register_buffer("row", base.view(2, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.tail(self.head(self.vit(x)))
                + self.low.sum()
                + 2 * self.high.sum()
                + self.row[1, 2]
            )

    model = convert(lambda: Tied().eval())
    dwattn.save(model, path)
    assert ("head.weight" in load_file(path)) != ("tail.weight" in load_file(path))
    loaded = dwattn.load(lambda: randomise(Tied(), seed=5), path)
    assert loaded.head.weight is loaded.tail.weight
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_buffers_and_transposed_parameters(path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(timm_vit(), nn.Unflatten(1, (5, 1, 1)), nn.BatchNorm2d(5))
        model[0].head.weight = nn.Parameter(torch.zeros(48, 5).mT)
        return model

    model = convert(lambda: randomise(build()))
    model[2].running_mean.fill_(3)
    model[2].num_batches_tracked.fill_(7)
    dwattn.save(model, path)
    loaded = dwattn.load(lambda: randomise(build(), seed=3), path)
    assert loaded[2].num_batches_tracked == 7
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_wrapper_s_file_loads_into_a_wrapper(path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(timm_vit(), nn.Linear(5, 2)).eval()

    model = convert(build)
    dwattn.save(model, path)
    assert torch.equal(dwattn.load(build, path)(IMAGES), model(IMAGES))
    with pytest.raises(CheckpointError, match=r"as its part '0': it lacks blocks.0.* same way"):
        dwattn.load(timm_vit, path)


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [("Dinov2", None), ("ViT", "ViTForImageClassification"), ("CLIPVision", None), ("DeiT", None)],
)
@torch.no_grad()
def test_transformers_round_trips(
    kind: str, class_name: str | None, tmp_path: Path, path: Path
) -> None:
    """save_pretrained renames keys; the original saved so and loaded again converts the same."""
    images = torch.randn(2, 3, 32, 32)
    original = hf_model(kind, class_name)
    plan = Plan.for_layers(original, [0, 2])
    original.save_pretrained(tmp_path / "original")
    plan.save(tmp_path / "plan.json")
    dwattn.replace(original, plan)
    dwattn.save(original, path)
    expected = original(images)[0]
    again = type(original).from_pretrained(tmp_path / "original").eval()
    dwattn.replace(again, tmp_path / "plan.json")
    assert torch.equal(again(images)[0], expected)
    from_weights = dwattn.load(type(original).from_pretrained(tmp_path / "original").eval(), path)
    assert torch.equal(from_weights(images)[0], expected)
    from_config = dwattn.load(type(original)(original.config).eval(), path)
    assert torch.equal(from_config(images)[0], expected)


def test_save_pretrained_of_a_converted_model_is_not_mistaken_for_a_checkpoint(
    tmp_path: Path,
) -> None:
    model = convert(lambda: hf_model("Dinov2"))
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(
        CheckpointError, match=r"is a directory.*save_pretrained\(\) cannot describe"
    ):
        dwattn.load(hf_model("Dinov2"), tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"not written by dwattn.save"):
        dwattn.load(hf_model("Dinov2"), tmp_path / "folder" / "model.safetensors")


def test_a_clip_with_both_towers(path: Path) -> None:
    model = convert(clip_both)
    dwattn.save(model, path)
    loaded = dwattn.load(fresh(clip_both), path)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_averages_of_weights_are_saved_as_the_model_in_them(path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(convert(timm_vit))
    averaged.update_parameters(averaged.module)
    dwattn.save(averaged, path)
    with torch.no_grad():
        assert torch.equal(dwattn.load(timm_vit, path)(IMAGES), averaged(IMAGES))
    dwattn.restore(averaged)
