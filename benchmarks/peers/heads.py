"""Head pruning with Torch-Pruning, as its examples for timm's ViTs do it, and a closed-form refit behind it.

Nothing is retrained, since nothing else in the comparison is: users of head pruning usually fine-tune afterwards and
get more out of it. The refit is this project's (ridge towards the original's residual stream, on the same photos),
so that head pruning has what ``dwattn.replace(calibrate=...)`` has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.calibration.ridge import CorrectionFit

from .model import SizedModel

BATCH = 10
#: Every so many-th photo judges the strength of the ridge.
HELD_OUT_EVERY = 4


def prune(model: SizedModel, share: float, photos: Tensor) -> SizedModel:
    """A copy without ``share`` of each layer's heads, those with the least first-order influence on ``photos``.

    Torch-Pruning's Taylor importance needs a loss. There are no labels, so it is that of the model's own saliency maps
    taken as truth.
    """
    import torch_pruning

    pruned = copy.deepcopy(model)
    layers = [block.attn for block in pruned.backbone.blocks]
    for layer in layers:  # the fused operator hides the heads from its tracer
        layer.fused_attn = False
    accumulate_gradients(pruned, photos)
    projections = {layer.qkv: layer.num_heads for layer in layers}
    linear = (nn.Linear, nn.Conv2d)
    rest = [m for m in pruned.modules() if isinstance(m, linear) and m not in projections]
    pruner = torch_pruning.pruner.BasePruner(
        pruned.backbone, photos[:1], torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=share, head_pruning_ratio=share, prune_num_heads=True, prune_head_dims=False,
        num_heads=projections, ignored_layers=rest, output_transform=torch.sum,
    )  # fmt: skip
    pruner.step()
    for layer in layers:
        layer.num_heads = pruner.num_heads[layer.qkv]
        layer.attn_dim = layer.num_heads * layer.head_dim
        layer.fused_attn = True
    pruned.zero_grad()
    return pruned.eval()


def accumulate_gradients(model: SizedModel, photos: Tensor) -> None:
    """Gradients of the cross entropy of the saliency maps with themselves, thresholded."""
    for batch in photos.split(BATCH):
        saliency = model(batch).clamp(1e-6, 1 - 1e-6)
        F.binary_cross_entropy(saliency, (saliency > 0.5).float()).backward()


@torch.no_grad()
def refit(pruned: SizedModel, original: SizedModel, photos: Tensor) -> SizedModel:
    """A copy of ``pruned`` whose output projections and last MLP layers are corrected in closed form, in depth order."""
    student, vit = copy.deepcopy(pruned), original.backbone
    start = torch.cat([vit._pos_embed(vit.patch_embed(batch)) for batch in photos.split(BATCH)])
    judging = torch.arange(len(start)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    mine = theirs = torch.cat([start[judging], start[~judging]])
    blocks = zip(student.backbone.blocks, vit.blocks, strict=True)
    for (step, linear, scale), (true_step, _, _) in (
        pair for block, true in blocks for pair in zip(halves(block), halves(true), strict=True)
    ):
        theirs = torch.cat([true_step(batch) for batch in theirs.split(BATCH)])
        correct(step, linear, scale, mine, theirs, int(judging.sum()))
        mine = torch.cat([step(batch) for batch in mine.split(BATCH)])
    return student


def halves(block: nn.Module) -> list[tuple[Callable[[Tensor], Tensor], nn.Linear, Tensor]]:
    """The two residual steps of a timm block, the linear layer that ends each, and its LayerScale."""
    return [
        (lambda x: x + block.ls1(block.attn(block.norm1(x))), block.attn.proj, block.ls1.gamma),
        (lambda x: x + block.ls2(block.mlp(block.norm2(x))), block.mlp.fc2, block.ls2.gamma),
    ]


def correct(
    step: Callable[[Tensor], Tensor],
    linear: nn.Linear,
    scale: Tensor,
    mine: Tensor,
    target: Tensor,
    judging: int,
) -> None:
    """Correct ``linear`` in place so that ``step(mine)`` comes close to ``target``.

    Args:
        judging: leading images on which the strength of the ridge is chosen.
    """
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    fit = CorrectionFit(linear.in_features, linear.out_features, mine.device)
    for part, held_out in ((slice(judging), True), (slice(judging, None), False)):
        for x, y in zip(mine[part].split(BATCH), target[part].split(BATCH), strict=True):
            error = y - step(x)
            fit.add(seen.pop(), error, held_out=held_out)
    hook.remove()
    found = fit.solve()
    linear.weight += (found.weight / scale.double()[:, None]).float()
    linear.bias += (found.bias / scale.double()).float()
