"""What a converted model goes through: copies, dtypes, second plans, compilers."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dwattn
from dwattn.conversion import conversion
from dwattn.errors import (
    CalibrationError,
    CheckpointError,
    GeometryError,
    PlanError,
    UnsupportedAttentionError,
)
from support.models import hf_model, hub_vit, timm_eva, timm_vit
from support.surgery import Snapshot, plan_for, shims


def test_copies_are_independent() -> None:
    model, images = timm_vit(dynamic_img_size=True), torch.randn(1, 3, 32, 24)
    original = model(images)
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        shims(twin)["blocks.0.attn"].layer.kernel.zero_()
    assert not torch.equal(twin(images), model(images))
    # Each has a grid source of its own.
    twin(torch.randn(1, 3, 24, 32))
    assert shims(model)["blocks.0.attn"].layer.grid_source.grid == (4, 3)
    assert shims(twin)["blocks.0.attn"].layer.grid_source.grid == (3, 4)
    dwattn.restore(twin)
    assert torch.equal(twin(images), original)
    assert not shims(twin)
    assert len(shims(model)) == 2
    dwattn.restore(model)
    assert torch.equal(model(images), original)
    assert not model.patch_embed._forward_pre_hooks
    assert not twin.patch_embed._forward_pre_hooks


def wrappers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return {
        "torch.compile": partial(torch.compile, backend="eager"),
        "checkpoint": checkpoint_wrapper,
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("wrapper", ["torch.compile", "checkpoint"])
@pytest.mark.parametrize("family", ["timm", "hf-dinov2", "eva"])
def test_blocks_in_wrappers_are_refused_with_a_remedy(
    wrapper: str, family: str, tmp_path: Path
) -> None:
    """Of a wrapped block of some libraries the attention layer could be read, and what took its place never ran."""
    wrap = wrappers()[wrapper]
    model = {"timm": timm_vit, "hf-dinov2": partial(hf_model, "Dinov2"), "eva": timm_eva}[family]()
    plan, remedy = (
        plan_for(model),
        r"is in the wrapper \w+, behind which.*Put .*\.0\._\w+ in its place",
    )

    def wrap_blocks() -> None:
        blocks = model.encoder.layer if family == "hf-dinov2" else model.blocks
        for index, block in enumerate(blocks):
            blocks[index] = wrap(block)

    twin = copy.deepcopy(model)
    wrap_blocks()
    with pytest.raises(UnsupportedAttentionError, match=remedy):
        dwattn.replace(model, plan)
    with pytest.raises(UnsupportedAttentionError, match=remedy):
        dwattn.score(model, torch.randn(2, 3, 32, 32), num_images=2)
    model = twin
    dwattn.replace(model, plan)
    wrap_blocks()
    with pytest.raises(UnsupportedAttentionError, match=remedy):
        dwattn.save(model, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match=remedy):
        dwattn.restore(model)


def test_compiled_parts_of_blocks_are_not_calibrated() -> None:
    model, images = timm_vit(), torch.randn(8, 3, 32, 24)
    model.blocks[2].mlp = torch.compile(model.blocks[2].mlp, backend="eager")
    with pytest.raises(
        CalibrationError, match=r"blocks\.2\.mlp is in the wrapper of torch\.compile"
    ):
        dwattn.replace(model, plan_for(model), calibrate=images, progress=False)
    assert not shims(model)


@pytest.mark.parametrize("calibrate", [False, True])
def test_the_meta_device_as_default_changes_nothing(calibrate: bool) -> None:
    images = torch.randn(8, 3, 32, 24)
    options = {"calibrate": images, "progress": False} if calibrate else {}
    model, other = timm_vit(), timm_vit()
    dwattn.replace(model, plan_for(model), **options)
    plan = plan_for(other)
    with torch.device("meta"):
        scores = dwattn.score(other, images, num_images=8, progress=False)
        dwattn.replace(other, plan, **options)
    assert torch.equal(other(images), model(images))
    assert scores.num_images == 8


def test_sharded_models_are_told_to_convert_before() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, other = timm_vit(), timm_vit()
    dwattn.replace(model, plan_for(model), calibrate=torch.randn(8, 3, 32, 24), progress=False)
    plan = plan_for(other)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        fully_shard(other, mesh=mesh)
        with pytest.raises(
            PlanError, match=r"is a DTensor now.*Restore before the model is sharded"
        ):
            dwattn.restore(model)
        with pytest.raises(PlanError, match=r"is a DTensor.*replace before the model is sharded"):
            dwattn.replace(other, plan)
    finally:
        destroy_process_group()


def test_a_pickled_model_knows_the_grid_it_was_called_with() -> None:
    model = timm_vit(dynamic_img_size=True)
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    model(torch.randn(1, 3, 24, 32))
    source = pickle.loads(pickle.dumps(shims(model)["blocks.0.attn"].layer.grid_source))
    assert source.grid == (3, 4)


@torch.no_grad()
def test_threads_that_share_a_model_keep_their_grids_apart() -> None:
    model = timm_vit(dynamic_img_size=True)
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    upright = torch.randn(1, 3, 32, 24)
    expected = [model(upright), model(upright.mT)]
    both_embedded = threading.Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        both_embedded.wait()

    model.blocks[0].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(model, [upright, upright.mT]))
    torch.testing.assert_close(found, expected)


def _gradient(model: nn.Module, *batches: Tensor, checkpointing: bool = True) -> Tensor:
    """By backward in another thread, as of tensors on a GPU."""
    model.set_grad_checkpointing(checkpointing)
    model.zero_grad()
    loss = sum(model(images).square().sum() for images in batches)
    with torch.no_grad():
        model(torch.randn(1, 3, 24, 40))  # evaluation in between
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loss.backward).result()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradient_checkpointing_with_one_size_at_a_time() -> None:
    model = timm_vit(dynamic_img_size=True).train()
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    upright = torch.randn(2, 3, 32, 24)
    for images in (upright, upright.mT, upright):
        expected = _gradient(model, images, checkpointing=False)
        torch.testing.assert_close(_gradient(model, images), expected)


def test_gradient_checkpointing_over_sizes_of_as_many_patches_is_refused() -> None:
    model = timm_vit(dynamic_img_size=True).train()
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    upright = torch.randn(2, 3, 32, 24)
    message = r"12 patches.*grids of 4 x 3 and 3 x 4 have passed.*switch checkpointing off"
    with pytest.raises(GeometryError, match=message):
        _gradient(model, upright, upright.mT)
    # Sizes of which each has its own number of patches are told apart.
    sizes = (upright, torch.randn(2, 3, 40, 24), torch.randn(2, 3, 24, 24))
    expected = _gradient(model, *sizes, checkpointing=False)
    torch.testing.assert_close(_gradient(model, *sizes), expected)
    # Where the patch embedding runs again, too, the images are known.
    model.set_grad_checkpointing(False)
    checkpoint = torch.utils.checkpoint.checkpoint
    sizes = (upright, upright.mT)
    outputs = [checkpoint(model, images, use_reentrant=False) for images in sizes]
    model.zero_grad()
    sum(out.square().sum() for out in outputs).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = _gradient(model, *sizes, checkpointing=False)
    torch.testing.assert_close(found, expected)


def test_originals_follow_a_change_of_dtype() -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    expected = copy.deepcopy(model).double()(images.double())
    dwattn.replace(model, plan_for(model))
    model.double()
    assert model(images.double()).dtype == torch.float64
    dwattn.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model(images.double()), expected)


def test_originals_do_not_lose_bits_on_a_detour_through_half() -> None:
    model = timm_vit()
    exact = model.blocks[0].attn.qkv.weight.clone()
    dwattn.replace(model, plan_for(model))
    model.half()
    model.float()
    dwattn.restore(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, exact)


def test_originals_of_mixed_dtypes_come_back_as_they_were() -> None:
    model = timm_vit(qk_norm=True)
    model.blocks[0].attn.q_norm.double()
    before = Snapshot(model)
    dwattn.replace(model, plan_for(model))
    dwattn.restore(model)
    before.check()


def test_originals_follow_to_the_meta_device() -> None:
    """The only second device of every machine."""
    model = timm_vit()
    dwattn.replace(model, plan_for(model))
    model.to("meta")
    dwattn.restore(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_restoring_and_replacing_again() -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    plan = plan_for(model)
    dwattn.replace(model, plan)
    first = model(images)
    dwattn.restore(model)
    dwattn.replace(model, plan)
    assert torch.equal(model(images), first)


def test_disjoint_plans_add_up_and_are_restored_together() -> None:
    model, images = timm_vit(), torch.randn(1, 3, 32, 24)
    before = Snapshot(model)
    plans = [plan_for(model, [0]), plan_for(model, [2, 3], [[1], None])]
    for plan in plans:
        dwattn.replace(model, plan)
    assert list(shims(model)) == ["blocks.0.attn", "blocks.2.attn", "blocks.3.attn"]
    record = conversion(model)
    assert record is not None
    assert [layer.name for layer in record.plan.layers] == list(shims(model))
    both = timm_vit()
    dwattn.replace(both, plan_for(both, [0, 2, 3], [None, [1], None]))
    assert torch.equal(model(images), both(images))
    assert len(model.patch_embed._forward_pre_hooks) == 1
    dwattn.restore(model)
    before.check()


def test_a_second_plan_cannot_replace_a_replaced_layer_or_change_the_grid() -> None:
    model = timm_vit(dynamic_img_size=True)
    plan = plan_for(model, [0])
    dwattn.replace(model, plan)
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"blocks.0.attn: It is already replaced.*restore"):
        dwattn.replace(model, plan)
    with pytest.raises(PlanError, match=r"before with grid=\(4, 3\), now dynamic_grid=True"):
        dwattn.replace(model, plan_for(model, [1]), dynamic_grid=True)
    before.check()
    assert list(shims(model)) == ["blocks.0.attn"]


def test_parts_and_wrappers_of_a_converted_model(tmp_path: Path) -> None:
    model = hf_model("ViT", "ViTForImageClassification")
    plan = plan_for(model)
    dwattn.replace(model.vit, plan)
    assert conversion(model) is conversion(model.vit)
    with pytest.raises(PlanError, match=r"part of this model \(ViTModel\)"):
        dwattn.replace(model, plan_for(model, [1]))
    dwattn.restore(model)
    dwattn.replace(model, plan)
    message = "ViTModel has layers that dwattn replaced through a model that contains this one"
    with pytest.raises(PlanError, match=message):
        dwattn.replace(model.vit, plan_for(model.vit, [1]))
    with pytest.raises(PlanError, match=message):
        dwattn.restore(model.vit)
    with pytest.raises(CheckpointError, match=message):
        dwattn.save(model.vit, tmp_path / "part.safetensors")
    assert list(shims(model)) == [layer.name for layer in plan.layers]


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
@torch.no_grad()
def test_compiled_and_data_parallel_models(wrap: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, images = timm_vit(depth=3), torch.randn(1, 3, 32, 24)
    original, wrapped = model(images), wrap(model)
    torch.testing.assert_close(wrapped(images), original)
    dwattn.replace(wrapped, plan_for(wrapped, [0]))
    dwattn.replace(model, plan_for(model, [2]))
    assert (wrapped(images) - original).abs().max() > 0.01
    torch.testing.assert_close(wrapped(images), model(images))
    dwattn.save(wrapped, tmp_path / "model.safetensors")
    plain = dwattn.load(timm_vit(depth=3), tmp_path / "model.safetensors")
    torch.testing.assert_close(plain(images), model(images))
    loaded = wrap(timm_vit(depth=3))
    assert dwattn.load(loaded, tmp_path / "model.safetensors") is loaded
    torch.testing.assert_close(loaded(images), model(images))
    assert dwattn.restore(wrapped) is wrapped
    assert not shims(model)
    assert conversion(model) is None
    torch.testing.assert_close(wrapped(images), original)


def test_restoring_what_was_not_converted_or_was_tampered_with() -> None:
    model = timm_vit()
    with pytest.raises(PlanError, match="VisionTransformer has no layers replaced by dwattn"):
        dwattn.restore(model)
    dwattn.replace(model, plan_for(model))
    model.blocks[2].attn = nn.Identity()
    with pytest.raises(PlanError, match=r"blocks.2.attn is no longer.*but a Identity"):
        dwattn.restore(model)
    assert list(shims(model)) == ["blocks.0.attn"]
    model.prune_intermediate_layers([1])
    with pytest.raises(PlanError, match=r"blocks.2.attn is no longer.*but no module at all"):
        dwattn.restore(model)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_converted_models_compile_and_export(dynamic: bool) -> None:
    model = timm_vit(reg_tokens=4, depth=2, dynamic_img_size=dynamic)
    dwattn.replace(model, plan_for(model, [0, 1], [None, [1]]), dynamic_grid=dynamic)
    images = torch.randn(2, 3, 32, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    more = torch.randn(5, 3, 32, 24)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_replaced_layers_are_single_nodes_of_fx_graphs() -> None:
    """As feature extractors of torchvision and timm trace models."""
    model, images = timm_vit(), torch.randn(2, 3, 32, 24)
    dwattn.replace(model, plan_for(model, [0, 2], [None, [0, 2]]))
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(images), model(images))
    nodes = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert shims(model).keys() <= nodes
    with pytest.raises(UnsupportedAttentionError, match="attn_mask"):
        graph(images, attn_mask=torch.ones(13, 13))
    model = timm_vit(dynamic_img_size=True)
    dwattn.replace(model, plan_for(model), dynamic_grid=True)
    with pytest.raises(GeometryError, match="would not know the patch grid"):
        torch.fx.symbolic_trace(model)


def test_autocast_and_gradients_of_a_converted_model() -> None:
    model = hub_vit(num_register_tokens=4).train()
    dwattn.replace(model, plan_for(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 56, 56)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None for s in shims(model).values() for p in s.parameters())


@torch.no_grad()
def test_block_masks_of_flex_attention_are_refused_with_the_remedy() -> None:
    model, images = hf_model("Dinov2"), torch.randn(2, 3, 32, 32)
    dwattn.replace(model, plan_for(model))
    expected = model(images).last_hidden_state
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedAttentionError, match=r"set_attn_implementation\('sdpa'\)"):
        model(images)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(images).last_hidden_state, expected)


@pytest.mark.parametrize("inside", [False, True], ids=["ordinary model", "model of inference mode"])
def test_models_that_are_converted_in_inference_mode(inside: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        with torch.inference_mode(inside):
            return timm_vit()

    images = torch.randn(4, 3, 32, 24)
    model, loaded, plan = build(), build(), plan_for(timm_vit())
    with torch.inference_mode():
        dwattn.replace(model, plan, calibrate=images, progress=False)
        dwattn.save(model, tmp_path / "model.safetensors")
        dwattn.load(loaded, tmp_path / "model.safetensors")
        assert torch.equal(model(images), loaded(images))
    if not inside:
        for trained in (model, loaded):
            trained(images).sum().backward()
            assert all(p.grad is not None for p in trained.parameters())
