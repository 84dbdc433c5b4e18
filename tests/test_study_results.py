"""What runs of a study say together: means, differences by seed, intervals, and the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dwattn
from dwattn.finetune import StudyResult
from dwattn.finetune.study_results import interval
from dwattn.report.study import StudyReport
from dwattn.report.study_figures import aligned
from support.models import BY_NAME

FAMILY = BY_NAME["hub-reg4"]


def test_the_summary_is_paired_by_seed() -> None:
    rows = [
        {"label": list(label), "seed": seed, "replaced": [], "cell": "", "metrics": {"top1": value}}
        for label, values in (
            (("mhsa", "", "", "two-stage", ""), (0.8, 0.6, 0.7)),
            (("dw", "variance", "2", "two-stage", "gaussian"), (0.79, 0.58, 0.68)),
        )
        for seed, value in enumerate(values)
    ]
    base, dw = StudyResult(rows).summary()
    assert base["mean"] == pytest.approx(0.7)
    assert base["interval"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert dw["difference"] == pytest.approx(-0.05 / 3)
    deviation = torch.tensor([-0.01, -0.02, -0.02]).std().item()
    assert dw["difference_interval"] == pytest.approx(4.303 * deviation / 3**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(10, 2.2281), (30, 2.0423), (31, 2.0395), (60, 2.0003)]
)
def test_intervals_of_many_seeds(freedom: int, quantile: float) -> None:
    values = [float(seed) for seed in range(freedom + 1)]
    _, half = interval(values)
    assert half == pytest.approx(
        quantile * torch.tensor(values).std().item() / len(values) ** 0.5, rel=2e-3
    )


def test_deviations_are_aligned_on_their_query() -> None:
    height, width = 3, 4
    deviation = np.zeros((height, width, height, width))
    for i in range(height):
        for j in range(width - 1):
            deviation[i, j, i, j + 1] = 1 + i
    found = aligned(deviation.reshape(12, 12), (height, width))
    wanted = np.zeros((5, 7))
    wanted[2, 4] = 2  # one to the right of the centre, the mean over rows
    np.testing.assert_allclose(found, wanted)


def test_a_report_pairs_selections_and_marks_heads() -> None:
    pytest.importorskip("matplotlib")

    def row(label: tuple[str, ...], seed: int, value: float, *replaced: str) -> dict[str, Any]:
        return {"label": list(label), "seed": seed, "replaced": list(replaced), "metrics": {"miou": value}}  # fmt: skip

    model = FAMILY.build()
    scores = dwattn.score(model, FAMILY.images(4), num_images=4, keep_maps=True, progress=False)
    dw = ("dw", "variance", "1", "two-stage", "calibrated")
    heads = ("dw", "dsp", "2 heads", "two-stage", "calibrated")
    rows = [row(("mhsa", "", "", "two-stage", ""), seed, 0.5) for seed in (0, 1)]
    rows += [row(dw, 0, 0.49, "blocks.1.attn"), row(dw, 1, 0.47, "blocks.2.attn")]
    rows += [row(heads, 0, 0.48, "blocks.0.attn:0", "blocks.3.attn:1")]
    rows += [row((*dw[:4], "gaussian"), 0, 0.40, "blocks.1.attn")]
    timed = [{"attention": "dw", "count": "1", "ratio": 0.9}, {"attention": "dw", "count": "2 heads", "ratio": 0.95}]  # fmt: skip
    report = StudyReport(
        StudyResult(rows), "dwattn study", before=scores, after=scores, latency=timed
    )
    best, scattered = report.points()
    assert best.difference == pytest.approx(-2.0)  # the calibrated start, not the Gaussian one
    assert (best.blocks, best.ratio, scattered.blocks, scattered.ratio) == (1, 0.9, None, 0.95)
    chosen = report.chosen(scores)
    assert chosen["dsp 2 heads"] == [{(0, 0), (3, 1)}]
    assert [sorted({b for b, _ in run}) for run in chosen["variance 1"]][:2] == [[1], [2]]
    assert len(report.figures()) == 7
    titles = [table["title"] for table in report.tables()]
    assert titles[0].startswith("Layers")
    assert "Starting kernels" in titles
    assert not StudyReport(StudyResult(rows[:2]), "nothing but baselines").tables()
