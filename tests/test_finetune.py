"""Distillation and its parts: what is compared, what is trained, which views come, what is cached."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwattn
from dwattn.data import Batch
from dwattn.errors import DataError, TrainingError
from dwattn.finetune import (
    Augment,
    Distillation,
    Evaluate,
    FeatureReader,
    Features,
    LinearHead,
    MaskedViews,
    Order,
    Recipe,
    SplitHead,
    Targets,
    Views,
    distill_loss,
    first_tensor,
    param_groups,
    steps_for,
    teacher,
)
from dwattn.finetune.distill import relative_error
from support.models import BY_NAME, FAMILIES, hub_vit, only
from support.more_families import MULTIHEAD
from support.surgery import plan_for

FAMILY = BY_NAME["hub-reg4"]


def converted(variant: str = "dw", **options: Any) -> nn.Module:
    model = hub_vit(num_register_tokens=4)
    dwattn.replace(model, plan_for(model), variant=variant, kernel_init="gaussian", **options)
    return model


def batch_of(pixels: Tensor) -> Batch:
    return Batch(pixels, len(pixels), pixels)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "both" not in f.name], ids=str)
def test_features_are_those_the_model_makes(family: Any) -> None:
    model, pixels = family.build(), family.images(2)
    layout = dwattn.adapters.describe(model)
    seen: list[Tensor] = []
    handle = layout.blocks[-1].module.register_forward_hook(
        lambda _, __, result: seen.append(only(result))
    )
    with torch.no_grad():
        with layout.in_raster_order():
            whole = model(pixels)
        handle.remove()
        hooks = [dict(m._forward_hooks) for m in model.modules()]
        found = FeatureReader(model, [0, -1])(batch_of(pixels))
        both = FeatureReader(model, [], lambda result: result)(batch_of(pixels))
    torch.testing.assert_close(found.blocks[1], seen[0], rtol=0, atol=0)
    assert found.tokens.shape == seen[0].shape
    assert not torch.equal(found.blocks[0], found.blocks[1])
    assert type(both.output) is type(whole)
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks


def test_final_tokens_are_behind_the_norm() -> None:
    model, pixels = hub_vit(num_register_tokens=4), FAMILY.images(2)
    with torch.no_grad():
        tokens = FeatureReader(model)(batch_of(pixels)).tokens
        expected = model.forward_features(pixels)["x_norm_patchtokens"]
    torch.testing.assert_close(tokens[:, 5:], expected, rtol=0, atol=0)
    with pytest.raises(TrainingError, match=r"no blocks \[4\].*0 to 3"):
        FeatureReader(model, [4])


def test_the_loss_is_what_it_says() -> None:
    torch.manual_seed(0)
    t, s = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    targets = Targets(cosine=2.0, features=3.0, prefix=0.5, blocks=0.25, output=4.0)
    student = Features(s, (s + 1, s - 1), s[:, 0])
    original = Features(t, (t, t), t[:, 0])
    found = distill_loss(student, original, targets, num_prefix=2)
    cosine = 1 - F.cosine_similarity(s[:, 2:], t[:, 2:], dim=-1).mean()

    def error(a: Tensor, b: Tensor) -> Tensor:
        each = [
            ((x - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum() for x, y in zip(a, b, strict=True)
        ]
        return torch.stack(each).mean()

    p, q = t[:, 0].softmax(1), s[:, 0].softmax(1)
    expected = {
        "cosine": cosine,
        "features": error(s[:, 2:], t[:, 2:]),
        "prefix": 1 - F.cosine_similarity(s[:, :2], t[:, :2], dim=-1).mean(),
        "blocks": (error(s + 1, t) + error(s - 1, t)) / 2,
        "output": (p * (p / q).log()).sum(1).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    loss = sum(getattr(targets, name) * value for name, value in expected.items())
    torch.testing.assert_close(found["loss"].double(), loss, rtol=1e-5, atol=1e-5)
    same = distill_loss(original, original, targets, num_prefix=2)
    assert all(abs(float(value)) < 1e-6 for value in same.values())


def test_the_loss_of_a_batch_is_the_mean_over_its_parts() -> None:
    torch.manual_seed(0)
    targets = Targets(features=1.0, output=1.0, output_loss="mse")
    tokens, scale = torch.randn(2, 4, 3, 5), torch.tensor([1.0, 10.0, 0.1, 3.0])
    for shape in ((4, 1, 6, 6), (4, 1)):
        student, original = torch.randn(2, *shape) * scale.view(-1, *[1] * (len(shape) - 1))

        def losses(part: slice, mine: Tensor = student, theirs: Tensor = original) -> Any:
            return distill_loss(
                Features(tokens[0, part], (), mine[part]),
                Features(tokens[1, part], (), theirs[part]),
                targets,
            )

        whole, parts = losses(slice(0, 4)), [losses(slice(i, i + 1)) for i in range(4)]
        for name, value in whole.items():
            torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean())


def test_a_loss_without_a_term_is_refused() -> None:
    tokens = torch.randn(2, 3, 4)
    with pytest.raises(TrainingError, match=r"targets\.prefix=1 is the only weight"):
        distill_loss(Features(tokens), Features(tokens), Targets(cosine=0.0, prefix=1.0))


def test_logits_of_pixels_are_a_mean_over_pixels() -> None:
    tokens = torch.randn(2, 3, 4)
    mine, theirs = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        pair = Features(tokens, (), a), Features(tokens, (), b)
        return distill_loss(*pair, Targets(output=1, output_loss="kl"))["output"]

    rows = [t.movedim(1, -1).reshape(-1, 5) for t in (mine, theirs)]
    torch.testing.assert_close(loss(mine, theirs), loss(*rows))


def test_maps_in_the_unit_interval() -> None:
    teacher_map = torch.rand(2, 1, 4, 4)
    tokens = torch.randn(2, 3, 4)
    targets = Targets(output=1, output_loss="binary")
    same = Features(tokens, (), teacher_map)
    assert float(distill_loss(same, same, targets)["output"]) == pytest.approx(0, abs=1e-7)
    other = Features(tokens, (), 1 - teacher_map)
    assert float(distill_loss(other, same, targets)["output"]) > 0.05
    with pytest.raises(TrainingError, match=r"\[0, 1\]"):
        distill_loss(same, Features(tokens, (), 3 * teacher_map), targets)
    with pytest.raises(TrainingError, match="shapes"):
        distill_loss(Features(tokens[:1]), Features(tokens))
    for wrong in ({"cosine": -1.0}, {"cosine": 0.0, "prefix": 0.0}, {"output_loss": "l1"}):
        with pytest.raises(TrainingError):
            Targets(**wrong)


def test_targets_that_a_model_lacks_are_refused() -> None:
    model, targets = BY_NAME["timm-no-class"].build(), Targets(cosine=0, prefix=0.5)
    with pytest.raises(TrainingError, match=r"prefix=0\.5 is the only target"):
        Distillation(model, copy.deepcopy(model), targets=targets)


def test_param_groups_keep_decay_off_kernels() -> None:
    model = converted("lowrank_dw")
    groups = param_groups(model, lr=1e-3, kernel_lr=7.0, weight_decay=0.1)
    by_name = {group["name"]: group for group in groups}
    names = {id(p): n for n, p in model.named_parameters()}
    kernels = {names[id(p)].rsplit(".", 1)[1] for p in by_name["kernels"]["params"]}
    assert kernels == {"kernel", "kappa", "mu", "beta"}
    assert by_name["kernels"]["lr"] == pytest.approx(7e-3)
    decayed = [names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed
    assert not any(n.endswith("bias") or "norm" in n or "token" in n for n in decayed)
    assert sum(len(g["params"]) for g in groups) == len(names)
    torch.optim.AdamW(groups)


UNDECAYED = [f for f in [*FAMILIES, *MULTIHEAD] if f.name in (
    "timm-deit", "timm-siglip", "hf-deit", "hf-siglip", "hub-dinov3", "torchvision", "open-clip"
)]  # fmt: skip


@pytest.mark.parametrize("family", UNDECAYED, ids=str)
def test_only_matrices_decay(family: Any) -> None:
    """Tokens, positions and pooling queries have names of their own in each library."""
    model = family.build()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = [names[id(p)] for g in param_groups(model) if g["weight_decay"] for p in g["params"]]
    assert decayed
    assert all(n.endswith("weight") and "position" not in n for n in decayed)


def test_kernels_never_decay() -> None:
    """Those of static prefix rows and of blocks that a head copies neither."""
    small = ("kernel", "kappa", "mu", "beta", "prefix_rows.a", "prefix_rows.b")
    model = converted(prefix="static")
    head = SplitHead(model, LinearHead(48, 2), task_blocks=2)
    for groups in (param_groups(model), param_groups(model, head=head, train="head")):
        trained = {id(p): g for g in groups for p in g["params"]}
        named = [*model.named_parameters(), *head.named_parameters()]
        found = [trained[id(p)] for n, p in named if id(p) in trained and n.endswith(small)]
        assert found
        assert not any(group["weight_decay"] for group in found)


def test_param_groups_freeze_what_is_outside() -> None:
    model = converted()
    groups = param_groups(model, train="replaced")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".layer." in n}
    assert sum(len(g["params"]) for g in groups) == len(trained)
    param_groups(model, train="blocks")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trained} == {"0", "2"}
    head = nn.Linear(3, 2)
    groups = param_groups(model, train="head", head=head, head_lr=5.0, lr=1.0)
    assert {g["name"]: g["lr"] for g in groups} == {"head": 5.0, "head without decay": 5.0}
    with pytest.raises(TrainingError, match="nothing to train"):
        param_groups(hub_vit(), train="replaced")
    with pytest.raises(TrainingError, match="must be one of"):
        param_groups(model, train="some")  # type: ignore[arg-type]


def test_the_teacher_is_the_original() -> None:
    model, pixels = hub_vit(num_register_tokens=4), FAMILY.images(3)
    original = copy.deepcopy(model)
    photos = FAMILY.images(16, seed=3)
    dwattn.replace(model, plan_for(model), calibrate=photos, views=1, progress=False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = teacher(model)
    assert all(not p.requires_grad for p in found.parameters())
    with torch.no_grad():
        assert torch.equal(FAMILY.tokens(found, pixels), FAMILY.tokens(original, pixels))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    dwattn.restore(model)


def test_a_loaded_model_has_no_teacher(tmp_path: Any) -> None:
    dwattn.save(converted(), tmp_path / "s.safetensors")
    loaded = dwattn.load(hub_vit(num_register_tokens=4), tmp_path / "s.safetensors")
    with pytest.raises(TrainingError, match="pass it as teacher="):
        Distillation(loaded)
    module = Distillation(loaded, hub_vit(num_register_tokens=4))
    assert float(module({"pixels": FAMILY.images(2)})["loss"].detach()) > 0


def test_gradients_reach_the_student_alone() -> None:
    module = Distillation(converted(), targets=Targets(blocks=1.0))
    assert not any("teacher" in name for name in module.state_dict())
    module({"pixels": FAMILY.images(2)})["loss"].backward()
    kernels = [p for n, p in module.named_parameters() if n.endswith("kernel")]
    assert kernels
    assert all(bool(p.grad.abs().sum() > 0) for p in kernels)
    assert module.train().student.training is False


@pytest.mark.parametrize(
    "name", ["timm-reg4", "hf-dinov2-head", "hf-clip", "hf-vit-mae", "hf-siglip"]
)
@pytest.mark.parametrize("variant", ["lowrank_dw", "conv", "ens_dw", "spvit"])
def test_every_family_and_variant_learns(name: str, variant: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    dwattn.replace(model, plan_for(model), variant=variant, kernel_init="gaussian")
    module = Distillation(model, targets=Targets(features=1.0, blocks=1.0))
    batch = {"pixels": family.images(4)}
    optimizer = torch.optim.AdamW(param_groups(module, lr=2e-3))
    losses = []
    for _ in range(8):
        loss = module(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_cached_teacher_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Distillation(converted(), targets=Targets(blocks=1.0), cache=1 << 20)
    pixels = FAMILY.images(5)
    calls: list[int] = []
    teach = module._teach
    module.cache.fill([((i, 0), pixels[i]) for i in range(3)], teach, torch.device("cpu"))

    def counted(missing: Tensor) -> Features:
        calls.append(len(missing))
        return teach(missing)

    monkeypatch.setattr(module, "_teach", counted)
    keys = [(4, 0), (0, 0), (2, 0), (0, 1)]
    batch = pixels[[4, 0, 2, 0]]
    found = module.taught(batch, keys)
    assert calls == [2]
    for mine, theirs in zip(found.tensors(), teach(batch).tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert module.cache.used <= 1 << 20
    small = Distillation(converted(), cache=100).cache
    small.fill([((0, 0), pixels[0])], teach, torch.device("cpu"))
    assert len(small) == 0


def test_the_teacher_computes_as_the_student_does() -> None:
    """Under autocast too; what the cache holds was computed before it and stays as it is."""
    module = Distillation(converted(), cache=1 << 20)
    pixels = FAMILY.images(2)
    whole = module.taught(pixels).tokens
    module.cache.fill([((0, 0), pixels[0])], module._teach, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module.taught(pixels, [(0, 0), (1, 0)]).tokens.float()
    torch.testing.assert_close(half[0], whole[0], rtol=1e-5, atol=1e-5)
    assert 1e-4 < relative_error(half[1:], whole[1:]).sqrt() < 0.05


def test_every_image_comes_once_an_epoch() -> None:
    order = list(Order(images=5, batch_size=4, seed=1, views=2, steps=5))
    flat = [key for keys in order for key in keys]
    for epoch in range(4):
        assert sorted(flat[5 * epoch : 5 * epoch + 5]) == [(i, epoch % 2) for i in range(5)]
    assert flat[:5] != sorted(flat[:5]) or flat[10:15] != flat[:5]
    later = list(Order(5, 4, 1, 2, 5, start=3))
    assert later == order[3:]
    halves = [list(Order(5, 4, 1, 2, 5, rank=rank, world=2)) for rank in range(2)]
    for whole, first, second in zip(order, *halves, strict=True):
        assert sorted(whole) == sorted(first + second)
        assert len(first) == len(second)
    assert Order(5, 4, 1, 2, 5).distinct() == [(i, v) for i in range(5) for v in range(2)]
    assert Order(5, 4, 1, None, 5).distinct() == []
    for steps in range(1, 12):
        keys = [key for keys in Order(5, 3, 2, 2, steps) for key in keys]
        expected = sorted({key for key in keys if keys.count(key) > 1})
        assert Order(5, 3, 2, 2, steps).distinct() == expected


def test_views_depend_on_their_number_alone() -> None:
    images = FAMILY.images(3)
    first, second = (Views(images, Augment(colour=0.2), seed=4) for _ in range(2))
    second[1, 2]
    for key in ((0, 1), (2, 3)):
        assert torch.equal(first[key]["pixels"], second[key]["pixels"])
    assert torch.equal(first[1, 0]["pixels"], images[1])
    assert not torch.equal(first[1, 1]["pixels"], first[1, 2]["pixels"])
    assert not torch.equal(first[1, 1]["pixels"], Views(images, Augment(), 5)[1, 1]["pixels"])
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != Views(images + 1, Augment(colour=0.2), 4).fingerprint()
    with pytest.raises(DataError, match="crop"):
        Augment(crop=(0.5, 1.2))


def test_rounds_bring_every_image_once_each() -> None:
    views = Views(FAMILY.images(3), Augment(), seed=4)
    expected = [views[image, view]["pixels"] for view in range(2) for image in range(3)]
    for found, wanted in zip(views.rounds(2), expected, strict=True):
        assert torch.equal(found, wanted)


def test_larger_images_make_views_of_the_models_size() -> None:
    images = torch.rand(2, 3, 48, 40)
    views = Views(images, Augment(size=(24, 20)))
    assert views[0, 0]["pixels"].shape == views[1, 3]["pixels"].shape == (3, 24, 20)
    expected = F.interpolate(images, (24, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(views[1, 0]["pixels"], expected[1])


def test_a_mask_moves_with_its_image() -> None:
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    image = torch.stack([ramp, ramp.T, ramp])
    mask = (ramp > 0.5).to(torch.uint8)
    for view in range(1, 9):
        pixels, moved = Augment()(image, 0, (0, view), mask)
        assert moved is not None
        agree = ((pixels[0] > 0.5).to(torch.uint8) == moved).float().mean()
        assert float(agree) > 0.95


@pytest.mark.parametrize("size", [(14, 28), (42, 42), (161, 161)])
def test_a_resized_mask_lies_where_its_image_does(size: tuple[int, int]) -> None:
    """The classes are row numbers, and so are the pixels."""
    mask = torch.arange(98, dtype=torch.uint8)[:, None].expand(98, 98)
    image, moved = Augment(size=size)(mask.float().expand(3, -1, -1), 0, (0, 0), mask)
    assert moved is not None
    data = MaskedViews(torch.zeros(1, 3, 98, 98), mask[None], 98, mask_size=size)
    for rows in (moved, data[0, 0]["mask"]):
        apart = (rows - image[0]).mean() * size[0] / 98
        assert abs(float(apart)) < 0.15


def test_the_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=0.1, final_lr=0.01)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(TrainingError, match="lr"):
        Recipe.of(steps=3, lr=-1)
    with pytest.raises(TrainingError, match="stepz"):
        Recipe.of(steps=3, stepz=3)


def test_epochs_are_steps() -> None:
    assert steps_for(2, 10, 8) == 3
    assert steps_for(0.01, 10, 8) == 1
    for wrong in (0, -2, float("nan")):
        with pytest.raises(TrainingError, match="epochs="):
            steps_for(wrong, 10, 8)


def test_a_models_main_output() -> None:
    tensor = torch.ones(2)
    assert first_tensor(tensor) is tensor
    assert first_tensor({"other": torch.zeros(1), "logits": tensor}) is tensor
    assert first_tensor((tensor, None)) is tensor
    with pytest.raises(TrainingError, match="output="):
        first_tensor(3)


def test_evaluate_needs_no_folder() -> None:
    assert Evaluate(lambda module: {"a": 1.0}, 5).history == []
