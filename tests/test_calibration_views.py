"""What the views of calibration show: crops keep proportions and are mirrored, mosaics change the light a little."""

from __future__ import annotations

import pytest
import torch

from dwattn.calibration.views import CROP, LIGHT, PhotoViews
from dwattn.data import Batch


def views(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The images, then their views."""
    held_out = torch.zeros(len(x), dtype=torch.bool)
    found = [view.pixels for view in PhotoViews(count, seed=0).of(Batch(x, len(x), x), held_out)]
    assert all(view is not None for view in found)
    return found  # type: ignore[return-value]


def test_a_crop_is_mirrored_and_keeps_the_proportions() -> None:
    """Of a slope, whose steps tell how far down and along the crop reaches, and where it begins."""
    height, width = 40, 60
    down, along = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = torch.stack([down, along, torch.zeros(height, width)]).float().expand(16, 3, -1, -1)
    crops = views(x, 2)[1]
    inner = crops[..., 4:-4, 4:-4]  # bicubic resampling bends slopes at the border
    step_down = inner[:, 0].diff(dim=1).mean((1, 2))
    step_along = inner[:, 1].diff(dim=2).mean((1, 2))
    assert (step_along < 0).all()
    assert (step_down > 0).all()
    torch.testing.assert_close(step_down, -step_along, atol=0.03, rtol=0)
    assert CROP[0] - 0.03 < step_down.min() < CROP[0] + 0.1
    assert CROP[1] - 0.1 < step_down.max() < CROP[1] + 0.03
    # Crops begin anywhere, and none beyond the image.
    assert inner.std((1, 2, 3)).std() > 0
    for channel, side in ((0, height), (1, width)):
        values = inner[:, channel]
        assert -1 < values.min() < 0.3 * side
        assert 0.7 * side < values.max() < side


def test_a_mosaic_has_another_light_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast changes around the mosaic's own mean, brightness by a share of its own deviation."""
    x = 10 + torch.rand(24, 3, 24, 24)
    lit = views(x, 3)[2].flatten(1)
    monkeypatch.setattr("dwattn.calibration.views.LIGHT", 0.0)
    plain = views(x, 3)[2].flatten(1)
    mean, deviation = plain.mean(1), plain.std(1)
    contrast, brightness = lit.std(1) / deviation - 1, (lit.mean(1) - mean) / deviation
    expected = (plain - mean[:, None]) * (1 + contrast[:, None]) + lit.mean(1, keepdim=True)
    torch.testing.assert_close(lit, expected, atol=1e-4, rtol=0)
    for change in (contrast, brightness):
        assert 0.7 * LIGHT < change.abs().max() < 1.001 * LIGHT
        assert change.min() < 0 < change.max()


def test_views_keep_the_dtype_of_the_images() -> None:
    x = torch.rand(4, 3, 16, 16, dtype=torch.bfloat16)
    assert {view.dtype for view in views(x, 3)} == {torch.bfloat16}


def test_a_mosaic_is_the_photo_at_the_top_left_and_others_elsewhere() -> None:
    x = torch.arange(24.0)[:, None, None, None].expand(24, 3, 16, 16).clone()
    corners = views(x, 3)[2][8:, 0][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    for corner in range(1, 4):
        assert (corners[:, corner] != corners[:, 0]).float().mean() > 0.7
    for one, other in ((1, 2), (1, 3), (2, 3)):
        assert (corners[:, one] != corners[:, other]).float().mean() > 0.5
    # Contrast and brightness keep the order of the parts, so the newest photo is the brightest part, nowhere exceeded.
    assert (corners[:, 0] >= corners[:, 1:].max(1).values - 1e-4).all()
