"""Results print as tables, and are short where they are only looked at."""

from __future__ import annotations

import torch
from rich.console import Console

import dwattn
from dwattn.finetune.estimate import Estimate
from dwattn.printed import Printed
from dwattn.refinement import Refinement
from dwattn.surgery_report import ReplacementReport
from support.models import timm_vit


def results() -> list[Printed]:
    model = timm_vit()
    scores = dwattn.score(model, torch.randn(2, 3, 32, 24), num_images=2, progress=False)
    plan = dwattn.select(scores, blocks=1)
    report = dwattn.replace(model, plan, dry_run=True)
    found = Refinement(plan, (1,), (2,), {(1,): 0.25, (2,): 0.125})
    return [scores, report, found, Estimate(10, 0.5, *[1] * 9)]


def test_printing_shows_the_table() -> None:
    words = ("Sigma_b", "would be replaced", "0.125", "A run would take")
    for result, word in zip(results(), words, strict=True):
        text = str(result)
        assert word in text
        assert "\x1b" not in text
        console = Console(width=140)
        with console.capture() as capture:
            console.print(result)
        assert word in capture.get()


def test_scores_are_short_at_the_prompt() -> None:
    scores, report, *_ = results()
    assert isinstance(scores, dwattn.Scores)
    assert repr(scores) == "<Scores of timm VisionTransformer: 4 layers, 2 images, grid 4x3>"
    assert repr(scores.layers[0]).startswith("<LayerScore blocks.0.attn: Sigma_b ")
    assert isinstance(report, ReplacementReport)
