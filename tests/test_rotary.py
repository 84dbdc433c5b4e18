"""Models with rotary positions (DINOv3, EVA-02): what differs from others once queries and keys are turned."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.adapters import adapter_for, describe
from dwattn.calibration import layer_fit, sweep
from dwattn.errors import ExportError, UnsupportedAttentionError
from dwattn.fidelity import drift
from dwattn.latency import measure_latency
from dwattn.prefix import ExactPrefixRows
from dwattn.rotary import Rotary
from dwattn.scattered import ScatteredDWAttention
from support.models import BY_NAME, DINOV3, hf_dinov3, timm_eva

NAMES = ["timm-dinov3", "timm-eva02", "hf-dinov3", "hub-dinov3"]


def with_key_bias() -> nn.Module:
    """A key bias does not cancel where keys are turned."""
    return timm_eva(**{**DINOV3, "attn_type": "rope", "qkv_bias": True})


BUILDS = {
    **{name: BY_NAME[name].build for name in NAMES},
    "key bias": with_key_bias,
    "fused with biases": timm_eva,
}


def images_for(model: nn.Module, count: int = 2, seed: int = 0) -> Tensor:
    layout = describe(model)
    height, width = (g * p for g, p in zip(layout.grid or (4, 3), layout.patch_size, strict=True))
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Behind the last norm."""
    found: Any = (
        model.forward_features(images) if hasattr(model, "forward_features") else model(images)
    )
    if isinstance(found, dict) and "x_storage_tokens" in found:
        parts = (
            found["x_norm_clstoken"][:, None],
            found["x_storage_tokens"],
            found["x_norm_patchtokens"],
        )
        return torch.cat(parts, 1)
    return found if isinstance(found, Tensor) else found.last_hidden_state


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("prefix", [0, 5])
def test_rotation_is_complex_multiplication(interleaved: bool, prefix: int) -> None:
    t = torch.randn(2, 3, prefix + 7, 8, dtype=torch.float64)
    angle = torch.randn(7, 4, dtype=torch.float64)
    spread = angle.repeat_interleave(2, -1) if interleaved else angle.repeat(1, 2)
    out = Rotary(spread.cos(), spread.sin(), interleaved).rotate(t)
    pairs = t.unflatten(-1, (4, 2)) if interleaved else t.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous())[:, :, prefix:] * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.view_as_real(turned)
    expected = expected.flatten(-2) if interleaved else expected.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(out[:, :, prefix:], expected)
    assert torch.equal(out[:, :, :prefix], t[:, :, :prefix])


def test_rotation_keeps_the_dtype_and_turns_in_the_embedding_s() -> None:
    t = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    angle = torch.randn(3, 2).repeat(1, 2)
    out = Rotary(angle.cos(), angle.sin()).rotate(t)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, Rotary(angle.cos(), angle.sin()).rotate(t.float()).bfloat16())


@pytest.mark.parametrize("shape", [(7, 6), (9, 8), (3, 7, 8)])
def test_other_rotations_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedAttentionError, match=r"of shape .* does not fit .*not\.$"):
        Rotary(torch.ones(shape), torch.zeros(shape)).rotate(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("name", BUILDS)
@torch.no_grad()
def test_prefix_rows_stay_exact(name: str) -> None:
    """With whole layers of every variant and with single heads."""
    model = BUILDS[name]()
    images, layout = images_for(model), describe(model)
    block, prefix = layout.blocks[0], layout.num_prefix
    rows: list[Tensor] = []

    def note(_: nn.Module, __: Any, result: Any) -> None:
        rows.append(result[0] if isinstance(result, tuple) else result)

    handle = block.attention.register_forward_hook(note)
    tokens(model, images)
    handle.remove()
    cases: list[dict[str, Any]] = [{"variant": v} for v in ("dw", "conv", "ens_dw", "spvit")]
    for options in [*cases, {"variant": "lowrank_dw", "rank": 8}, {"heads": [0, 2]}]:
        heads = options.pop("heads", None)
        dwattn.replace(model, dwattn.Plan.for_layers(model, [0], heads=[heads]), **options)
        handle = model.get_submodule(block.attention_name).register_forward_hook(note)
        tokens(model, images)
        handle.remove()
        dwattn.restore(model)
        if heads is None:  # otherwise the kept heads of patches are exact too, and nothing else
            torch.testing.assert_close(
                rows[-1][:, :prefix], rows[0][:, :prefix], rtol=1e-4, atol=1e-5
            )
        assert (rows[-1][:, prefix:] - rows[0][:, prefix:]).abs().max() > 0.05


@pytest.mark.parametrize("name", BUILDS)
@torch.no_grad()
def test_single_heads_keep_turned_attention(name: str) -> None:
    """Value projection and kernel of the replaced head are set to nothing: the rest is the original."""
    model = BUILDS[name]()
    images, site = images_for(model), describe(model).blocks[1]
    dwattn.replace(model, dwattn.Plan.for_layers(model, [1], heads=[[1]]))
    layer = model.get_submodule(site.attention_name).layer
    x = torch.randn(2, describe(model).geometry().num_tokens, 48)
    seen: list[Any] = []
    handle = model.get_submodule(site.attention_name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    tokens(model, images)
    handle.remove()
    shim = model.get_submodule(site.attention_name)
    rotary = shim.convention.rotary(seen[0])
    kept = layer.rows(x, rotary=rotary)[..., : layer.kept_dim]
    adapter = adapter_for(site.attention)
    assert adapter is not None
    weights = adapter.weights(site.attention)
    expected = layer_fit.true_rows(weights, x, rotary)[..., weights.head_rows([0, 2])]
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    assert (layer.rows(x)[..., : layer.kept_dim] - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "lowrank_dw", "rank": 0.5}, {"variant": "lowrank_dw", "rank": {"fidelity": 0.9}}, {"prefix": "static"}, {"variant": "ens_dw"}],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_calibration_brings_the_model_nearer(name: str, options: dict[str, Any]) -> None:
    model = BUILDS[name]()
    layout = describe(model)
    before = tokens(model, images_for(model, 24, seed=1))
    plan = dwattn.Plan.for_layers(model, [0, 2])
    plain = copy.deepcopy(model)
    rank = options.get("rank")
    first = {**options, "rank": 24} if isinstance(rank, dict) else options
    dwattn.replace(plain, plan, kernel_init="gaussian", **first)
    start = drift(before, tokens(plain, images_for(model, 24, seed=1)), layout.num_prefix)
    report = dwattn.replace(
        model, plan, calibrate=images_for(model, 48), views=1, progress=False, **options
    )
    assert report.calibration is not None
    after = drift(before, tokens(model, images_for(model, 24, seed=1)), layout.num_prefix)
    assert after < 0.8 * start


@pytest.mark.parametrize(
    "options", [{"variant": "lowrank_dw", "rank": {"fidelity": 0.9}}, {"heads": [1]}], ids=str
)
@torch.no_grad()
def test_every_step_knows_the_rotation(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever forms queries and keys during calibration and afterwards is given the call's rotation."""
    model, seen = BUILDS["timm-dinov3"](), dict[str, list[bool]]()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        place = list(inspect.signature(original).parameters).index("rotary")

        def watched(*args: Any, **kwargs: Any) -> Any:
            rotary = args[place] if len(args) > place else kwargs.get("rotary")
            seen.setdefault(name, []).append(rotary is not None)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(sweep, "true_rows")
    watch(ExactPrefixRows, "attention")
    watch(ScatteredDWAttention, "rows")
    heads = options.pop("heads", None)
    plan = dwattn.Plan.for_layers(model, [0, 2], heads=[heads, heads])
    dwattn.replace(model, plan, calibrate=images_for(model, 16), views=1, progress=False, **options)
    tokens(model, images_for(model))
    assert set(seen) >= {"true_rows", "attention"} | ({"rows"} if heads else set())
    assert all(all(given) for given in seen.values())


@pytest.mark.parametrize(
    ("variant", "called"),
    [("dw", "value"), ("lowrank_dw", "value"), ("lowrank_dw", "prefix_value")],
)
@torch.no_grad()
def test_projections_that_must_be_called(variant: str, called: str) -> None:
    """A hook, like an adapter, takes the layer to other code."""
    model = BUILDS["timm-dinov3"]()
    images = images_for(model)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]), variant=variant)
    expected = tokens(model, images)
    calls: list[None] = []
    linear = getattr(model.blocks[0].attn.layer, called)
    linear.register_forward_hook(lambda *_: calls.append(None))
    torch.testing.assert_close(tokens(model, images), expected, rtol=1e-4, atol=1e-5)
    assert calls


@torch.no_grad()
def test_other_image_sizes() -> None:
    """transformers' DINOv3 takes images of any size, and so does the converted model."""
    model = hf_dinov3()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0, 3]), dynamic_grid=True)
    for size in ((32, 32), (40, 24), (8, 56)):
        images = torch.randn(1, 3, *size)
        out = tokens(model, images)
        assert out.shape[1] == 5 + size[0] * size[1] // 64
        assert out.isfinite().all()


@torch.no_grad()
def test_compiles_without_graph_breaks() -> None:
    model = BUILDS["timm-dinov3"]()
    images = images_for(model)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0, 2]))
    expected = tokens(model, images)
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_keys_of_prefix_rows(name: str) -> None:
    model = BUILDS[name]()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [1]))
    tokens(model, images_for(model))[:, 0].square().sum().backward()
    layer = model.get_submodule(describe(model).blocks[1].attention_name).layer
    for linear in (layer.prefix_rows.query, layer.prefix_rows.key, layer.value):
        assert linear.weight.grad is not None
        assert linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_latency(name: str) -> None:
    table = measure_latency(BUILDS[name](), rounds=1)
    assert len(table.layers) == 4
    assert all(layer.attention > 0 and layer.replaced > 0 for layer in table.layers.values())


def test_static_prefix_rows_need_no_keys(tmp_path: Path) -> None:
    """The plugin does not turn keys; without exact rows, the layer becomes convolutions even in opset 17."""
    pytest.importorskip("onnxruntime")
    model = BUILDS["timm-dinov3"]()
    plan = dwattn.Plan.for_layers(model, [0])
    dwattn.replace(model, plan)
    with pytest.raises(ExportError, match=r"rotary positions.*prefix='static'.*native"):
        dwattn.export(model, tmp_path / "exact.onnx", size=(32, 24), lowering="function")
    dwattn.restore(model)
    dwattn.replace(model, plan, prefix="static")
    report = dwattn.export(model, tmp_path / "static.onnx", size=(32, 24), lowering="conv2d")
    assert report.parity


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_autocast_and_half_precision(name: str) -> None:
    model = BUILDS[name]()
    images = images_for(model)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0, 2]))
    expected = tokens(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tokens(model, images)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    half = tokens(copy.deepcopy(model).bfloat16(), images.bfloat16())
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
