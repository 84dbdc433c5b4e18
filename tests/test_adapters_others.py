"""Third-party classes, other releases of the libraries, and what an import costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn import adapters, reference
from dwattn.adapters import AttentionAdapter, BackboneAdapter, BackboneLayout, BlockSite, describe
from dwattn.errors import UnsupportedAttentionError
from dwattn.projections import AttentionWeights
from support.models import DINOV3, HF, TIMM, timm_eva, timm_model
from support.more_families import MORE_HF


class ThirdPartyAttention(nn.Module):
    """Separate projections under names of its own, called with channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (reference.split_heads(p(tokens.mT), 2) for p in (self.a, self.b, self.c))
        return self.d(reference.merge_heads(nn.functional.scaled_dot_product_attention(q, k, v))).mT


class ThirdPartyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.stages = nn.ModuleList([ThirdPartyAttention() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2)
        for stage in self.stages:
            tokens = tokens + stage(tokens)
        return tokens


class ChannelsFirst(adapters.CallConvention):
    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return super().tokens(args, kwargs).mT

    def pack(self, output: Tensor) -> Any:
        return output.mT


class ThirdPartyAttentionAdapter(AttentionAdapter):
    name = "third party attention"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is ThirdPartyAttention

    def weights(self, module: Any) -> AttentionWeights:
        a, b, c, d = module.a, module.b, module.c, module.d
        return AttentionWeights(
            2, 8, 8**-0.5, a.weight, b.weight, c.weight, d.weight, a.bias, b.bias, c.bias, d.bias
        )

    def convention(self, module: nn.Module) -> adapters.CallConvention:
        return ChannelsFirst()


class ThirdPartyBackboneAdapter(BackboneAdapter):
    def matches(self, module: nn.Module) -> bool:
        return type(module) is ThirdPartyModel

    def layout(self, name: str, module: Any) -> BackboneLayout:
        prefix = f"{name}." if name else ""
        blocks = tuple(
            BlockSite(f"{prefix}stages.{i}", stage, f"{prefix}stages.{i}", stage, pre_norm=False)
            for i, stage in enumerate(module.stages)
        )
        return BackboneLayout("third party", name, module, blocks, 0, None, (4, 4), module.patches)


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> ThirdPartyModel:
    monkeypatch.setattr(adapters, "_attention_adapters", list(adapters._attention_adapters))
    monkeypatch.setattr(adapters, "_backbone_adapters", list(adapters._backbone_adapters))
    adapters.register(ThirdPartyAttentionAdapter())
    adapters.register(ThirdPartyBackboneAdapter())
    return ThirdPartyModel().eval()


@torch.no_grad()
def test_third_parties_can_register_their_own(third_party: ThirdPartyModel, tmp_path: Path) -> None:
    model, images = third_party, torch.randn(2, 3, 12, 20)
    before = model(images)
    plan = dwattn.Plan.for_layers(model, [0])
    with pytest.raises(UnsupportedAttentionError, match=r"no image size.*grid=.*dynamic_grid=True"):
        dwattn.replace(model, plan)
    dwattn.replace(model, plan, grid=(3, 5))
    after = model(images)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, atol=1e-3)
    dwattn.save(model, tmp_path / "model.safetensors")
    assert torch.equal(dwattn.load(ThirdPartyModel, tmp_path / "model.safetensors")(images), after)
    dwattn.restore(model)
    assert torch.equal(model(images), before)


def test_only_adapters_can_be_registered() -> None:
    with pytest.raises(TypeError, match="AttentionAdapter or BackboneAdapter, got int"):
        adapters.register(3)


def test_without_registration_the_third_party_is_unknown() -> None:
    with pytest.raises(UnsupportedAttentionError, match="ThirdPartyAttention is not known"):
        describe(ThirdPartyModel())


def test_transformers_4_57() -> None:
    """All transformers families once more, in a process with the other release."""
    folder = os.environ.get("DWATTN_TRANSFORMERS_457")
    if not folder or not Path(folder, "transformers").is_dir():
        pytest.skip("set DWATTN_TRANSFORMERS_457 to a folder that holds transformers 4.57")
    tests = Path(__file__).parent
    path = os.pathsep.join([folder, str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "support.transformers_457"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = dict(line.split() for line in done.stdout.splitlines())
    assert set(names) == {family.name for family in HF + MORE_HF} - {"hf-pixio"}  # later than 4.57
    assert names["hf-vit"] == "encoder.layer.0.attention"
    assert names["hf-clip"] == "vision_model.encoder.layers.0.self_attn"


def test_importing_dwattn_imports_no_model_library() -> None:
    code = (
        "import dwattn, dwattn.adapters, sys; dwattn.replace; dwattn.load; "
        "print([m for m in ('timm', 'transformers', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    light = subprocess.run(
        [sys.executable, "-c", "import dwattn, sys; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert light.stdout.strip() == "False"


def test_public_names() -> None:
    for name in dwattn.__all__:
        assert getattr(dwattn, name) is not None
    import importlib

    importlib.import_module("dwattn.export")
    assert callable(dwattn.export), "importing the submodule must not hide the function of its name"
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        dwattn.bogus  # noqa: B018


def test_timm_families_are_real() -> None:
    """The tiny models are built by the classes that timm's own names build."""
    model = timm_model("vit_small_patch14_reg4_dinov2.lvd142m", img_size=(28, 42), embed_dim=48, depth=1, num_heads=3)  # fmt: skip
    layout = describe(model)
    assert layout.num_prefix == 5
    assert layout.grid == (2, 3)
    tiny = {cls.__name__ for family in TIMM for cls in type(family.build()).__mro__}
    assert type(model).__name__ in tiny


def test_rotary_families_are_real() -> None:
    model = timm_model("vit_small_patch16_dinov3.lvd1689m", img_size=(32, 48), embed_dim=48, depth=1, num_heads=3)  # fmt: skip
    layout = describe(model)
    assert layout.num_prefix == 5
    assert layout.grid == (2, 3)
    tiny = timm_eva(**DINOV3)
    assert type(tiny.blocks[0].attn) is type(model.blocks[0].attn)
    assert type(tiny.rope) is type(model.rope)
    assert tiny.blocks[0].attn.rotate_half == model.blocks[0].attn.rotate_half
    eva = timm_model("eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=1, num_heads=3)
    assert type(timm_eva().blocks[0].attn) is type(eva.blocks[0].attn)
    # Its MLP is gated, which that of the tiny model is not.
    assert type(eva.blocks[0].mlp).__name__ == "GluMlp"
    assert describe(eva).blocks[0].mlp_out is eva.blocks[0].mlp.fc2
