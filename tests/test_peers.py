"""Token merging and head pruning as the benchmark of peers runs them."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dwattn.demo._torchvision import make_importable

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

make_importable()
timm = pytest.importorskip("timm")

from peers import heads, merging  # noqa: E402
from peers.candidates import BOTH, DW, LOWRANK, Candidate, Given, shapes  # noqa: E402
from peers.model import SizedModel  # noqa: E402

from dwattn.demo.pretrained import DIM, HEADS, PATCH, SaliencyDecoder  # noqa: E402


def vit(depth: int = 3, dim: int = 24, num_heads: int = 2, side: int = 5, **more: Any) -> Any:
    """A small ViT whose attention is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=PATCH * side,
        depth=depth,
        embed_dim=dim,
        num_heads=num_heads,
        **more,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def saliency_model(depth: int = 2, side: int = 4) -> SizedModel:
    """Of the demo's width, since its decoder has that."""
    backbone = vit(depth, DIM, HEADS, side)
    for parameter in backbone.parameters():
        parameter.data *= 0.3
    return SizedModel(backbone, SaliencyDecoder(), PATCH * side).eval()


def slow(model: Any, pixels: Tensor, count: int) -> tuple[Tensor, list[list[int]]]:
    """Token merging of one image from the paper's sentences, token by token."""
    x = list(model._pos_embed(model.patch_embed(pixels))[0])
    groups = [[index] for index in range(len(x))]
    for block in model.blocks:
        layer = block.attn
        d, n = layer.head_dim, len(x)
        qkv = [layer.qkv(block.norm1(token)).view(3, layer.num_heads, d) for token in x]
        out = []
        for i in range(n):
            rows = []
            for h in range(layer.num_heads):
                logits = [
                    float(qkv[i][0, h] @ qkv[j][1, h]) / math.sqrt(d) + math.log(len(groups[j]))
                    for j in range(n)
                ]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                rows.append(sum(w * qkv[j][2, h] for j, w in enumerate(weights)) / sum(weights))
            out.append(x[i] + block.ls1(layer.proj(torch.cat(rows))))
        keys = [token[1].mean(0) for token in qkv]
        even, odd = list(range(0, n, 2)), list(range(1, n, 2))
        edges = []
        for i in even:
            if i == 0:
                continue
            cosines = {j: float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in odd}
            best = max(cosines, key=lambda j: cosines[j])
            edges.append((cosines[best], i, best))
        gone = {i: j for _, i, j in sorted(edges, reverse=True)[:count]}
        members = {
            j: [j, *(i for i, into in gone.items() if into == j)] for j in range(n) if j not in gone
        }
        order = [i for i in even if i not in gone] + odd
        sizes = [len(g) for g in groups]
        x = [
            sum(sizes[m] * out[m] for m in members[j]) / sum(sizes[m] for m in members[j]) for j in order
        ]  # fmt: skip
        groups = [[leaf for m in members[j] for leaf in groups[m]] for j in order]
        x = [token + block.ls2(block.mlp(block.norm2(token))) for token in x]
    return torch.stack([model.norm(token) for token in x]), groups


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_merging_is_what_the_paper_says(count: int) -> None:
    model, pixels = vit().double(), torch.randn(1, 3, 70, 70).double()
    tokens, trace, sizes = merging.MergedViT(model, count).merged(pixels)
    expected, groups = slow(model, pixels, count)
    torch.testing.assert_close(tokens[0], expected)
    assert sizes.flatten().tolist() == [len(group) for group in groups]
    for place, group in enumerate(groups):
        assert all(trace[0, leaf] == place for leaf in group)


@torch.no_grad()
def test_without_merging_nothing_changes() -> None:
    model, pixels = vit(), torch.randn(2, 3, 70, 70)
    torch.testing.assert_close(
        merging.MergedViT(model, 0).forward_features(pixels),
        model.forward_features(pixels),
        rtol=1e-4,
        atol=1e-5,
    )


@torch.no_grad()
@pytest.mark.parametrize("side", [4, 5])  # an odd and an even number of tokens
def test_every_patch_is_in_one_token_and_gets_it_back(side: int) -> None:
    model, pixels = vit(side=side), torch.randn(2, 3, 14 * side, 14 * side)
    merged = merging.MergedViT(model, 3)
    tokens, trace, sizes = merged.merged(pixels)
    assert tokens.shape[1] == side**2 + 1 - 3 * len(model.blocks)
    assert (sizes.sum(1) == side**2 + 1).all()
    for image in range(2):
        counted = torch.bincount(trace[image], minlength=tokens.shape[1])
        assert torch.equal(counted, sizes[image].flatten().long())
    assert (trace[:, 0] == 0).all()
    assert (sizes[:, 0] == 1).all()
    back = merged.forward_features(pixels)
    assert back.shape == (2, side**2 + 1, 24)
    torch.testing.assert_close(back[1, 7], tokens[1, trace[1, 7]])
    # Batched as alone: no image takes part in the matching of another.
    torch.testing.assert_close(back[1:], merged.forward_features(pixels[1:]), rtol=1e-4, atol=1e-5)


def test_the_closest_pairs_merge_and_protected_tokens_do_not() -> None:
    keys = torch.eye(8)[None, :6].clone()
    keys[0, 4] = 0.9 * keys[0, 3] + 0.1 * keys[0, 4]
    keys[0, 2] = 0.6 * keys[0, 5] + 0.4 * keys[0, 2]
    keys[0, 0] = keys[0, 1]  # the closest of all, but protected
    pairs = merging.match(keys, 1, protected=1)
    assert (pairs.gone.tolist(), pairs.into.tolist(), pairs.kept.tolist()) == (
        [[2]],
        [[1]],
        [[0, 1]],
    )
    assert pairs.places().tolist() == [[0, 2, 1, 3, 3, 4]]
    values = torch.arange(6.0).view(1, 6, 1)
    sizes = torch.tensor([1.0, 1, 1, 3, 1, 1]).view(1, 6, 1)
    tokens, numbers = merging.merge(values, sizes, pairs)
    assert tokens.flatten().tolist() == [0, 2, 1, (3 * 3 + 4) / 4, 5]
    assert numbers.flatten().tolist() == [1, 1, 1, 4, 1]
    assert merging.match(keys, 5, protected=1).gone.shape[1] == 2  # at most half


@torch.no_grad()
def test_blocks_in_front_of_merging_are_run_as_they_are() -> None:
    model, pixels = vit(), torch.randn(1, 3, 70, 70)
    everywhere, behind = (merging.MergedViT(model, 4, first).merged(pixels) for first in (0, 2))
    assert everywhere[0].shape[1] == 26 - 12
    assert behind[0].shape[1] == 26 - 4
    nothing = merging.MergedViT(model, 4, first=3).forward_features(pixels)
    torch.testing.assert_close(nothing, model.forward_features(pixels), rtol=1e-4, atol=1e-5)


def test_heads_without_influence_go_first_and_cost_nothing() -> None:
    pytest.importorskip("torch_pruning")
    model = saliency_model()
    idle = {0: 4, 1: 2}
    for index, head in idle.items():
        layer = model.backbone.blocks[index].attn
        with torch.no_grad():
            layer.proj.weight[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0
            layer.qkv.weight.view(3, HEADS, layer.head_dim, DIM)[:, head] *= 1e-3
    photos = torch.randn(4, 3, 56, 56)
    pruned = heads.prune(model, 1 / HEADS, photos)
    for block in pruned.backbone.blocks:
        assert (block.attn.num_heads, block.attn.qkv.out_features, block.mlp.fc1.out_features) == (
            5,
            960,
            4 * DIM,
        )
    with torch.no_grad():
        torch.testing.assert_close(
            pruned.tokens(photos), model.tokens(photos), rtol=1e-4, atol=1e-4
        )
    assert model.backbone.blocks[0].attn.num_heads == HEADS
    assert [b.attn.num_heads for b in heads.prune(model, 3 / HEADS, photos).backbone.blocks] == [
        3,
        3,
    ]


@torch.no_grad()
def test_the_refit_brings_the_tokens_back() -> None:
    model = saliency_model(depth=1)
    damaged = copy.deepcopy(model)
    damaged.backbone.blocks[0].attn.proj.weight[:, : DIM // 2] = 0
    photos, others = torch.randn(60, 3, 56, 56), torch.randn(8, 3, 56, 56)
    repaired = heads.refit(damaged, model, photos)
    before, after = (
        float((each.tokens(others) - model.tokens(others)).square().mean())
        for each in (damaged, repaired)
    )
    assert after < 0.01 * before


@pytest.mark.parametrize("method", [DW, LOWRANK, BOTH])
def test_the_timed_model_has_the_graph_of_the_measured_one(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peers.candidates.FRONT", 1)
    model = saliency_model()
    given = Given(model, torch.randn(8, 3, 56, 56), {1: [1]})
    candidate = Candidate(method, 1)
    fitted, shaped = candidate.fitted(given), candidate.shaped(given)
    assert shapes(fitted) == shapes(shaped)
    assert shapes(fitted) != shapes(model) or method == BOTH
    assert fitted.tokens(given.photos).shape == model.tokens(given.photos).shape
