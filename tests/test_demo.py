"""The demo: its real model, its photos, and the journey as a whole."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dwattn import fidelity
from dwattn.demo import debian, machine, photos, pictures, pretrained, stamps
from dwattn.demo.terminal import compact
from dwattn.demo.timing import RemovedAttention, cpu_threads, interleaved
from dwattn.errors import DataError
from support.demo_photos import noise_photos, picture

# Photos ------------------------------------------------------------------------------------------


@pytest.fixture
def some_photos(tmp_path: Path) -> list[photos.Photo]:
    return noise_photos(tmp_path)


def test_split_keeps_scenes_together_and_is_repeatable(some_photos: list[photos.Photo]) -> None:
    wanted = {"calibration": 120, "held_out": 60}
    fitting, kept = photos.split(some_photos, **wanted, seed=3)
    assert len(fitting) + len(kept) == 30
    assert len(kept) == 10  # two to one, where there are too few
    assert not {p.scene for p in fitting} & {p.scene for p in kept}
    assert photos.split(list(some_photos), **wanted, seed=3) == (fitting, kept)
    assert photos.split(some_photos, **wanted, seed=4) != (fitting, kept)


def test_split_takes_the_wanted_numbers_where_there_are_enough(
    some_photos: list[photos.Photo],
) -> None:
    fitting, kept = photos.split(some_photos, calibration=12, held_out=6)
    assert (len(fitting), len(kept)) == (12, 6)


def test_too_few_photos_are_refused(some_photos: list[photos.Photo]) -> None:
    with pytest.raises(DataError, match="5 photos"):
        photos.split(some_photos[:5])


def test_crops_fill_up_the_calibration_side_only(some_photos: list[photos.Photo]) -> None:
    views = photos.with_crops(some_photos[:4], 10, seed=1)
    assert len(views) == 10
    assert views[:4] == some_photos[:4]
    assert {v.scene for v in views} == {p.scene for p in some_photos[:4]}
    pixels, _ = photos.load(views)
    assert pixels.shape == (10, 3, 224, 224)
    assert not torch.equal(pixels[0], pixels[4])  # a crop of the same photo
    assert torch.equal(pixels, photos.load(views)[0])


def test_a_small_pool_is_a_sample_of_all_packages() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    few = photos.pool(total=12, seed=1)
    assert len(few) == 12
    assert few == photos.pool(total=12, seed=1)
    assert len(photos.packages(few)) >= 2


def test_more_photos_than_views_are_all_kept(some_photos: list[photos.Photo]) -> None:
    assert photos.with_crops(some_photos, 10) == some_photos


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff not a photo")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        photos.Photo("p", "package", "s", path).render()


def test_pixels_are_normalised() -> None:
    grey = photos.to_pixels(Image.new("RGB", (4, 4), (128, 128, 128)))
    expected = (128 / 255 - np.array(pretrained.PIXEL_MEAN)) / np.array(pretrained.PIXEL_STD)
    assert grey[:, 0, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_stamps_are_pasted_inside_and_masked(tmp_path: Path) -> None:
    stamp = tmp_path / "stamp.png"
    rgba = np.zeros((60, 80, 4), dtype=np.uint8)
    rgba[10:50, 10:70] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(stamp)
    background = Image.new("RGB", (300, 200), (0, 0, 255))
    image, mask = stamps.compose(background, stamp, random.Random(0), 112)
    pixels = np.asarray(image)
    assert image.size == (112, 112)
    assert mask.shape == (112, 112)
    assert 0.02 < mask.mean() < 0.6
    assert (pixels[mask][:, 0] > 120).all()
    eroded_outside = ~mask & ~np.roll(mask, 3, 0) & ~np.roll(mask, -3, 0)
    eroded_outside &= ~np.roll(mask, 3, 1) & ~np.roll(mask, -3, 1)
    assert (pixels[eroded_outside][:, 2] > 120).all()


def test_only_photographs_count_as_stamps(tmp_path: Path) -> None:
    drawing = np.zeros((100, 100, 4), dtype=np.uint8)
    drawing[20:80, 20:80] = (10, 200, 30, 255)
    photo = drawing.copy()
    photo[20:80, 20:80, :3] = np.random.default_rng(0).integers(0, 256, (60, 60, 3))
    opaque = photo.copy()
    opaque[..., 3] = 255
    for name, rgba in (("drawing", drawing), ("photo", photo), ("opaque", opaque)):
        (tmp_path / "animals").mkdir(exist_ok=True)
        Image.fromarray(rgba).save(tmp_path / "animals" / f"{name}.png")
    found = stamps.find(tmp_path, 5, random.Random(0))
    assert [path.stem for path in found] == ["photo"]


def test_debian_folder_is_found_through_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, name in enumerate(photos._OPENCV_PHOTOS[:8]):
        picture((tmp_path / photos.OPENCV / name).with_suffix(Path(name).suffix), index)
    monkeypatch.setenv(photos.DATA_FOLDER_VARIABLE, str(tmp_path))
    mine = [p for p in photos.pool() if p.path.is_relative_to(tmp_path)]
    assert len(mine) == 8
    assert "opencv-doc" not in debian.missing(tmp_path)


def test_fetching_says_why_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "missing", lambda folder: ["opencv-doc"])
    monkeypatch.setattr(debian.shutil, "which", lambda tool: None)
    with pytest.raises(DataError, match="apt-get was not found"):
        debian.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_archive_members_outside_the_folder_are_ignored() -> None:
    assert debian._is_wanted("usr/share/x/a.png", "usr/share/x")
    for name in ("usr/share/x/../../../etc/a.png", "usr/share/xy/a.png", "usr/share/x/a.ogg"):
        assert not debian._is_wanted(name, "usr/share/x")


# Fidelity and timing -----------------------------------------------------------------------------


def test_fidelity_of_equal_models_is_one() -> None:
    tokens, maps = torch.randn(3, 5, 8), torch.rand(3, 1, 4, 4)
    found = fidelity.compare(tokens, tokens, (maps, maps), num_prefix=1)
    assert found.cosine == pytest.approx(1)
    assert found.prefix_cosine == pytest.approx(1)
    assert (found.iou, found.mae, found.empty, found.images) == (1, 0, 0, 3)


def test_fidelity_by_hand() -> None:
    first, second = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    first[0, 0, 0] = 0.9  # two pixels; the second image is empty in both
    second[0, 0, :, 0] = 0.9
    found = fidelity.compare(torch.ones(2, 1, 3), -torch.ones(2, 1, 3), (first, second))
    assert found.iou == pytest.approx(1 / 3)
    assert found.mae == pytest.approx(0.9 * 2 / 8)
    assert found.empty == 1
    assert found.cosine == pytest.approx(-1)
    assert found.prefix_cosine is None
    mask = torch.tensor([[True, True], [False, False]])
    assert fidelity.mask_iou(first, [mask, None]) == 1
    assert fidelity.mask_iou(first, [None, None]) is None


def test_fidelity_of_different_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(2, 3, 4\) and \(1, 3, 4\)"):
        fidelity.compare(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(DataError, match="at least one image"):
        fidelity.compare(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4))


def test_interleaved_timing_orders_models() -> None:
    calls = {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}
    found = interleaved(calls, rounds=6)
    assert found["fast"].median_ms < found["slow"].median_ms
    assert found["slow"].p20_ms <= found["slow"].median_ms <= found["slow"].p80_ms
    assert found["slow"].rounds == 6
    assert interleaved(calls, rounds=9, budget_s=0)["fast"].rounds == 5


def test_removed_attention_adds_nothing() -> None:
    tokens = torch.randn(1, 3, 4)
    assert torch.equal(RemovedAttention(False)(tokens, attn_mask=None), torch.zeros(1, 3, 4))
    output, weights = RemovedAttention(True)(tokens)
    assert (output.shape, weights) == (tokens.shape, None)


def test_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), cpu_threads(1):
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_small_things() -> None:
    assert compact([11, 0, 1, 2]) == "0-2, 11"
    assert compact([]) == ""
    assert "torch" in machine.environment(1)
    assert pictures._outline(np.ones((4, 4), dtype=bool)).sum() == 0


# The real model ----------------------------------------------------------------------------------


def _require_model() -> None:
    pytest.importorskip("onnx")
    try:
        pretrained.onnx_path()
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.model
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_model_equals_the_wheels_own_onnx(library: pretrained.Library) -> None:
    _require_model()
    pytest.importorskip(library)
    runtime = pytest.importorskip("onnxruntime")
    model = pretrained.build(library)
    pixels, _ = photos.load(photos.pool()[:3])
    with torch.inference_mode():
        got = model(pixels).numpy()
    session = runtime.InferenceSession(
        str(pretrained.onnx_path()), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {"input_image": pixels.numpy()})[0]
    assert expected.max() > 0.9  # the photos do show something salient
    assert np.abs(got - expected).max() < 2e-5


@pytest.mark.model
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_ceiling_is_the_model_without_those_layers(library: pretrained.Library) -> None:
    _require_model()
    pytest.importorskip(library)
    from dwattn.adapters import describe
    from dwattn.demo.speed import without_attention

    model = pretrained.build(library)
    bare = without_attention(model, [3])
    seen: list[torch.Tensor] = []
    for whole in (model, bare):
        block = describe(whole).blocks[3].module
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        norm = block.norm2
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.inference_mode():
            whole.tokens(torch.zeros(1, 3, 224, 224))
    before, after, bare_before, bare_after = seen
    assert torch.equal(before, bare_before)
    assert not torch.allclose(before, after)
    assert torch.equal(bare_before, bare_after)  # the residual stream passes unchanged


@pytest.mark.model
def test_names_of_all_libraries_hold_the_same_weights() -> None:
    _require_model()
    old, hub, timm = (pretrained.state_dict(name) for name in ("transformers4", "hub", "timm"))
    assert set(hub) - set(timm) == {"mask_token"}
    assert sum(t.numel() for t in old.values()) == sum(t.numel() for t in hub.values())
    query = old["encoder.layer.7.attention.attention.query.weight"]
    assert torch.equal(hub["blocks.7.attn.qkv.weight"][:384], query)
    assert hub["pos_embed"].shape == (1, 257, 384)


@pytest.mark.model
def test_another_onnx_file_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(DataError, match="not the saliency ViT"):
        pretrained.load_graph(path)


def test_unknown_library_is_refused() -> None:
    with pytest.raises(DataError, match="keras"):
        pretrained.build("keras")  # type: ignore[arg-type]
