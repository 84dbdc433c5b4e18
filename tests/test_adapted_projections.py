"""Projections that something was put in the place of: LoRA adapters, quantised layers, parametrised weights, hooks.

Tools that adapt a model swap its linear layers. A replaced layer has to call what it finds, or say
that it cannot; using the old weights silently would drop the adapter.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import dwattn
from dwattn.adapters import ConvertedAttention
from dwattn.attention import (
    ConvAttention,
    EnsembleDWAttention,
    FusedDWAttention,
    LowRankDWAttention,
    SPViTAttention,
)
from dwattn.errors import CheckpointError, PlanError, UnsupportedAttentionError
from dwattn.scattered import ScatteredDWAttention
from support.models import timm_vit

GRID = (4, 5)


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank update; ``weight`` is the frozen one, as in adapter libraries."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, rank))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + x @ self.down.T @ self.up.T
        return out

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            linear.weight += self.up @ self.down
        return linear


def adapt(module: nn.Module, names: list[str]) -> tuple[nn.Module, nn.Module]:
    """The module with adapters at ``names``, and with the same adapters merged into the weights."""
    adapted, merged = copy.deepcopy(module), copy.deepcopy(module)
    for name in names:
        base = adapted.get_submodule(name)
        assert isinstance(base, nn.Linear)
        lora = LoRA(base)
        adapted.set_submodule(name, lora)
        merged.set_submodule(name, lora.merged())
    return adapted, merged


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dw": (FusedDWAttention, {"num_prefix": 2}),
    "dw without prefix": (FusedDWAttention, {}),
    "dw static": (FusedDWAttention, {"num_prefix": 2, "prefix": "static"}),
    "dw own": (FusedDWAttention, {"num_prefix": 1, "own_prefix_value": True, "own_prefix_proj": True}),
    "lowrank_dw": (LowRankDWAttention, {"num_prefix": 2, "rank": 16}),
    "scattered": (ScatteredDWAttention, {"num_prefix": 2, "heads": [0, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_adapted_projection_is_called(name: str) -> None:
    cls, options = LAYERS[name]
    module = filled(cls(48, num_heads=3, grid=GRID, **options))
    x = torch.randn(2, 20 + options.get("num_prefix", 0), 48)
    linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    for names in [*([one] for one in linears), linears]:
        adapted, merged = adapt(module, names)
        with torch.no_grad():
            expected = merged(x)
            assert (expected - module(x)).abs().max() > 1e-2, names
            torch.testing.assert_close(adapted(x), expected, atol=2e-4, rtol=1e-4, msg=str(names))
        adapted(x).sum().backward()
        for child in names:
            down = adapted.get_submodule(child).down
            assert down.grad is not None, child


def test_parametrised_pruned_and_hooked_values() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module = filled(FusedDWAttention(48, num_heads=3, grid=GRID, num_prefix=1))
    x = torch.randn(2, 21, 48)
    halved, expected = copy.deepcopy(module), copy.deepcopy(module)
    parametrize.register_parametrization(halved.value, "weight", Halved())
    with torch.no_grad():
        expected.value.weight /= 2
        torch.testing.assert_close(halved(x), expected(x), atol=1e-4, rtol=1e-4)

    pruned = copy.deepcopy(module)
    prune.l1_unstructured(pruned.value, "weight", amount=0.5)
    with torch.no_grad():
        masked = pruned(x)
        prune.remove(pruned.value, "weight")  # the masked weight becomes an ordinary one
        torch.testing.assert_close(masked, pruned(x), atol=1e-4, rtol=1e-4)

    calls: list[int] = []
    module.value.register_forward_hook(lambda *_: calls.append(1))
    module(x)
    assert calls == [1]


def hook_value(value: nn.Module, kind: str, called: Any) -> Any:
    """Lets ``called(module)`` hear of every call of ``value``; returns a handle or None."""
    if kind == "forward of its own":
        forward = value.forward
        value.forward = lambda x: (called(value), forward(x))[1]
        return None
    owner = nn.modules.module if kind.startswith("module") else value
    return getattr(owner, f"register_{kind}_hook")(lambda module, *_: called(module))


@pytest.mark.parametrize("cls", [FusedDWAttention, LowRankDWAttention])
@pytest.mark.parametrize(
    "kind",
    ["forward", "forward_pre", "full_backward", "full_backward_pre", "module_forward",
     "module_full_backward", "forward of its own"],
)  # fmt: skip
def test_every_kind_of_hook_is_called(kind: str, cls: type[nn.Module]) -> None:
    options = {"rank": 16} if cls is LowRankDWAttention else {}
    module = filled(cls(48, num_heads=3, grid=GRID, num_prefix=1, **options))
    x = torch.randn(2, 21, 48, requires_grad=True)
    expected = module(x)
    calls: list[nn.Module] = []
    handle = hook_value(module.value, kind, calls.append)
    try:
        out = module(x)
        out.sum().backward()
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert module.value in calls


@pytest.mark.parametrize("name", [*LAYERS, "conv", "ens_dw", "spvit"])
def test_weights_that_accelerate_keeps_elsewhere(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    folding = {"conv": ConvAttention, "ens_dw": EnsembleDWAttention, "spvit": SPViTAttention}
    cls, options = LAYERS[name] if name in LAYERS else (folding[name], {"num_prefix": 1})
    module = filled(cls(48, num_heads=3, grid=GRID, **options))
    x = torch.randn(2, 20 + options.get("num_prefix", 0), 48)
    whole = name in folding or "static" in name  # docs/limits.md
    with torch.no_grad():
        expected = module(x)
        accelerate.cpu_offload(
            module, torch.device("cpu"), preload_module_classes=[cls.__name__] if whole else None
        )
        assert module.value.weight.is_meta
        torch.testing.assert_close(module(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_quantisation(name: str) -> None:
    cls, options = LAYERS[name]
    module = filled(cls(48, num_heads=3, grid=GRID, **options))
    x = torch.randn(2, 20 + options.get("num_prefix", 0), 48)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
        expected, out = module(x), small(x)
    error = ((out - expected).norm() / expected.norm()).item()
    assert 0 < error < 0.05


@pytest.mark.parametrize("cls", [ConvAttention, EnsembleDWAttention, SPViTAttention])
def test_variants_that_fold_weights_refuse(cls: type[nn.Module]) -> None:
    module = filled(cls(48, num_heads=3, grid=GRID, num_prefix=1))
    adapted, merged = adapt(module, ["value"])
    x = torch.randn(1, 21, 48)
    merged(x)
    with pytest.raises(UnsupportedAttentionError, match=r"LoRA.*merge"):
        adapted(x)


def test_saving_and_exporting_an_adapter_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = timm_vit()
    images = torch.randn(6, 3, *model.patch_embed.img_size)
    plan = dwattn.select(dwattn.score(model, images, num_images=6), blocks=1)
    dwattn.replace(model, plan)
    name = next(n for n, m in model.named_modules() if isinstance(m, FusedDWAttention))
    before = model(images)
    model.set_submodule(f"{name}.value", LoRA(model.get_submodule(f"{name}.value")))
    assert (model(images) - before).abs().max() > 1e-3
    for call in (
        lambda: dwattn.save(model, tmp_path / "model.safetensors"),
        lambda: dwattn.export(model, tmp_path / "model.onnx", size=model.patch_embed.img_size),
    ):
        with pytest.raises(UnsupportedAttentionError, match=r"value.*LoRA.*merge"):
            call()
    assert not list(tmp_path.iterdir())


class Quantised(Tensor):
    """A weight of 8-bit integers and a scale, as quantisation tools make them; few operators take it."""

    values: Tensor
    step: float

    @staticmethod
    def __new__(cls, values: Tensor, step: float) -> Quantised:
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.values, made.step = values, step
        return made

    @classmethod
    def of(cls, weight: Tensor) -> nn.Parameter:
        step = float(weight.abs().max()) / 127
        return nn.Parameter(cls((weight / step).round().to(torch.int8), step), requires_grad=False)

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["values"], self.step

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("detach", "clone", "_to_copy", "alias"):
            return cls(args[0].values, args[0].step)
        if name in ("t", "addmm", "mm", "linear"):
            plain = [a.values * a.step if isinstance(a, cls) else a for a in args]
            return func(*plain)
        raise NotImplementedError(f"{name} of quantised weights")


def quantise(model: nn.Module, part: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and part in name:
            module.weight = Quantised.of(module.weight.detach())


def test_a_model_that_is_quantised_already_is_refused_by_name() -> None:
    model, plan = timm_vit(), dwattn.Plan.for_layers(timm_vit(), [0])
    quantise(model, "attn")
    images = torch.randn(4, 3, 32, 24)
    with pytest.raises(UnsupportedAttentionError, match=r"blocks.0.attn: .*is a Quantised.*first"):
        dwattn.score(model, images, num_images=4, progress=False)
    report = dwattn.replace(model, plan, dry_run=True, allow_stale=True)
    assert "Quantised" in str(report)


@torch.no_grad()
def test_a_converted_model_that_is_quantised_afterwards(tmp_path: Path) -> None:
    model, images = timm_vit(), torch.randn(2, 3, 32, 24)
    expected = model(images)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))
    quantise(model, "attn")
    assert torch.isfinite(model(images)).all()
    for call in (
        lambda: dwattn.save(model, tmp_path / "model.safetensors"),
        lambda: dwattn.export(model, tmp_path / "model.onnx", size=model.patch_embed.img_size),
    ):
        with pytest.raises(UnsupportedAttentionError, match=r"value needs.*but Quantised was put"):
            call()
    dwattn.restore(model)
    torch.testing.assert_close(model(images), expected, rtol=0.1, atol=0.1)


def test_restoring_after_dynamic_quantisation() -> None:
    model, images = timm_vit(), torch.randn(2, 3, 32, 24)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    attention = dwattn.restore(small).blocks[0].attn
    assert torch.equal(attention.qkv.weight, dwattn.restore(model).blocks[0].attn.qkv.weight)
    assert torch.isfinite(small(images)).all()


def test_multilayer_perceptrons_whose_weights_are_computed_are_left_as_they_are(
    tmp_path: Path,
) -> None:
    model, images = timm_vit(depth=2), torch.randn(12, 3, 32, 24)
    plan = dwattn.Plan.for_layers(model, [0])
    parametrize.register_parametrization(model.blocks[0].mlp.fc2, "weight", nn.Identity())
    model.blocks[1].mlp.fc2.weight = Quantised.of(model.blocks[1].mlp.fc2.weight.detach())
    report = dwattn.replace(model, plan, calibrate=images, refit="all", progress=False)
    corrected = {note.name for note in report.calibration.notes if note.kind == "mlp output"}
    assert corrected.isdisjoint({"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"})
    assert torch.isfinite(model(images)).all()
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc2.weight' is a Quantised"):
        dwattn.save(model, tmp_path / "model.safetensors")


COMPUTED = {
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.3),
    "weight norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_layers_whose_weights_are_computed_at_each_call_are_calibrated(kind: str) -> None:
    """Calibration makes of them what it makes of the same layers with these weights as plain ones."""
    images, models = torch.randn(12, 3, 32, 24), (timm_vit(depth=2), timm_vit(depth=2))
    linears = [m.blocks[0].attn.qkv for m in models] + [m.blocks[0].mlp.fc1 for m in models]
    for linear in linears:
        COMPUTED[kind](linear)
    with torch.no_grad():
        models[0](images)
    for linear in (linears[1], linears[3]):
        prune.remove(linear, "weight") if kind == "pruned" else nn.utils.remove_weight_norm(linear)
    plans = [dwattn.Plan.for_layers(model, [0]) for model in models]
    for model, plan in zip(models, plans, strict=True):
        dwattn.replace(model, plan, calibrate=images, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(models[0](images), models[1](images), atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for model in models for p in model.parameters())
    layer = dwattn.restore(models[0]).blocks[0].attn.qkv
    assert "weight" not in dict(layer.named_parameters())
    models[0](images).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@torch.no_grad()
def test_what_calibration_corrected_must_be_there_to_be_restored() -> None:
    model, images = timm_vit(depth=2), torch.randn(12, 3, 32, 24)
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]), calibrate=images, progress=False)
    quantise(model, "mlp")
    with pytest.raises(PlanError, match=r"changed blocks.0.mlp.fc2.weight, which is a Quantised"):
        dwattn.restore(model)
    assert isinstance(model.blocks[0].attn, ConvertedAttention)
