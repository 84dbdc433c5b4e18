"""PyTorch's own attention module: what it must be like, how it may be called, and that it is corrected too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwattn
from dwattn import adapters
from dwattn.adapters import describe
from dwattn.errors import PlanError, UnsupportedAttentionError
from dwattn.latency import measure_latency
from support import open_clip_vit
from support.more_families import open_clip, torchvision_vit


def test_attention_that_does_more_or_takes_other_tokens_is_refused() -> None:
    reasons = {
        "batch_first=False": nn.MultiheadAttention(16, 2),
        "another width": nn.MultiheadAttention(16, 2, kdim=8, batch_first=True),
        "a key of its own": nn.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True),
        "add_zero_attn": nn.MultiheadAttention(16, 2, add_zero_attn=True, batch_first=True),
    }
    for words, attention in reasons.items():
        reason = adapters.refusal(attention)
        assert reason is not None
        assert words in reason
    assert adapters.refusal(nn.MultiheadAttention(16, 2, bias=False, batch_first=True)) is None


def test_blocks_with_additions_and_tokens_in_another_order_are_refused() -> None:
    with pytest.raises(UnsupportedAttentionError, match="is a CustomResidualAttentionBlock"):
        describe(open_clip(block=open_clip_vit.CustomResidualAttentionBlock))
    model = open_clip(batch_first=False)
    with pytest.raises(PlanError, match="batch_first=False"):
        dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))


def test_calls_that_no_replaced_layer_can_answer() -> None:
    model = torchvision_vit()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0]))
    shim: Any = model.get_submodule("encoder.layers.encoder_layer_0.self_attention")
    x, y = torch.randn(1, 17, 48), torch.randn(1, 17, 48)
    output, weights = shim(x, x, x, need_weights=False)
    assert output.shape == x.shape
    assert weights is None
    assert torch.equal(shim(query=x, key=x, value=x, need_weights=False)[0], output)
    assert torch.equal(shim(x, x, x, None, False)[0], output)
    mask = torch.zeros(17, 17)
    for args, kwargs, words in (
        ((x, y, y), {"need_weights": False}, "other keys or values"),
        ((x, x, x), {}, "need_weights=True"),
        ((x, x, x, None, False, None, True, True), {}, "is_causal"),
        ((x, x, x), {"need_weights": False, "attn_mask": mask}, "attn_mask"),
        ((x, x, x, mask[:1, :]), {"need_weights": False}, "key_padding_mask"),
    ):
        with pytest.raises(UnsupportedAttentionError, match=words):
            shim(*args, **kwargs)


@pytest.mark.parametrize("build", [torchvision_vit, open_clip])
@torch.no_grad()
def test_attention_that_stays_is_corrected_though_its_projection_is_never_called(
    build: Any,
) -> None:
    """``nn.MultiheadAttention`` multiplies by the weights of ``out_proj`` itself."""
    model = build()
    site = describe(model).blocks[1]
    before = site.attention.out_proj.weight.clone()
    # Images differ in colour, so that there is something to restore.
    images = torch.randn(96, 3, 32, 32 if build is torchvision_vit else 24)
    images += torch.randn(96, 3, 1, 1)
    plan = dwattn.Plan.for_layers(model, [0])
    report = dwattn.replace(model, plan, calibrate=images, variant="ens_dw", progress=False)
    notes = {note.name: note for note in report.calibration.notes}
    note = notes[f"{site.attention_name}.out_proj"]
    assert note.kind == "attention output"
    assert note.residual < 0.95
    assert not torch.equal(site.attention.out_proj.weight, before)
    dwattn.restore(model)
    assert torch.equal(site.attention.out_proj.weight, before)


@pytest.mark.parametrize("build", [torchvision_vit, open_clip])
@torch.no_grad()
def test_compiled_as_one_graph(build: Any) -> None:
    model = build()
    dwattn.replace(model, dwattn.Plan.for_layers(model, [1]))
    images = torch.randn(2, 3, 32, 32 if build is torchvision_vit else 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(("build", "size"), [(torchvision_vit, (32, 32)), (open_clip, (32, 24))])
def test_latency_and_export(build: Any, size: tuple[int, int], tmp_path: Path) -> None:
    model = build()
    table = measure_latency(model, rounds=1)
    assert len(table.layers) == 4
    dwattn.replace(model, dwattn.Plan.for_layers(model, [0, 2]))
    dwattn.export(model, tmp_path / "model.onnx", size=size)
    assert (tmp_path / "model.onnx").stat().st_size > 0
