"""What is in a checkpoint, and what is refused: both files and fresh model stay as they were."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dwattn
from dwattn import Plan
from dwattn.conversion import Transaction, conversion
from dwattn.errors import CheckpointError, PlanError
from dwattn.files import write_atomically
from support.checkpoints import IMAGES, convert, fresh
from support.models import BY_NAME, timm_vit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_the_file_says_what_it_is(path: Path) -> None:
    model = convert(variant="lowrank_dw", rank=16)
    dwattn.save(model, path)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["dwattn"])
    assert record["kind"] == "dwattn-checkpoint"
    assert record["schema_version"] == 1
    assert record["dwattn_version"] == dwattn.__version__
    assert [layer["name"] for layer in record["layers"]] == ["blocks.0.attn", "blocks.2.attn"]
    assert record["layers"][0]["variant"] == "lowrank_dw"
    assert record["layers"][0]["config"]["rank"] == 16
    assert Plan.from_json(json.dumps(record["plan"])).layers[1].name == "blocks.2.attn"


def test_saving_does_not_change_the_model(path: Path) -> None:
    model = convert()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    dwattn.save(model, path)
    assert all(
        before[n][0] == id(p) and torch.equal(before[n][1], p) for n, p in model.named_parameters()
    )


def test_only_converted_models_can_be_saved(path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"VisionTransformer has no layers replaced.*replace\(model, plan\) first",
    ):
        dwattn.save(timm_vit(), path)
    model = convert()
    dwattn.restore(model)
    with pytest.raises(CheckpointError, match="no layers replaced"):
        dwattn.save(model, path)
    model = convert()
    model.blocks[0].attn = nn.Identity()
    with pytest.raises(CheckpointError, match="2 layers were replaced by dwattn, but 1 of them"):
        dwattn.save(model, path)
    with pytest.raises(CheckpointError, match=r"is on the meta device"):
        dwattn.save(convert().to("meta"), path)
    assert not path.exists()


def test_state_that_is_not_a_tensor_is_refused(path: Path) -> None:
    class Stateful(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, state: Any) -> None: ...

    model = convert(lambda: Stateful(timm_vit()))
    with pytest.raises(CheckpointError, match=r"'_extra_state' is a dict; only plain"):
        dwattn.save(model, path)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError]
)
def test_a_failed_save_keeps_the_old_file(
    error: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert()
    dwattn.save(model, path)
    before = path.read_bytes()

    def half(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half)
    expected = CheckpointError if isinstance(error, OSError) else error
    match = "No space left on device" if isinstance(error, OSError) else None
    with pytest.raises(expected, match=match):
        dwattn.save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_ctrl_c_behind_the_making_of_a_temporary_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", interrupted)
        with pytest.raises(KeyboardInterrupt), write_atomically(path, CheckpointError):
            pass
    assert not list(path.parent.iterdir())


def test_a_really_full_disk(path: Path) -> None:
    """/dev/full is a disk without space."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(CheckpointError, match="Cannot write"):
        dwattn.save(convert(), Path("/dev/full/model.safetensors"))
    with pytest.raises(CheckpointError, match=r"Cannot write.*No such file"):
        dwattn.save(convert(), path.parent / "missing" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a directory"):
        dwattn.save(convert(), path.parent)


def test_readers_of_the_old_file_keep_the_old_file(path: Path) -> None:
    """The new one is put in its place in one step, not written over it."""
    model = convert()
    dwattn.save(model, path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        start = reader.read(100)
        with torch.no_grad():
            model.head.bias += 1
        dwattn.save(model, path)
        assert start + reader.read() == before
    assert path.read_bytes() != before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_and_devices_are_left_alone(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="it is a device, pipe or socket"):
        dwattn.save(convert(), path)
    assert path.is_fifo()
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link_to_what_is_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "student.safetensors"
    path.symlink_to(target)
    for _ in range(2):  # the link leads nowhere, then to a file
        dwattn.save(convert(), path)
        assert path.is_symlink()
        assert not target.is_symlink()
        dwattn.load(fresh(), target)


def test_permissions_are_those_of_any_new_file(path: Path) -> None:
    dwattn.save(convert(), path)
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.fixture
def saved(path: Path) -> Path:
    dwattn.save(convert(), path)
    return path


def assert_refused(path: Path, message: str, build: Callable[[], nn.Module] = timm_vit) -> None:
    model = build()
    modules, state = (
        dict(model.named_modules()),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    with pytest.raises(CheckpointError, match=message) as raised:
        dwattn.load(model, path)
    assert path.name in str(raised.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert conversion(model) is None
    assert not model.patch_embed._forward_pre_hooks


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_files(keep: int, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:keep])
    assert_refused(saved, "not a readable safetensors file.*truncated")


def test_missing_files(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing.safetensors", "no checkpoint to load.*does not exist")


def test_pickles_are_not_read(saved: Path) -> None:
    torch.save(timm_vit().state_dict(), saved)
    assert_refused(saved, "not a readable safetensors file")


def rewrite(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change record and tensors of a file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    record, tensors = json.loads(metadata["dwattn"]), load_file(path)
    edit(record, tensors)
    save_file(tensors, path, metadata={**metadata, "dwattn": json.dumps(record)})


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.attn.layer.mu"][3] = float("nan")


def _swap_shape(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"] = tensors["head.weight"].mT.contiguous()


EDITS = {
    "schema": (lambda r, t: r.update(schema_version=2), "schema_version=2.*reads version 1"),
    "no schema": (lambda r, t: r.pop("schema_version"), "schema_version=None"),
    "kind": (lambda r, t: r.update(kind="other"), "malformed: kind"),
    "unknown field": (lambda r, t: r.update(extra=1), "extra: Extra inputs"),
    "layers missing": (lambda r, t: r.pop("layers"), "layers: Field required"),
    "plan broken": (lambda r, t: r["plan"].update(layers=[]), r"plan.layers"),
    "variant": (lambda r, t: r["layers"][0].update(variant="linear"), "blocks.0.attn cannot be rebuilt.*'linear'"),
    "config": (lambda r, t: r["layers"][0]["config"].update(bogus=1), "blocks.0.attn cannot be rebuilt.*bogus"),
    "layer name": (lambda r, t: r["layers"][0].update(name="blocks.9.attn"), "converts blocks.9.attn, which"),
    "layer forgotten": (lambda r, t: r["layers"].pop(), r"lacks blocks.2.attn.proj.bias.*blocks.2.attn.qkv"),
    "fewer tensors": (lambda r, t: t.pop("blocks.1.norm1.weight"), "lacks blocks.1.norm1.weight"),
    "more tensors": (lambda r, t: t.update(extra=torch.ones(1)), "also holds extra"),
    "shape": (lambda r, t: _swap_shape(t), r"head.weight as F32 \(48, 5\) instead of torch.float32 \(5, 48\)"),
    "dtype": (lambda r, t: t.update({"head.bias": torch.ones(5).long()}), r"head.bias as I64 \(5,\)"),
    "NaN": (lambda r, t: _nan(t), "NaN or infinite values in blocks.0.attn.layer.mu"),
    "dangling alias": (lambda r, t: (t.pop("head.bias"), r.update(aliases={"head.bias": "no.such"})), "lacks no.such"),
    "other depth": (lambda r, t: r["fingerprint"]["layers"].pop(), "4 blocks instead of 3"),
    "other prefix": (lambda r, t: r["fingerprint"].update(num_prefix=5), "1 prefix tokens instead of 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_files_that_do_not_fit_are_refused_by_name(name: str, saved: Path) -> None:
    edit, message = EDITS[name]
    rewrite(saved, edit)
    assert_refused(saved, message)


def test_broken_records(saved: Path) -> None:
    tensors = load_file(saved)
    save_file(tensors, saved)
    assert_refused(saved, r"holds tensors but no conversion.*not written by dwattn.save")
    save_file(tensors, saved, metadata={"dwattn": "{"})
    assert_refused(saved, "not valid JSON")
    save_file(tensors, saved, metadata={"dwattn": "[]"})
    assert_refused(saved, "schema_version=None")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}).encode()
    saved.write_bytes(struct.pack("<Q", len(header)) + header)
    assert_refused(saved, "not a readable safetensors file")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm_vit(depth=3), "3 blocks instead of 4"),
        (lambda: timm_vit(num_heads=4), "num_heads of layer blocks.0.attn is 4"),
        (lambda: timm_vit(img_size=(24, 32)), r"grid is \(3, 4\) instead of \(4, 3\)"),
        (lambda: timm_vit(reg_tokens=4), "5 prefix tokens"),
        (
            lambda: timm_vit(num_classes=9),
            r"head.bias as F32 \(5,\) instead of torch.float32 \(9,\)",
        ),
        (lambda: timm_vit(init_values=1e-5), "lacks blocks.0.ls1.gamma"),
    ],
)
def test_other_models_are_refused(
    build: Callable[[], nn.Module], message: str, saved: Path
) -> None:
    assert_refused(saved, message, build)


def test_models_that_cannot_be_loaded_into(saved: Path) -> None:
    model = convert()
    before = model(IMAGES)
    with pytest.raises(CheckpointError, match=r"already converted.*fresh one"):
        dwattn.load(model, saved)
    assert torch.equal(model(IMAGES), before)
    with pytest.raises(CheckpointError, match="a function that makes one, got a dict"):
        dwattn.load(dict, saved)
    with pytest.raises(CheckpointError, match=r"got a str; dwattn.models.load_model\(\) makes one"):
        dwattn.load("timm:vit_tiny_patch16_224", saved)
    with pytest.raises(ValueError, match="Sequential is not a Vision Transformer"):
        dwattn.load(nn.Sequential(), saved)


@pytest.mark.parametrize("step", ["copy", "swap", "set"])
def test_an_interrupted_load_leaves_the_fresh_model(
    step: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    modules, before = dict(model.named_modules()), model(IMAGES)
    real, calls = getattr(Transaction, step), []

    def interrupted(self: Transaction, *args: Any) -> None:
        real(self, *args)
        calls.append(1)
        if len(calls) == (7 if step == "copy" else 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(Transaction, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        dwattn.load(model, saved)
    monkeypatch.undo()
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(IMAGES), before)
    assert not model.patch_embed._forward_pre_hooks
    dwattn.load(model, saved)


def test_a_loaded_model_has_no_originals_to_restore(saved: Path) -> None:
    model = dwattn.load(timm_vit, saved)
    before = model(IMAGES)
    with pytest.raises(
        PlanError, match=r"loaded from .*model.safetensors.*original attention weights"
    ):
        dwattn.restore(model)
    assert torch.equal(model(IMAGES), before)


def test_a_loaded_model_can_be_fine_tuned_copied_and_saved(saved: Path, tmp_path: Path) -> None:
    model = dwattn.load(BY_NAME["timm"].build, saved).train()
    model(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in model.blocks[0].attn.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    dwattn.save(model, tmp_path / "tuned.safetensors")
    assert torch.equal(dwattn.load(timm_vit, tmp_path / "tuned.safetensors")(IMAGES), model(IMAGES))


def test_a_model_on_the_meta_device_is_not_filled(path: Path) -> None:
    dwattn.save(convert(), path)
    model = timm_vit().to("meta")
    with pytest.raises(CheckpointError, match=r"on the meta device.*Make the model on the CPU"):
        dwattn.load(model, path)
    assert conversion(model) is None


def test_saving_a_sharded_model_says_how_to_gather_it(path: Path) -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = convert()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(CheckpointError, match=r"is a DTensor.*get_model_state_dict"):
            dwattn.save(model, path)
    finally:
        destroy_process_group()
