"""Plans: readable, versioned, tied to their model, refused with the reason when stale or malformed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dwattn
from dwattn import Plan
from dwattn.adapters import describe
from dwattn.errors import PlanError
from dwattn.fingerprint import fingerprint
from dwattn.plan import KernelInit, LayerPlan
from support.models import hf_model, randomise, timm_vit


def plan_of(model: nn.Module, **changes: Any) -> Plan:
    """Blocks 1 and 3, the latter by heads, with everything a plan can hold."""
    plan = Plan.for_layers(model, [1, 3], heads=[None, [2, 0]])
    uniform = [[[1 / 20] * 3] * 3] * 3
    plan.layers[0].score = 1.25
    plan.layers[0].kernel_init = KernelInit(kernel=uniform, prefix=[[0.1]] * 3, uniform=[0.02] * 3)
    return plan.model_copy(update=changes)


def test_round_trip(tmp_path: Path) -> None:
    plan = plan_of(timm_vit())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_person_can_read_it() -> None:
    """One field a line, the layers before the fingerprint, a 3x3 kernel not on nine lines."""
    text = plan_of(timm_vit()).to_json()
    assert text.index('"layers"') < text.index('"fingerprint"')
    assert '"heads": [2, 0]' in text
    kernel = next(line for line in text.splitlines() if '"kernel"' in line)
    assert kernel.count("[") == 1 + 3 + 9
    assert len(text.splitlines()) < 80
    assert json.loads(text)["schema_version"] == 1


def test_blocks_by_index_name_and_module() -> None:
    model = timm_vit()
    names = [
        layer.name for layer in Plan.for_layers(model, [0, -1, "blocks.1", "blocks.2.attn"]).layers
    ]
    assert names == ["blocks.0.attn", "blocks.3.attn", "blocks.1.attn", "blocks.2.attn"]


@pytest.mark.parametrize(
    ("layers", "heads", "message"),
    [
        ([4], None, "no block 4.*blocks 0 to 3"),
        ([-5], None, "no block -5"),
        (["blocks.9.attn"], None, r"'blocks.9.attn'; there are blocks.0.attn"),
        ([1.5], None, "indices or names, got 1.5"),
        ([True], None, "got True"),
        ([0, 1], [[0]], "1 entries for 2 layers"),
        ([0, 0], None, "listed twice: blocks.0.attn"),
        ([0], [[]], "distinct and at least one"),
        ([0], [[1, 1]], "distinct and at least one"),
        ([0], [[-1]], "greater than or equal to 0"),
        ([], None, "at least 1 item"),
    ],
)
def test_impossible_lists_are_refused(layers: Any, heads: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.for_layers(timm_vit(), layers, heads)


def _edit(**changes: Any) -> Any:
    def edit(data: dict[str, Any]) -> None:
        for path, value in changes.items():
            *parents, last = path.split("__")
            node: Any = data
            for key in parents:
                node = node[int(key) if key.isdigit() else key]
            if value is KeyError:
                del node[last]
            else:
                node[last] = value

    return edit


MALFORMED = {
    "kind": (_edit(kind="something"), "not a dwattn plan"),
    "no kind": (_edit(kind=KeyError), "not a dwattn plan"),
    "newer schema": (_edit(schema_version=2), "schema_version=2.*reads version 1"),
    "no schema": (_edit(schema_version=KeyError), "schema_version=None"),
    "no layers": (_edit(layers=[]), "layers: List should have at least 1 item"),
    "layers missing": (_edit(layers=KeyError), "layers: Field required"),
    "unknown field": (_edit(layers__0__head=[1]), r"layers.0.head: Extra inputs"),
    "no name": (_edit(layers__0__name=""), r"layers.0.name.*at least 1 character"),
    "heads text": (_edit(layers__1__heads="all"), r"layers.1.heads.*valid list.*'all'"),
    "heads fraction": (_edit(layers__1__heads=[0.5]), r"layers.1.heads.0.*integer.*0.5"),
    "heads negative": (_edit(layers__1__heads=[-1]), r"layers.1.heads.0.*greater than or equal"),
    "heads twice": (_edit(layers__1__heads=[1, 1]), "distinct"),
    "score NaN": (_edit(layers__0__score=float("nan")), r"layers.0.score.*finite"),
    "kernel 2x3": (_edit(layers__0__kernel_init__kernel=[[[0.1] * 3] * 2] * 3), "at least 3 items"),
    "kernel NaN": (
        _edit(layers__0__kernel_init__kernel=[[[float("inf")] * 3] * 3] * 3),
        "finite number",
    ),
    "kernel heads": (_edit(layers__0__kernel_init__uniform=[0.1]), r"\(3, 3, 1\) heads"),
    "duplicate": (_edit(layers__1__name="blocks.1.attn"), "listed twice: blocks.1.attn"),
    "fingerprint": (_edit(model__fingerprint=3), r"model.fingerprint"),
    "model missing": (_edit(model=KeyError), "model: Field required"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_plans_are_refused_with_the_field(name: str, tmp_path: Path) -> None:
    edit, message = MALFORMED[name]
    data = json.loads(plan_of(timm_vit()).to_json())
    edit(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as raised:
        Plan.load(path)
    assert "plan.json" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "not a dwattn plan"),
        (b"\xff\xfe\x00", "not text. A plan is a JSON file.*dwattn select"),
        (b"null", "not a dwattn plan"),
        (b'{"layers": [1], "layers": [2]}', "'layers' is given twice"),
    ],
)
def test_files_that_are_no_plans(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("other", [{"layers": [0]}, 3, None], ids=repr)
def test_what_is_neither_a_plan_nor_a_path(other: Any) -> None:
    with pytest.raises(PlanError, match=f"plan or the path of one, got a {type(other).__name__}"):
        dwattn.replace(timm_vit(), other)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing.json.*No such file"):
        Plan.load(tmp_path / "nothing.json")
    with pytest.raises(PlanError, match="directory"):
        Plan.load(tmp_path)
    plan = plan_of(timm_vit())
    with pytest.raises(PlanError, match="is a directory"):
        plan.save(tmp_path)
    with pytest.raises(PlanError, match=r"Cannot write .*No such file"):
        plan.save(tmp_path / "no" / "folder" / "plan.json")


def test_an_interrupted_save_keeps_the_old_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    plan = plan_of(timm_vit())
    plan.save(path)
    before = path.read_bytes()

    def interrupted(self: Path, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.model_copy(update={"criterion": "other"}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- fingerprints ---


def check(plan: Plan, model: nn.Module, **options: Any) -> None:
    plan.check_model(describe(model), **options)


def test_the_fingerprint_survives_dtype_mode_and_copies() -> None:
    model = timm_vit()
    plan = plan_of(model)
    for other in (copy.deepcopy(model), model.train(), copy.deepcopy(model).bfloat16(), copy.deepcopy(model).half(), copy.deepcopy(model).double()):  # fmt: skip
        check(plan, other)
    assert fingerprint(model).architecture == fingerprint(copy.deepcopy(model).half()).architecture


def test_the_fingerprint_survives_small_changes_of_the_weights() -> None:
    model = timm_vit()
    plan = plan_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    check(plan, model)


@pytest.mark.parametrize("amount", [0.2, 1.0])
def test_other_weights_are_refused_by_how_much_they_differ(amount: float) -> None:
    model = timm_vit()
    plan = plan_of(model)
    attention = model.blocks[2].attn
    with torch.no_grad():
        for parameter in (attention.qkv.weight, attention.proj.weight):
            parameter += amount * parameter.std() * torch.randn_like(parameter)
    with pytest.raises(PlanError, match=r"stale.*blocks.2.attn changed by about \d+%.*allow_stale"):
        check(plan, model)
    check(plan, model, allow_stale=True)


def test_scaled_weights_are_other_weights() -> None:
    model = timm_vit()
    plan = plan_of(model)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight *= 2
        model.blocks[0].attn.proj.weight *= 2
    with pytest.raises(PlanError, match=r"stale.*blocks.0.attn"):
        check(plan, model)


def test_another_initialisation_is_refused() -> None:
    with pytest.raises(PlanError, match="stale"):
        check(plan_of(timm_vit()), randomise(timm_vit(), seed=1))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: timm_vit(depth=3), "3 blocks instead of 4"),
        (lambda: timm_vit(num_heads=4), "num_heads of layer blocks.0.attn is 4 instead of 3"),
        (lambda: timm_vit(embed_dim=96, num_heads=6), "dim of layer blocks.0.attn is 96"),
        (lambda: timm_vit(reg_tokens=4), "5 prefix tokens instead of 1"),
        (lambda: timm_vit(img_size=(24, 32)), r"grid is \(3, 4\) instead of \(4, 3\)"),
        (lambda: hf_model("Dinov2"), "name of layer encoder.layer.0.attention"),
    ],
)
def test_another_architecture_is_refused_even_if_stale_is_allowed(other: Any, message: str) -> None:
    plan = plan_of(timm_vit())
    with pytest.raises(PlanError, match=message):
        check(plan, other(), allow_stale=True)


def test_the_fingerprint_is_that_of_the_original_model() -> None:
    model = timm_vit()
    before = fingerprint(model)
    dwattn.replace(model, plan_of(model, layers=[LayerPlan(name="blocks.2.attn")]))
    assert fingerprint(model) == before
    assert fingerprint(copy.deepcopy(model)) == before


def test_one_layer_s_sketch_does_not_depend_on_the_others() -> None:
    model = timm_vit()
    before = fingerprint(model)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[0, 0] += 1
    after = fingerprint(model)
    changed = [a != b for a, b in zip(before.layers, after.layers, strict=True)]
    assert changed == [False, True, False, False]


def test_a_fingerprint_survives_save_pretrained(tmp_path: Path) -> None:
    """transformers writes the old key names to disk; the plan must not notice."""
    model = hf_model("Dinov2")
    plan = plan_of(model)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any(".attention.attention.query.weight" in key for key in file.keys())  # noqa: SIM118
    check(plan, type(model).from_pretrained(tmp_path))
