"""Random views: what colours, crops and mirrors do to an image, and the mask that goes with them."""

from __future__ import annotations

import pytest
import torch

from dwattn.finetune.views import Augment

FULL = {"crop": (1.0, 1.0), "ratio": (1.0, 1.0)}


def test_draws_in_the_middle_leave_the_colours() -> None:
    image = torch.randn(3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(Augment(colour=0.4)._coloured(image, [0.5, 0.5, 0.5]), image)


@pytest.mark.parametrize(("draw", "share"), [(0.0, -0.4), (0.75, 0.2)])
def test_each_draw_changes_one_thing(draw: float, share: float) -> None:
    """Brightness by a share of the deviation, contrast around the mean, saturation around grey."""
    image, augment = torch.randn(3, 8, 8, dtype=torch.float64), Augment(colour=0.4)
    brighter = augment._coloured(image, [draw, 0.5, 0.5])
    torch.testing.assert_close(brighter, image + share * image.std())
    contrast = augment._coloured(image, [0.5, draw, 0.5])
    torch.testing.assert_close(contrast - image.mean(), (1 + share) * (image - image.mean()))
    vivid, grey = augment._coloured(image, [0.5, 0.5, draw]), image.mean(0)
    torch.testing.assert_close(vivid - grey, (1 + share) * (image - grey))


def test_a_view_of_the_whole_image_is_the_image_or_its_mirror() -> None:
    image, mask = torch.randn(3, 6, 9), torch.arange(54).view(6, 9)
    mirrored = 0
    for view in range(1, 33):
        seen, moved = Augment(**FULL)(image, 0, (0, view), mask)
        assert moved is not None
        flipped = not torch.equal(seen, image)
        torch.testing.assert_close(seen, image.flip(-1) if flipped else image)
        assert torch.equal(moved, mask.flip(-1) if flipped else mask)
        mirrored += flipped
    assert 8 <= mirrored <= 24
    never, always = (Augment(**FULL, flip=flip)(image, 0, (0, 1))[0] for flip in (0.0, 1.0))
    assert torch.equal(never, image)
    assert torch.equal(always, image.flip(-1))


def test_crops_have_the_areas_and_shapes_that_were_asked_for() -> None:
    """Of slopes, whose steps in the view tell how many rows and columns it shows."""
    down, along = torch.meshgrid(torch.arange(200.0), torch.arange(300.0), indexing="ij")
    image = torch.stack([down, along, down + along])
    augment = Augment(crop=(0.25, 0.5), ratio=(0.5, 2.0), flip=0.0, size=(50, 50))
    areas, ratios, tops = [], [], []
    for view in range(1, 65):
        seen, _ = augment(image, 3, (0, view))
        inner = seen[:, 10:-10, 10:-10]
        height = 50 * float(inner[0].diff(dim=0).mean()) / 200
        width = 50 * float(inner[1].diff(dim=1).mean()) / 300
        areas.append(height * width)
        ratios.append(width / height)
        tops.append(float(inner[0].min()) / 200)
    assert 0.23 < min(areas) < 0.3
    assert 0.45 < max(areas) < 0.52
    assert 0.48 < min(ratios) < 0.75
    assert 1.3 < max(ratios) < 2.1
    assert min(tops) < 0.15
    assert max(tops) > 0.4
