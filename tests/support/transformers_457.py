"""Run by a test in a process of its own, with transformers 4.57 in front of the installed release.

Converts, saves, reloads and restores one model of every transformers family and prints one line for
each.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from support import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402

import dwattn  # noqa: E402
from dwattn.adapters import describe  # noqa: E402
from support.models import HF, Family  # noqa: E402
from support.more_families import MORE_HF  # noqa: E402

#: Not in that release.
LATER = ("hf-pixio",)


def check(family: Family, folder: Path) -> str:
    """The journey of one model; the text says what was found."""
    model, images = family.build(), family.images()
    layout = describe(model)
    assert (layout.grid, layout.num_prefix) == (family.grid, family.num_prefix)
    scales = [block.attention_scale is not None for block in layout.blocks]
    assert scales == [family.layer_scale] * 4
    assert all(isinstance(block.mlp_out, torch.nn.Linear) for block in layout.blocks)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        dwattn.replace(model, dwattn.Plan.for_layers(model, [0, 2], heads=[None, [1]]))
        converted = family.tokens(model, images)
        dwattn.save(model, folder / "converted.safetensors")
        loaded = dwattn.load(family.build, folder / "converted.safetensors")
        assert torch.equal(family.tokens(loaded, images), converted)
        dwattn.restore(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    return f"{family.name} {layout.blocks[0].attention_name}"


if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    with tempfile.TemporaryDirectory() as folder:
        for family in HF + [family for family in MORE_HF if family.name not in LATER]:
            print(check(family, Path(folder)))
    sys.exit(0)
