"""What runs of a study say together: means, differences by seed, intervals."""

from __future__ import annotations

import pytest
import torch

from dwattn.finetune import StudyResult
from dwattn.finetune.study_results import interval


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
