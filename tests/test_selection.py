"""select() on scores that are written by hand, and the latency table."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import dwattn
from dwattn.errors import DwattnError, PlanError, ScoreError
from dwattn.latency import LatencyTable, LayerLatency, measure_latency
from dwattn.plan import ModelInfo, Plan
from dwattn.scores import LayerScore, Scores
from dwattn.selection import close_call
from support.models import BY_NAME, timm_vit

pytest.importorskip("timm")
MODEL = BY_NAME["timm"].build()
SIGMA = [[5.0, 6.0, 4.0], [1.0, 9.0, 2.0], [2.0, 3.0, 1.0], [4.0, 4.0, 4.0]]  # blocks: 5, 4, 2, 4
RESIDUAL = [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7], [0.5, 0.5, 0.4], [0.3, 0.2, 0.1]]


def make_scores(**changes: object) -> Scores:
    layers = [
        LayerScore(
            name=f"blocks.{block}.attn",
            block=block,
            sigma=torch.tensor(sigma, dtype=torch.float64),
            mean_kernel=torch.arange(27.0, dtype=torch.float64).view(3, 3, 3) / 100 + block,
            prefix_mass=torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64),
            uniform=torch.tensor([1e-3, 2e-3, 1 / 3], dtype=torch.float64),
            residual=torch.tensor(residual, dtype=torch.float64),
            block_residual=round(sum(residual) / 3, 9),
        )
        for block, (sigma, residual) in enumerate(zip(SIGMA, RESIDUAL, strict=True))
    ]
    scores = Scores(layers, 100, "patches", (4, 3), 1, ModelInfo.of(MODEL))
    for name, value in changes.items():
        setattr(scores, name, value)
    return scores


def test_scores_that_say_little_about_which_of_two_blocks_to_take() -> None:
    scores = make_scores()
    close = close_call(scores, 2)  # both 4
    assert close is not None
    assert [layer.block for layer in close] == [1, 3]
    assert close_call(scores, 1) is None  # 2 and 4
    assert close_call(scores, 4) is None  # nothing is left out
    assert close_call(scores, 0) is None
    scores.layers[3].sigma = torch.full((3,), 4.2)
    assert close_call(scores, 2) is not None
    scores.layers[3].sigma = torch.full((3,), 4.22)
    assert close_call(scores, 2) is None
    close = close_call(scores, 1, "residual")
    assert close is not None
    assert [layer.block for layer in close] == [0, 3]


def chosen(plan: Plan) -> list[tuple[int, list[int] | None]]:
    return [(int(layer.name.split(".")[1]), layer.heads) for layer in plan.layers]


def blocks(plan: Plan) -> list[int]:
    assert all(layer.heads is None for layer in plan.layers)
    return [block for block, _ in chosen(plan)]


def test_blocks_by_variance_and_residual() -> None:
    scores = make_scores()
    assert scores.order() == [2, 1, 3, 0]
    assert [blocks(dwattn.select(scores, blocks=n)) for n in (1, 2, 3)] == [[2], [1, 2], [1, 2, 3]]
    assert scores.order("residual") == [0, 3, 2, 1]  # 0 and 3 tie: the shallower one first
    assert blocks(dwattn.select(scores, blocks=1, criterion="residual")) == [0]
    assert blocks(dwattn.select(scores, blocks=2, criterion="residual")) == [0, 3]
    plan = dwattn.select(scores, blocks=4)
    assert plan.criterion == "variance"
    assert [layer.score for layer in plan.layers] == [5, 4, 2, 4]
    plan.check_model(dwattn.adapters.describe(MODEL))


def test_scores_are_not_rounded_before_ranking() -> None:
    scores = make_scores()
    for layer, value in zip(scores.layers, (4.0004, 4.0001, 4.0003, 4.0002), strict=True):
        layer.sigma = torch.full((3,), value, dtype=torch.float64)
    assert scores.order() == [1, 3, 2, 0]


def test_heads_are_scattered_over_the_model() -> None:
    scores = make_scores()
    plan = dwattn.select(scores, heads=4)
    # 1.0 twice, then 2.0 twice: blocks 1 and 2.
    assert chosen(plan) == [(1, [0, 2]), (2, [0, 2])]
    assert [layer.score for layer in plan.layers] == [1.5, 1.5]
    plan = dwattn.select(scores, heads=5)
    assert chosen(plan) == [(1, [0, 2]), (2, None)]
    assert plan.layers[1].score == 2
    assert len(plan.layers[0].kernel_init.kernel) == 2
    # Ties are broken by depth, then by head.
    assert chosen(dwattn.select(scores, heads=7)) == [(0, [2]), (1, [0, 2]), (2, None), (3, [0])]
    assert chosen(dwattn.select(scores, heads=3, criterion="residual")) == [(0, [0, 1]), (3, [2])]
    assert sum(3 if h is None else len(h) for _, h in chosen(dwattn.select(scores, heads=12))) == 12


def test_kernel_init_is_the_mean_map_of_the_chosen_heads() -> None:
    layer = dwattn.select(make_scores(), heads=4).layers[0]
    init = layer.kernel_init
    assert init is not None
    assert layer.heads == [0, 2]
    assert init.kernel[1][2][1] == pytest.approx(25 / 100 + 1)
    assert init.prefix == [[0.1], [0.3]]
    assert init.uniform == [0.001, 0.333333]


def test_the_users_own_order() -> None:
    scores = make_scores()
    plan = dwattn.select(scores, order=[3, "blocks.0.attn"])
    assert blocks(plan) == [0, 3]
    assert plan.criterion == "manual"
    assert [layer.score for layer in plan.layers] == [None, None]
    assert blocks(dwattn.select(scores, blocks=1, order=[3, 0])) == [3]
    assert chosen(dwattn.select(scores, order=[(0, 2), (0, 1)])) == [(0, [1, 2])]
    assert chosen(dwattn.select(scores, heads=1, order=[(0, 2), (0, 1)])) == [(0, [2])]


def test_numbers_of_numpy() -> None:
    scores = make_scores()
    assert blocks(dwattn.select(scores, order=np.array([3, 0]))) == [0, 3]
    assert blocks(dwattn.select(scores, order=list(np.array([3, 0])))) == [0, 3]
    assert len(blocks(dwattn.select(scores, blocks=np.int64(2)))) == 2
    assert chosen(dwattn.select(scores, order=np.array([[0, 2], [0, 1]]))) == [(0, [1, 2])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of .* got none"),
        ({"blocks": 1, "heads": 2}, "got blocks=1, heads=2"),
        ({"blocks": 5}, "blocks=5 were asked for, but only 4"),
        ({"heads": 13}, "heads=13 were asked for, but only 12"),
        ({"blocks": 0}, "blocks=0 must be"),
        ({"blocks": -1}, "blocks=-1 must be"),
        ({"blocks": 1.5}, r"blocks=1\.5 must be a whole number"),
        ({"blocks": True}, "blocks=True must be"),
        (
            {"order": [7]},
            r"order names 7, which is not a scored layer\. Scored are .*blocks\.3\.attn",
        ),
        ({"order": [-1]}, "order names -1"),
        ({"order": [1, "blocks.1.attn"]}, r"order names 'blocks\.1\.attn' twice"),
        ({"order": []}, "order is empty"),
        ({"order": [(0, 3)]}, r"order names \(0, 3\)"),
        ({"order": [(0, 1), 2]}, "order names 2"),
        ({"order": [(0, 1), (0, 1)]}, r"order names \(0, 1\) twice"),
        ({"order": [0, 1], "blocks": 3}, "blocks=3 were asked for, but only 2"),
        ({"target_speedup": 1.2}, "needs the latencies of this machine"),
        ({"target_speedup": 0.9}, r"target_speedup=0\.9 must be more than 1"),
        ({"target_speedup": math.nan}, "must be more than 1"),
    ],
)
def test_what_cannot_be_selected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dwattn.select(make_scores(), **arguments)


def test_nan_and_missing_scores() -> None:
    scores = make_scores()
    scores.layers[1].sigma[2] = math.nan
    with pytest.raises(ScoreError, match=r"variance score of blocks\.1\.attn is nan"):
        dwattn.select(scores, blocks=1)
    with pytest.raises(ScoreError, match=r"blocks\.1\.attn is nan"):
        dwattn.select(scores, heads=1)
    assert blocks(dwattn.select(scores, blocks=1, criterion="residual")) == [0]
    scores.layers[2].residual = scores.layers[2].block_residual = None
    with pytest.raises(ScoreError, match=r"blocks\.2\.attn has no residual score"):
        dwattn.select(scores, blocks=1, criterion="residual")
    with pytest.raises(ScoreError, match="criterion='entropy'"):
        dwattn.select(scores, blocks=1, criterion="entropy")


def test_refused_layers_are_never_selected() -> None:
    scores = make_scores(refused={"blocks.2.attn": "It is already replaced."})
    del scores.layers[2]
    assert blocks(dwattn.select(scores, blocks=3)) == [0, 1, 3]
    with pytest.raises(
        PlanError, match=r"only 3 .*1 more layers were refused: blocks\.2\.attn: It is"
    ):
        dwattn.select(scores, blocks=4)
    with pytest.raises(PlanError, match=r"'blocks\.2\.attn', which was refused: It is already"):
        dwattn.select(scores, order=["blocks.2.attn"])


# --- latency


def table(attention: float = 10.0, replaced: float = 4.0) -> LatencyTable:
    layer = LayerLatency(3, attention, replaced, half_replaced=9.0)
    layers = {f"blocks.{i}.attn": layer for i in range(4)}
    return LatencyTable(100.0, layers, 1, (4, 3), "float32", "cpu", 1, "dw")


def test_target_speedup_takes_as_few_blocks_as_reach_it() -> None:
    scores, latency = make_scores(), table()
    # 100 ms, 6 ms saved by each block: 1.064, 1.136, 1.220, 1.316.
    for target, expected in ((1.01, [2]), (1.07, [1, 2]), (1.2, [1, 2, 3]), (1.31, [0, 1, 2, 3])):
        plan = dwattn.select(scores, target_speedup=target, latency=latency)
        assert blocks(plan) == expected
    with pytest.raises(
        PlanError, match=r"all 4 layers is estimated to give 1\.32x.*dw, cpu, float32"
    ):
        dwattn.select(scores, target_speedup=1.4, latency=latency)
    with pytest.raises(PlanError, match=r"0\.93x"):
        dwattn.select(scores, target_speedup=1.4, latency=table(4.0, 6.0))
    with pytest.raises(DwattnError, match=r"no layer blocks\.2\.attn"):
        dwattn.select(
            scores,
            target_speedup=1.1,
            latency=LatencyTable(9.0, {}, 1, (4, 3), "float32", "cpu", 1, "dw"),
        )


def test_latency_of_some_heads_is_interpolated() -> None:
    layer = LayerLatency(4, 10.0, 4.0, half_replaced=9.0)
    assert [layer.saved(n) for n in (1, 2, 3, 4, None)] == [0.5, 1.0, 3.5, 6.0, 6.0]
    assert LayerLatency(4, 10.0, 4.0).saved(1) == 1.5
    assert LayerLatency(1, 10.0, 4.0).saved(1) == 6
    assert table().estimate({"blocks.0.attn": 1, "blocks.1.attn": None}) == 100 - 1 - 6


def test_latency_table_as_json() -> None:
    assert LatencyTable.from_dict(table().to_dict()) == table()
    values = table().to_dict()
    for change in ({"total": None}, {"layers": 3}, {"nonsense": 1}):
        broken = {**values, **change}
        if change == {"total": None}:
            del broken["total"]
        with pytest.raises(DwattnError, match="Not a latency table"):
            LatencyTable.from_dict(broken)


@pytest.mark.parametrize("name", ["timm", "hf-dinov2-reg", "hf-vit-mae", "hf-clip-both", "hub"])
def test_latency_is_measured_and_the_model_left_as_it_is(name: str) -> None:
    model = BY_NAME[name].build().train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    measured = measure_latency(model, rounds=1)
    assert measured.grid == BY_NAME[name].grid
    assert BY_NAME[name].attention in measured.layers
    assert measured.total > 0
    assert all(x.attention > 0 and x.replaced > 0 for x in measured.layers.values())
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(DwattnError, match="rounds=0"):
        measure_latency(model, rounds=0)


def test_latency_is_measured_with_as_many_channels_as_the_model_takes() -> None:
    assert measure_latency(timm_vit(in_chans=1, depth=1), rounds=1).total > 0


def test_target_speedup_measures_the_model_when_it_must() -> None:
    with pytest.raises(PlanError, match="target_speedup=1000 cannot be reached"):
        dwattn.select(make_scores(), target_speedup=1000, model=MODEL)


def test_plans_of_a_scored_model_fit_it() -> None:
    family = BY_NAME["hf-dinov2-head"]
    model = family.build()
    scores = dwattn.score(model, family.images(4), 4, progress=False)
    plan = dwattn.select(scores, blocks=2)
    plan.check_model(dwattn.adapters.describe(model))
    assert all(layer.name.startswith("dinov2.encoder.layer.") for layer in plan.layers)
    report = dwattn.replace(model, dwattn.select(scores, heads=5), dry_run=True)
    assert report.replaced
