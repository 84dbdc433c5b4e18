"""The model that is scored: exactly as before, in any wrapping and dtype."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.errors import DataError
from support.models import BY_NAME, timm_vit
from support.scoring import IMAGES, snapshot


def test_the_model_is_exactly_as_before() -> None:
    family = BY_NAME["hf-dinov2-reg"]
    model, images = family.build(), family.images(IMAGES)
    model.train()
    model.layernorm.eval()
    model.encoder.layer[1].attention.requires_grad_(False)
    attention = model.encoder.layer[2].attention
    attention.forward = attention.forward  # an instance attribute of somebody else's
    attention.register_forward_hook(lambda *_: None)
    model(pixel_values=images[:2]).last_hidden_state.sum().backward()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    model_output = copy.deepcopy(model).eval()(pixel_values=images).last_hidden_state
    dwattn.score(model, images, IMAGES, progress=False)
    assert snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(pixel_values=images).last_hidden_state, model_output)


class Stop(BaseException):
    """Like KeyboardInterrupt."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_the_model_is_as_before_after_an_exception(error: type[BaseException]) -> None:
    family = BY_NAME["timm"]
    model, images = family.build().train(), family.images(IMAGES)
    before = snapshot(model)

    def batches() -> Iterator[Tensor]:
        yield images[:2]
        torch.rand(3)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        dwattn.score(model, batches(), IMAGES, progress=True)
    assert snapshot(model) == before


def test_scoring_runs_in_eval_mode_without_gradients_or_noise() -> None:
    model = timm_vit(proj_drop_rate=0.5, drop_path_rate=0.5).train()
    images = BY_NAME["timm"].images(IMAGES)
    seen = []
    model.blocks[1].mlp.register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.requires_grad))
    )
    first = dwattn.score(model, images, IMAGES, progress=False)
    assert set(seen) == {(False, False)}
    assert dwattn.score(model, images, IMAGES, progress=False).sigma_blocks == first.sigma_blocks


def test_the_model_computes_what_it_computes_without_scoring() -> None:
    family = BY_NAME["timm-qk-norm"]
    model, images = family.build(), family.images(IMAGES)
    outputs = []
    handle = model.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    dwattn.score(model, images, IMAGES, batch_size=IMAGES, progress=False)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], model(images), rtol=1e-4, atol=1e-5)


def test_wrapped_models() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(IMAGES)
    plain = dwattn.score(model, images, IMAGES, progress=False)

    class Preprocessing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(x - 0.0)

    inside = dwattn.score(Preprocessing(), images, IMAGES, progress=False)
    assert inside.sigma_blocks == plain.sigma_blocks
    assert inside.layers[0].name == "vit.blocks.0.attn"
    compiled = torch.compile(model, backend="eager")
    assert dwattn.score(compiled, images, IMAGES, progress=False).layers[0].name == "blocks.0.attn"
    assert compiled(images).shape == (IMAGES, 5)
    assert dwattn.score(compiled, images, IMAGES, progress=False).sigma_blocks == plain.sigma_blocks
    parallel = dwattn.score(nn.DataParallel(model), images, IMAGES, progress=False)
    assert parallel.sigma_blocks == plain.sigma_blocks


def test_compiled_blocks() -> None:
    family = BY_NAME["timm"]
    model, images = family.build(), family.images(IMAGES)
    plain = dwattn.score(model, images, IMAGES, progress=False)
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        before = model(images)
        again = dwattn.score(model, images, IMAGES, progress=False)
        assert again.sigma_blocks == pytest.approx(plain.sigma_blocks, rel=1e-6)
        torch.testing.assert_close(model(images), before)


def test_scoring_does_not_import_the_compiler() -> None:
    """It would take seconds and more memory than the statistics of a small model."""
    code = (
        "import sys, torch, dwattn; from support.models import BY_NAME; f = BY_NAME['hub']; "
        "dwattn.score(f.build(), f.images(4), 4, progress=False); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_half_precision_model_takes_fp32_images() -> None:
    family = BY_NAME["timm"]
    images = family.images(IMAGES)
    scores = dwattn.score(family.build().bfloat16(), images, IMAGES, progress=False)
    exact = dwattn.score(family.build(), images, IMAGES, progress=False)
    for a, b in zip(scores.sigma_blocks, exact.sigma_blocks, strict=True):
        assert a == pytest.approx(b, rel=0.05)


def test_dynamic_resolution_uses_the_grid_of_the_images() -> None:
    model = BY_NAME["timm-dynamic"].build()
    scores = dwattn.score(model, torch.randn(4, 3, 24, 40), 4, progress=False)
    assert scores.grid == (3, 5)
    with pytest.raises(
        DataError, match=r"32 x 24 pixels \(4 x 3 patches\) came after images of 3 x 5"
    ):
        dwattn.score(
            model, [torch.randn(2, 3, 24, 40), torch.randn(2, 3, 32, 24)], 4, progress=False
        )
