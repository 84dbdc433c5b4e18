"""Whole models and single blocks with replaced attention, beside the runtimes people use; and the time to calibrate.

    python benchmarks/bench_models.py --json benchmarks/results/models.json      # quick: ViT-S and ViT-B at 224 px
    python benchmarks/bench_models.py --all --json everything.json                # an hour: to ViT-L and 518 px

ViTs of DINOv2's sizes (patches of 14 pixels, LayerScale, CLS) with random weights, which cost what trained ones cost; half
of the blocks are replaced. All run the same model in the same rounds: PyTorch eager with its fused attention (the
base of the ratios) and without it, torch.compile, ONNX Runtime and OpenVINO where they are installed. ``removed`` leaves
the attention of the same blocks out: no replacement can be faster in the same runtime. ``token merging`` merges a
sixteenth of the tokens in every block. A finished case is kept in the
file and not measured again unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import rounds
import torch
from bench_ops import MODELS, RUNTIMES, SIZES, show
from peers.merging import MergedViT
from torch import Tensor, nn

import dwattn
from dwattn.adapters import describe
from dwattn.demo._torchvision import make_importable
from dwattn.demo.timing import RemovedAttention

PATCH = 14
#: Blocks of each model.
DEPTHS = {"ViT-S": 12, "ViT-B": 12, "ViT-L": 24, "ViT-g": 40}
BASE = "mhsa, eager"
Calls = dict[str, Callable[[], Any]]


def pixels(size: str) -> tuple[int, int]:
    """Height and width of an image with the grid of ``SIZES``."""
    height, width = SIZES[size]
    return height * PATCH, width * PATCH


def build(model: str, size: str, depth: int | None = None) -> nn.Module:
    """A ViT without head that returns all tokens."""
    make_importable()
    import timm

    torch.manual_seed(0)
    dim, heads = MODELS[model]
    vit = timm.create_model(
        "vit_small_patch14_dinov2", img_size=pixels(size), embed_dim=dim, num_heads=heads,
        depth=depth or DEPTHS[model], num_classes=0, global_pool="",
    )  # fmt: skip
    return vit.eval()


def variants(vit: nn.Module) -> dict[str, nn.Module]:
    """``vit`` as it is, with half of its blocks replaced, and without their attention."""
    count = max(1, len(describe(vit).blocks) // 2)
    plan = dwattn.Plan.for_layers(vit, list(range(count)))
    made = {"mhsa": vit}
    rank = vit.embed_dim // 4
    for name, options in (("dw", {}), ("lowrank_dw", {"variant": "lowrank_dw", "rank": rank})):
        made[name] = copy.deepcopy(vit)
        dwattn.replace(made[name], plan, progress=False, **options)
    made["removed"] = copy.deepcopy(vit)
    for block in made["removed"].blocks[:count]:
        block.attn = RemovedAttention(False)
    return made


class Merging(nn.Module):
    """``vit`` with token merging; what is exported, since dwattn's own export knows no merging."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.merged = MergedViT(vit, (vit.patch_embed.num_patches) // 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.merged.forward_features(images)

    def export(self, path: Path, images: Tensor) -> None:
        program = torch.onnx.export(self, (images,), dynamo=True, opset_version=18, verbose=False)
        program.save(path)


def unfused(vit: nn.Module) -> nn.Module:
    """Attention written out, as before fused operators."""
    plain = copy.deepcopy(vit)
    for block in plain.blocks:
        block.attn.fused_attn = False
    return plain


def model_calls(model: str, size: str, batch: int, options: argparse.Namespace) -> Calls:
    """Whole models in every runtime that is asked for and installed."""
    made = variants(build(model, size))
    x = torch.randn(batch, 3, *pixels(size))
    made["token merging"] = Merging(made["mhsa"]).eval()
    calls: Calls = {f"{name}, eager": lambda vit=vit: vit(x) for name, vit in made.items()}
    written_out = unfused(made["mhsa"])
    calls["mhsa unfused, eager"] = lambda: written_out(x)
    compared = ("mhsa", "dw", "lowrank_dw", "token merging")
    if model in options.compile:
        for name in compared[:-1]:
            fast = torch.compile(made[name])
            calls[f"{name}, torch.compile"] = lambda fast=fast: fast(x)
    installed = [name for name in options.runtime if importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        for name in compared if installed else ():
            path = Path(folder) / f"{name}.onnx"
            if isinstance(made[name], Merging):
                made[name].export(path, x)
            else:
                dwattn.export(made[name], path, pixels(size), check=False)
            for runtime in installed:
                call = loaded(runtime, path, x, options.threads)
                if call is not None:
                    calls[f"{name}, {runtime}"] = call
    return calls


def loaded(runtime: str, path: Path, x: Tensor, threads: int) -> Callable[[], Any] | None:
    """A model file in a runtime; None, with the reason printed, where that refuses it."""
    try:
        return RUNTIMES[runtime](path, x, threads)
    except RuntimeError as error:
        print(f"{runtime} refuses {path.stem}: {' '.join(str(error).split())[:300]}", flush=True)
        return None


def block_calls(model: str, size: str, batch: int) -> Calls:
    """One block: norms, attention or its replacement, MLP, residual sums."""
    height, width = SIZES[size]
    x = torch.randn(batch, 1 + height * width, MODELS[model][0])
    made = variants(build(model, size, depth=1))
    return {f"{name}, eager": lambda block=vit.blocks[0]: block(x) for name, vit in made.items()}


def calibration(photos: int, seconds: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Seconds to convert half of a ViT-S at 224 px with random pictures, one view each, and of their forward pass."""
    vit = build("ViT-S", "224")
    images = torch.randn(photos, 3, *pixels("224"))
    start = seconds()
    with torch.inference_mode():
        for part in images.split(16):
            vit(part)
    forward = seconds() - start
    found: dict[str, Any] = {
        "photos": photos,
        "threads": torch.get_num_threads(),
        "forward_s": forward,
    }
    plan = dwattn.Plan.for_layers(vit, list(range(DEPTHS["ViT-S"] // 2)))
    for name, more in (
        ("dw", {}),
        ("lowrank_dw", {"variant": "lowrank_dw", "rank": vit.embed_dim // 4}),
    ):
        student, start = copy.deepcopy(vit), seconds()
        dwattn.replace(student, plan, calibrate=images, views=1, progress=False, **more)
        found[f"{name}_s"] = seconds() - start
    return found


def cases(options: argparse.Namespace) -> dict[str, Callable[[], Calls]]:
    """What makes the candidates of each case, by its name."""
    found: dict[str, Callable[[], Calls]] = {}
    for model in options.model:
        for size in options.size:
            for batch in options.batch:
                where = f"{model}/{size} fp32 batch={batch} threads={options.threads}"
                found[f"block {where}"] = lambda m=model, s=size, b=batch: block_calls(m, s, b)
                found[f"model {where}"] = lambda m=model, s=size, b=batch: model_calls(
                    m, s, b, options
                )
    return found


def earlier(path: Path | None) -> dict[str, Any]:
    """The results of an earlier run."""
    return rounds.read(path) if path is not None and path.is_file() else {}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=DEPTHS, default=["ViT-S", "ViT-B"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["224"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", nargs="*", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=DEPTHS,
        default=["ViT-S"],
        help="models for torch.compile, a minute each",
    )
    parser.add_argument(
        "--all", action="store_true", help="ViT-S, B and L at 224, 336 and 518 px, compiled too"
    )
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="per whole model; a block gets a quarter"
    )
    parser.add_argument(
        "--photos", type=int, default=48, help="to calibrate; 0 leaves calibration out"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--notes", default="", help="kept in the file")
    parser.add_argument("--json", type=Path, help="write JSON, and CSV beside it")
    options = parser.parse_args()
    if options.all:
        options.model = options.compile = ["ViT-S", "ViT-B", "ViT-L"]
        options.size = ["224", "336", "518"]
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    before = {} if options.again else earlier(options.json)
    names = [field.name for field in fields(rounds.Measured)]
    results = [rounds.Measured(**{n: row[n] for n in names}) for row in before.get("results", [])]
    fitted = before.get("calibration")

    def save() -> None:
        if options.json:
            rounds.write(
                options.json, "models", results, notes=options.notes, seconds_per_case=options.seconds,
                calibration=fitted,
            )  # fmt: skip

    for case, make in cases(options).items():
        if any(row.case == case for row in results):
            continue
        share = 0.25 if case.startswith("block") else 1.0
        calls = make()
        with torch.inference_mode():
            found = rounds.summarise(case, rounds.measure(calls, share * options.seconds), BASE)
        show(case, found)
        results += found
        save()
    if options.photos and not (fitted and fitted["photos"] == options.photos):
        fitted = calibration(options.photos)
        save()
    if fitted:
        print(
            f"{fitted['photos']} photos through a ViT-S: {fitted['forward_s']:.1f} s; "
            f"converted: dw {fitted['dw_s']:.1f} s, lowrank_dw {fitted['lowrank_dw_s']:.1f} s"
        )


if __name__ == "__main__":
    main()
