"""``refine``: a better set of blocks than those of the lowest scores, found by exchanging blocks.

A score judges each block alone, but what a set of replaced blocks loses depends on the whole set: attention that is kept can
restore what the layers before it lost, so kept layers do more if they are spread out. Here a set is judged as a whole: a copy
of the model is converted and calibrated on some images, and its tokens after the last block are compared with the original's
on other images. The search starts from the lowest scores and exchanges one chosen block for one that is not, as long as that
brings the copy closer to the original.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from dwattn import data as image_data
from dwattn.adapters import BackboneLayout, describe
from dwattn.data import Batch
from dwattn.errors import DataError, PlanError
from dwattn.fidelity import drift
from dwattn.files import parse_json, write_atomically
from dwattn.finite import all_finite
from dwattn.plan import Plan
from dwattn.printed import Printed
from dwattn.progress import progress_bar
from dwattn.scores import Scores
from dwattn.selection import rank_blocks, select
from dwattn.surgery import replace
from dwattn.untouched import deep_copy, untouched

KIND, SCHEMA_VERSION = "dwattn-trials", 1
#: Without ``judge``, every ``EVERY``-th batch of ``images`` is held out to compare on.
EVERY = 4
#: An exchange is made only if it lowers the drift by this share.
MIN_GAIN = 0.01
Blocks = tuple[int, ...]


@dataclass(frozen=True)
class Refinement(Printed):
    """What was found; ``print()`` shows the sets.

    Args:
        plan: of the best set.
        start: the blocks of the lowest scores, where the search began; blocks: the best set.
        drift: by set, share by which the converted model's patch tokens differ from the original's after the last
            block: ``|t' - t|^2 / |t - mean(t)|^2``.
    """

    plan: Plan
    start: Blocks
    blocks: Blocks
    drift: dict[Blocks, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "start": list(self.start), "blocks": list(self.blocks), "trials": _listed(self.drift),
            "plan": json.loads(self.plan.to_json()),
        }  # fmt: skip

    def table(self) -> Table:
        """The sets that were tried."""
        sets = f"{len(self.drift)} set{'s' if len(self.drift) > 1 else ''} of {len(self.blocks)}"
        title = f"{sets} block{'s' if len(self.blocks) > 1 else ''}, best first"
        table = Table(title=title, min_width=len(title))
        table.add_column("blocks")
        table.add_column("drift", justify="right")
        table.add_column("")
        for blocks, apart in sorted(self.drift.items(), key=lambda pair: pair[1]):
            mark = "chosen" if blocks == self.blocks else ""
            mark += " lowest scores" if blocks == self.start else ""
            table.add_row(", ".join(map(str, blocks)), f"{apart:.3g}", mark.strip())
        return table


def refine(
    model: nn.Module,
    scores: Scores,
    images: Any,
    blocks: int,
    *,
    judge: Any = None,
    criterion: str = "residual",
    width: int = 3,
    rounds: int = 2,
    num_images: int = 80,
    trials: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **replace_options: Any,
) -> Refinement:
    """Choose whole blocks by what they lose together, instead of each by its score as :func:`dwattn.select` does.

    A trial costs a calibration on ``num_images`` images, and there are at most ``1 + rounds * width**2``.

    Args:
        model: the original; it stays as it is.
        scores: of :func:`dwattn.score`.
        images: to calibrate on, as for :func:`dwattn.score`; the first ``num_images`` are used.
        blocks: how many to replace.
        judge: images to compare on. By default every fourth batch of ``images``; give images of other scenes where
            those of ``images`` resemble each other, so that no set wins by fitting these scenes.
        criterion: by which the search starts and whose order says which blocks are exchanged.
        width: how many blocks are considered on either side of an exchange: the ``width`` chosen ones of highest score, and
            the ``width`` others of lowest score.
        rounds: exchanges at most; the search ends earlier if none helps.
        trials: JSON file of the sets tried so far; a search that was stopped continues from it.
        seed, replace_options: of :func:`dwattn.replace` (``variant=``, ``rank=``, ``views=``, ...); here ``views`` is 1
            unless given.

    Raises:
        PlanError: more blocks than can be replaced, ``width`` or ``rounds`` below 1, ``trials`` of another search.
        DataError: no images, or too few to keep some apart.
        CalibrationError: a set that cannot be calibrated.
    """
    if width < 1 or rounds < 1:
        raise PlanError(f"width={width} and rounds={rounds} must be at least 1.")
    chosen = select(scores, blocks=blocks, criterion=criterion)
    ranked = [layer.block for layer in rank_blocks(scores, criterion)]
    start = tuple(sorted(ranked[: len(chosen.layers)]))
    options = {"variant": "dw", "views": 1, **replace_options, "seed": seed}
    search = _Search(model, scores, options, *_sides(model, images, judge, num_images))
    search.remember(trials, {"criterion": criterion, "blocks": blocks, "num_images": num_images})
    with progress_bar("refining", "sets", show=progress) as bar:
        task = bar.add_task("sets", total=1 + rounds * width**2)
        best = start
        search.try_out(best)
        bar.advance(task)
        for _ in range(rounds):
            found = exchanges(best, ranked, width)
            for candidate in found:
                search.try_out(candidate)
                bar.advance(task)
            nearest = min(found, key=lambda tried: search.drift[tried], default=best)
            if search.drift.get(nearest, 0.0) > search.drift[best] * (1 - MIN_GAIN):
                break
            best = nearest
        bar.update(task, completed=bar.tasks[0].total)
    return Refinement(search.plan(best), start, best, dict(search.drift))


def exchanges(chosen: Blocks, ranked: Sequence[int], width: int) -> list[Blocks]:
    """The sets that differ from ``chosen`` in one block: each of the ``width`` highest-ranked chosen blocks exchanged for each
    of the ``width`` lowest-ranked others.
    """
    inside = [block for block in ranked if block in chosen][::-1][:width]
    outside = [block for block in ranked if block not in chosen][:width]
    return [tuple(sorted({*chosen, added} - {removed})) for removed in inside for added in outside]


class _Search:
    """The sets tried so far, and what a trial needs.

    Args:
        fitted: batches to calibrate on; judged: batches to compare on.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Scores,
        options: dict[str, Any],
        fitted: list[Batch],
        judged: list[Batch],
    ) -> None:
        self.model, self.scores, self.options = model, scores, options
        self.fitted, self.judged = fitted, judged
        self.drift: dict[Blocks, float] = {}
        self.path: Path | None = None
        self.settings: dict[str, Any] = {}
        with untouched(model):
            self.original = _tokens(model, describe(model), judged)

    def plan(self, blocks: Blocks) -> Plan:
        plan = select(self.scores, order=list(blocks))
        return plan.model_copy(update={"criterion": "refined"})

    def try_out(self, blocks: Blocks) -> None:
        """Convert a copy and note its drift, unless that is known."""
        if blocks in self.drift:
            return
        student = deep_copy(self.model)
        images = [batch.inputs for batch in self.fitted]
        replace(student, self.plan(blocks), calibrate=images, progress=False, **self.options)
        layout = describe(student)
        with untouched(student):
            tokens = _tokens(student, layout, self.judged)
        apart = drift(self.original, tokens, layout.num_prefix)
        if not math.isfinite(apart):
            raise DataError(
                "All patch tokens are the same on the images to compare on; give varied photos."
            )
        self.drift[blocks] = apart
        self._write()

    def remember(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        """Read the trials in the file, if it exists, and write further ones to it.

        Raises:
            PlanError: it cannot be read, or holds trials of another search.
        """
        if path is None:
            return
        self.path = Path(path)
        pixels = [b.pixels for b in (*self.fitted, *self.judged) if b.pixels is not None]
        self.settings = {
            **settings,
            "options": {k: repr(v) for k, v in sorted(self.options.items()) if v is not None},
            "model": self.scores.model.model_dump(mode="json"),
            "images": [sum(batch.size for batch in side) for side in (self.fitted, self.judged)],
            "pixels": f"{sum(float(p.double().sum()) for p in pixels):.9g}",
        }
        if not self.path.exists():
            return
        try:
            found = parse_json(self.path.read_bytes())
            known = (found["kind"], found["schema_version"]) == (KIND, SCHEMA_VERSION)
            same = known and found["settings"] == self.settings
            kept = {tuple(map(int, t["blocks"])): float(t["drift"]) for t in found["trials"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"Cannot read the trials in {self.path} ({type(error).__name__}: {error}). Remove the file to begin anew."
            ) from None
        if not same:
            raise PlanError(
                f"{self.path} holds trials of another search: of another model, other images or other options. "
                f"Name another file, or remove this one."
            )
        self.drift |= kept

    def _write(self) -> None:
        if self.path is None:
            return
        document = {
            "kind": KIND, "schema_version": SCHEMA_VERSION, "settings": self.settings,
            "trials": _listed(self.drift),
        }  # fmt: skip
        with write_atomically(self.path, PlanError) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _listed(trials: dict[Blocks, float]) -> list[dict[str, Any]]:
    return [{"blocks": list(blocks), "drift": value} for blocks, value in trials.items()]


def _sides(
    model: nn.Module, images: Any, judge: Any, num_images: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches to calibrate on, and batches to compare on."""
    parameter = next(model.parameters())

    def batches(data: Any, limit: int | None) -> list[Batch]:
        return list(
            image_data.iterate(
                data, batch_size=4, num_images=limit, device=parameter.device, dtype=parameter.dtype
            )
        )

    fitted = batches(images, num_images)
    if judge is not None:
        return fitted, batches(judge, None)
    if len(fitted) < 2:
        raise DataError(
            f"One batch of {fitted[0].size} images cannot be divided into images to calibrate on and images to compare "
            f"on; give more images, smaller batches (--batch-size), or those to compare on as judge= (--judge)."
        )
    every = min(EVERY, len(fitted))
    rest = [batch for index, batch in enumerate(fitted) if index % every != every - 1]
    return rest, fitted[every - 1 :: every]


@torch.inference_mode()
def _tokens(model: nn.Module, layout: BackboneLayout, batches: Sequence[Batch]) -> Tensor:
    """Tokens ``(M, N, D)`` after the last block, fp32 on the CPU.

    Raises:
        DataError: they are not finite, or images have several sizes.
    """
    seen: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, (tuple, list)) else output
        seen.append(tokens.float().cpu())

    handle = layout.blocks[-1].module.register_forward_hook(note)
    try:
        for batch in batches:
            batch.call(model)
    finally:
        handle.remove()
    if not seen:
        raise DataError(
            f"The model finished without calling its last block {layout.blocks[-1].name!r}."
        )
    sizes = sorted({tokens.shape[1] for tokens in seen})
    if len(sizes) > 1:
        raise DataError(f"The images to compare on give {sizes} tokens; take images of one size.")
    tokens = torch.cat(seen)
    if not all_finite(tokens):
        raise DataError("The model's tokens are not finite on the images to compare on.")
    return tokens
