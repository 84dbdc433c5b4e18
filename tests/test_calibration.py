"""Closed-form calibration of whole models, among them such whose best replacement is known exactly."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwattn
from dwattn.adapters import adapter_for, describe
from dwattn.calibration.journal import CalibrationResult, LayerNote
from dwattn.calibration.layer_fit import true_rows
from dwattn.calibration.streams import BlockRunner, embed
from dwattn.calibration.views import PhotoViews
from dwattn.data import Batch
from dwattn.errors import CalibrationError, DataError, DwattnError
from dwattn.plan import Plan
from support.models import BY_NAME

timm = pytest.importorskip("timm")


def tiny_vit(seed: int = 0, **options: Any) -> nn.Module:
    """3 blocks, 2 heads of 8 channels, a 4 x 6 grid; attention that varies clearly with the image."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "img_size": (16, 24),
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 0,
        "init_values": 0.5,
    }
    model = timm.models.vision_transformer.VisionTransformer(**{**settings, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.3)
    return model


def make_static(model: nn.Module, block: int) -> None:
    """Zero queries: every token attends evenly to all tokens, which kappa, mu and the kernel can express."""
    attention = model.blocks[block].attn
    with torch.no_grad():
        attention.qkv.weight[: attention.attn_dim] = 0
        if attention.qkv.bias is not None:
            attention.qkv.bias[: attention.attn_dim] = 0


def images(count: int = 24, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_features(x)


def replace(model: nn.Module, blocks: list[int], **options: Any) -> Any:
    plan = Plan.for_layers(model, blocks)
    return dwattn.replace(model, plan, progress=False, **{"calibrate": images(), **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 4},
        {"class_token": False, "global_pool": "avg"},
        {"qkv_bias": False, "proj_bias": False},
    ],
    ids=["cls", "registers", "no prefix", "no bias"],
)
@pytest.mark.parametrize("variant", ["dw", "lowrank_dw", "conv"])
def test_static_attention_is_replaced_exactly(variant: str, options: dict[str, Any]) -> None:
    model = tiny_vit(**options)
    make_static(model, 1)
    before = tokens(model, images(4))
    rank = {"rank": 1.0} if variant == "lowrank_dw" else {}
    replace(model, [1], variant=variant, refit="none", **rank)
    after = tokens(model, images(4))
    assert (after - before).norm() / before.norm() < 2e-2


def test_static_prefix_rows_are_fitted() -> None:
    model = tiny_vit(reg_tokens=2)
    make_static(model, 1)
    before = tokens(model, images(4))
    replace(model, [1], prefix="static", refit="none")
    after = tokens(model, images(4))
    assert (after - before)[:, :3].norm() / before[:, :3].norm() < 5e-2


def test_scattered_heads_are_fitted() -> None:
    model = tiny_vit()
    make_static(model, 1)
    before = tokens(model, images(4))
    plan = Plan.for_layers(model, [1], heads=[[0]])
    dwattn.replace(model, plan, calibrate=images(), refit="none", progress=False)
    after = tokens(model, images(4))
    assert (after - before).norm() / before.norm() < 2e-2


def drift(model: nn.Module, original: nn.Module) -> float:
    held_out = torch.randn(16, 3, 16, 24, generator=torch.Generator().manual_seed(9))
    a, b = tokens(model, held_out)[:, 1:], tokens(original, held_out)[:, 1:]
    return float((a - b).norm() / b.norm())


def test_each_stage_brings_the_model_closer() -> None:
    original = tiny_vit()
    reached = {}
    for name, options in {
        "gaussian": {"calibrate": None, "kernel_init": "gaussian"},
        "stencil": {"refit": "none"},
        "attention": {"refit": "attention"},
        "all": {"refit": "all"},
    }.items():
        model = copy.deepcopy(original)
        replace(model, [0, 1], **{"calibrate": images(96), **options})
        reached[name] = drift(model, original)
    assert reached["stencil"] < 0.8 * reached["gaussian"]
    assert reached["attention"] < reached["stencil"]
    assert reached["all"] <= reached["attention"] * 1.02


def test_low_rank_improves_with_rank_and_meets_fidelity() -> None:
    original = tiny_vit()
    errors = []
    for rank in (4, 8, 16):
        model = copy.deepcopy(original)
        replace(model, [1], variant="lowrank_dw", rank=rank, refit="none")
        errors.append(drift(model, original))
    assert errors[0] > errors[1] > errors[2] * 0.999
    model = copy.deepcopy(original)
    replace(model, [0, 1], variant="lowrank_dw", rank={"fidelity": 0.5}, calibrate=images())
    ranks = [model.blocks[i].attn.layer.inner_dim for i in (0, 1)]
    assert all(rank % 8 == 0 and rank < 16 for rank in ranks)


def test_error_compensation_repairs_earlier_blocks() -> None:
    """The fit of a later block must aim at the original's residual stream, not at its own input's attention."""
    original = tiny_vit()
    model = copy.deepcopy(original)
    report = replace(model, [0, 2], calibrate=images(96))
    notes = {(note.name, note.kind): note for note in report.calibration.notes}
    assert notes["blocks.2.attn", "output"].residual < 1
    assert ("blocks.1.attn.proj", "attention output") in notes
    assert report.calibration.drift["blocks.2"] < 1


def test_prefix_rows_stay_exact_when_wo_is_refitted() -> None:
    original = tiny_vit()
    model = copy.deepcopy(original)
    replace(model, [0], refit="attention")
    x = torch.randn(2, 25, 16)
    with torch.no_grad():
        expected, got = original.blocks[0].attn(x)[:, :1], model.blocks[0].attn(x)[:, :1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        model.blocks[0].attn.layer.proj.weight, original.blocks[0].attn.proj.weight
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_calibration_leaves_the_model(failure: type[BaseException]) -> None:
    model = tiny_vit()
    model.blocks[0].train()
    before, modules = state(model), dict(model.named_modules())

    def broken() -> Any:
        yield images(4)
        raise failure("stopped")

    with pytest.raises(failure):
        replace(model, [1], calibrate=broken())
    assert same(state(model), before)
    assert dict(model.named_modules()) == modules
    assert model.blocks[0].training
    assert not model.blocks[1].training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("name", "block"), [("mlp.fc2", 1), ("attn.proj", 2)])
def test_weights_that_blocks_share_are_left_alone(name: str, block: int) -> None:
    """With the second block replaced, this layer is corrected, unless the first block holds its weights too."""
    corrected = []
    for shared in (False, True):
        model = tiny_vit()
        first, later = (model.blocks[i].get_submodule(name) for i in (0, block))
        first.load_state_dict(later.state_dict())
        if shared:
            first.weight, first.bias = later.weight, later.bias
        before = state(first)
        found = replace(model, [1], calibrate=images(64)).calibration
        assert same(state(first), before)
        corrected.append(f"blocks.{block}.{name}.weight" in found.updates)
    assert corrected == [True, False]


def test_restore_undoes_the_refit_of_other_layers() -> None:
    model = tiny_vit()
    before = state(model)
    report = replace(model, [0])
    assert report.calibration.updates, "the MLP behind the replaced layer should be corrected"
    assert not same(state(model), before)
    dwattn.restore(model)
    assert same(state(model), before)


def test_diagnostics_are_json_also_where_nothing_was_corrected() -> None:
    result = CalibrationResult()
    result.notes = [LayerNote("blocks.0.mlp.fc2", "mlp output", math.nan, strength=math.inf)]
    (layer,) = json.loads(json.dumps(result.to_dict(), allow_nan=False))["layers"]
    assert (layer["residual"], layer["strength"]) == (None, None)


def test_a_second_calibration_may_start_in_front_of_the_first_and_end_behind_it() -> None:
    model, original = tiny_vit(), tiny_vit()
    replace(model, [1])
    report = replace(model, [0, 2])
    assert report.replaced == ["blocks.0.attn", "blocks.2.attn"]
    assert drift(model, original) < 1


def test_half_precision_models_are_fitted_in_fp32() -> None:
    model = tiny_vit().to(torch.bfloat16)
    replace(model, [0, 1], calibrate=images().to(torch.bfloat16))
    parameters = list(model.parameters())
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in parameters)


def test_layer_scale_of_zero_is_survived() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].ls1.gamma[:4] = 0
        model.blocks[0].ls2.gamma[:] = 0
    replace(model, [0])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_frames_of_one_colour_are_survived() -> None:
    """The video that calibration gets may begin with a black screen; there too values may lie far from zero."""
    model = tiny_vit()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[-16:] += 100
    replace(model, [0, 1], calibrate=torch.full((16, 3, 16, 24), -2.0), views=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_last_block_and_one_photo() -> None:
    model = tiny_vit()
    report = replace(model, [2], calibrate=images(1))
    assert report.calibration.photos == 1
    assert torch.isfinite(tokens(model, images(2))).all()


def test_views_are_not_counted_as_photos() -> None:
    model = tiny_vit()
    report = replace(model, [1], views=3, num_images=10, batch_size=3)
    assert report.calibration.photos == 10
    assert report.calibration.to_dict()["photos"] == 10


def test_rounds_of_views_keep_a_photo_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[bool] = []
    views_of = PhotoViews.of

    def noting(self: PhotoViews, batch: Batch, held_out: Tensor) -> Any:
        sides.extend(held_out.tolist())
        return views_of(self, batch, held_out)

    monkeypatch.setattr(PhotoViews, "of", noting)
    report = replace(tiny_vit(), [1], calibrate=images(30), photos=10, views=1, batch_size=7)
    assert sides == [photo % 4 == 3 for photo in range(10)] * 3
    assert report.calibration.photos == 10


def test_views_do_not_depend_on_batches() -> None:
    x, held_out = images(6), torch.tensor([False, False, False, True, False, False])
    whole = [view.pixels for view in PhotoViews(4, seed=1).of(Batch(x, 6, x), held_out)]
    views = PhotoViews(4, seed=1)
    halves = [
        [view.pixels for view in views.of(Batch(part, 3, part), held_out[3 * i : 3 * i + 3])]
        for i, part in enumerate(x.split(3))
    ]
    for k, view in enumerate(whole):
        assert view is not None
        torch.testing.assert_close(view, torch.cat([half[k] for half in halves]))  # type: ignore[list-item]
        assert view.shape == x.shape
        assert torch.equal(view, x) == (k == 0)


def test_mosaics_never_mix_held_out_photos_with_fitted_ones() -> None:
    held_out = torch.arange(12) % 3 == 0
    x = torch.where(held_out, 1.0, 0.0)[:, None, None, None].expand(12, 3, 28, 28).clone()
    x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for view in list(PhotoViews(4, seed=0).of(Batch(x, 12, x), held_out))[2:]:
        assert view.pixels is not None
        # A mosaic of photos of one side has no step between its parts.
        assert view.pixels.std((1, 2, 3)).max() < 0.05


def test_mosaics_show_other_photos() -> None:
    x = torch.arange(8.0)[:, None, None, None].expand(8, 3, 28, 28).clone()
    *_, mosaic = PhotoViews(3, seed=0).of(Batch(x, 8, x), torch.zeros(8, dtype=torch.bool))
    assert mosaic.pixels is not None
    assert len(mosaic.pixels[7].unique()) > 1


def test_loader_forms_agree() -> None:
    x = images(12)
    outputs = []
    for data in (x, [(part, torch.zeros(len(part))) for part in x.split(4)], list(x.split(4))):
        model = tiny_vit()
        replace(model, [1], calibrate=data, batch_size=4)
        outputs.append(tokens(model, x[:2]))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"calibrate": torch.zeros(0, 3, 16, 24)}, DataError, "image"),
        ({"calibrate": torch.full((4, 3, 16, 24), float("nan"))}, DataError, "NaN"),
        ({"refit": "everything"}, CalibrationError, "everything"),
        ({"held_out": 1.5}, CalibrationError, "1.5"),
        ({"held_out": 0.75}, CalibrationError, "0.75.*0.5"),
        ({"held_out": "a"}, CalibrationError, "held_out='a' must be"),
        ({"batch_size": 2.0}, CalibrationError, "batch_size=2.0 must be a whole"),
        ({"views": None}, CalibrationError, "views=None must be a whole"),
        ({"amp": "fp8"}, CalibrationError, "no, bf16, fp16"),
        ({"epochs": 3}, DwattnError, "no argument epochs="),
        ({"photos": 0, "views": 1}, CalibrationError, "photos=0"),
        ({"photos": 8, "views": 3}, CalibrationError, "views=3 must be 1"),
        ({"variant": "spvit"}, CalibrationError, "spvit"),
        ({"calibrate": torch.randn(4, 3, 24, 16)}, DwattnError, "grid"),
        ({"variant": "lowrank_dw", "rank": {"fidelity": 2.0}}, DwattnError, "2.0"),
        ({"variant": "lowrank_dw", "rank": {"fidelity": "a"}}, DwattnError, "fidelity='a'"),
    ],
)
def test_bad_input_is_refused_and_the_model_stays(
    options: dict[str, Any], error: Any, words: str
) -> None:
    model = tiny_vit()
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(error, match=words):
        replace(model, [1], **options)
    assert same(state(model), before)
    assert dict(model.named_modules()) == modules


def test_calibration_is_deterministic() -> None:
    first, second = tiny_vit(), tiny_vit()
    replace(first, [0, 1])
    replace(second, [0, 1])
    assert same(state(first), state(second))


def test_post_norm_blocks_get_kernels_but_no_compensation() -> None:
    model = tiny_vit(block_fn=timm.models.vision_transformer.ResPostBlock, init_values=1.0)
    assert not describe(model).blocks[0].pre_norm
    report = replace(model, [1])
    assert {note.kind for note in report.calibration.notes} == {"stencil"}


def test_true_rows_match_the_layer() -> None:
    model = tiny_vit(qk_norm=True)
    attention = model.blocks[0].attn
    adapter = adapter_for(attention)
    assert adapter is not None
    x = torch.randn(2, 25, 16)
    with torch.no_grad():
        rows = true_rows(adapter.weights(attention), x)
        torch.testing.assert_close(
            F.linear(rows, attention.proj.weight, attention.proj.bias), attention(x)
        )


@pytest.mark.parametrize("name", ["timm", "hf-dinov2", "hf-vit", "hf-clip", "hub"])
def test_a_block_goes_on_behind_a_known_attention(name: str) -> None:
    family = BY_NAME[name]
    model = family.build().eval()
    layout = describe(model)
    site = layout.blocks[0]
    adapter = adapter_for(site.attention)
    assert adapter is not None
    convention = adapter.convention(site.attention)
    with torch.no_grad():
        images = family.images(3)
        tokens, call = embed(model, layout, lambda model: family.tokens(model, images))
        runner = BlockRunner(site, call)
        whole = runner(tokens)
        attention = runner.attend(tokens, convention.unpack)
        given, _ = runner.after_attention(tokens, attention, convention)
        other, _ = runner.after_attention(tokens, attention + 1, convention)
        again = runner(tokens)
    torch.testing.assert_close(given, whole)
    assert not torch.allclose(other, whole, atol=1e-3)
    torch.testing.assert_close(again, whole)


def test_how_many_images_move_together_does_not_matter() -> None:
    found = []
    for batch_size in (None, 1, 5):
        model = tiny_vit()
        replace(model, [1], batch_size=batch_size)
        found.append(tokens(model, images()))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], found[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["dw", "lowrank_dw"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_blocks_compute_in_half_precision_and_what_is_fitted_does_not(
    variant: str, amp: str
) -> None:
    original, data = tiny_vit(), images(96)
    computed = []
    hooked = copy.deepcopy(original)
    for block in hooked.blocks:  # deep copies, as calibration makes them, keep the hook
        block.mlp.fc2.register_forward_hook(lambda _, __, y: computed.append(y.dtype))
    replace(hooked, [0, 1], variant=variant, calibrate=data, amp=amp)
    plain = copy.deepcopy(original)
    replace(plain, [0, 1], variant=variant, calibrate=data)
    assert set(computed) == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert {p.dtype for p in hooked.parameters()} == {torch.float32}
    assert drift(hooked, original) < 1.05 * drift(plain, original)
    assert not all(map(torch.equal, hooked.parameters(), plain.parameters()))


@pytest.mark.parametrize("name", ["timm-dinov3", "hf-clip", "hub-reg4"])
def test_half_precision_fits_every_library_alike(name: str) -> None:
    family = BY_NAME[name]
    with torch.no_grad():
        before = family.tokens(family.build().eval(), family.images())
    left = {}
    for amp in ("no", "bf16"):
        model = family.build().eval()
        replace(model, [0], calibrate=family.images(24, seed=1), views=1, amp=amp)
        with torch.no_grad():
            left[amp] = (family.tokens(model, family.images()) - before).norm()
    torch.testing.assert_close(left["bf16"], left["no"], rtol=0.02, atol=0)
    assert left["bf16"] != left["no"]


def test_values_beyond_fp16_are_named() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.fill_(1e5)
    with pytest.raises(CalibrationError, match=r"too large for fp16\. Use amp='bf16' or 'no'"):
        replace(model, [1], amp="fp16")
    assert replace(model, [1], amp="bf16").calibration is not None


def test_autocast_around_the_call_changes_nothing() -> None:
    found = []
    for enabled in (False, True):
        model = tiny_vit()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            replace(model, [1])
        found.append(tokens(model, images()))
    assert torch.equal(*found)
