"""Solvers do not depend on the units in which activations come, nor on how these are divided into parts."""

from __future__ import annotations

import pytest
import torch

from dwattn.calibration.ridge import CorrectionFit
from dwattn.calibration.stencil import PrefixFit, StencilFit
from dwattn.geometry import Geometry
from dwattn.residual import StaticFit, image_keys, residual_shares, sample_positions, unexplained

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_static_prefix_rows_in_other_units(scale: float) -> None:
    v, y = torch.randn(6, 9, 5).double(), torch.randn(6, 2, 5).double()
    found = []
    for factor in (1.0, scale):
        fit = PrefixFit(2, 5, CPU)
        fit.add(factor * v, factor * y)
        found.append(fit.solve(strength=0.1))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_kernels_in_other_units(scale: float, context: bool) -> None:
    """Values by one factor, Wo by its inverse: the same layer, so the same kernels."""
    v, y = torch.randn(6, 13, 5).double(), torch.randn(6, 12, 5).double()
    found = []
    for factor in (1.0, scale):
        fit = StencilFit(5, Geometry(3, 4, 1), CPU, context=context)
        fit.add(factor * v, factor * y)
        found.append(fit.solve(strength=0.1).kernel)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_residuals_in_other_units(scale: float) -> None:
    v = torch.randn(20, 21, 4).double()
    y = v + torch.randn(20, 21, 4).double()
    sample = sample_positions(image_keys(torch.randn(20, 3, 8, 8)), Geometry(4, 5, 1), CPU)
    found = []
    for factor in (1.0, scale):
        fit = StaticFit(4, 1, CPU)
        fit.update(factor * v, factor * y, sample)
        found.append(residual_shares(*unexplained(fit.grams), torch.ones(4).double(), 2)[1])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_corrections_in_other_units(scale: float, bias: bool) -> None:
    f, noise = torch.randn(80, 6).double(), torch.randn(80, 3).double()
    e = f @ torch.randn(6, 3).double() + noise
    found = []
    for factor in (1.0, scale):
        fit = CorrectionFit(6, 3, CPU, bias=bias)
        fit.add(factor * f[:60], e[:60], held_out=False)
        fit.add(factor * f[60:], e[60:], held_out=True)
        found.append(fit.solve())
    assert found[0].strength == found[1].strength < 10
    torch.testing.assert_close(found[0].weight, scale * found[1].weight)
    torch.testing.assert_close(found[0].bias, found[1].bias)
    assert found[0].held_out == pytest.approx(found[1].held_out)
    assert found[0].fitted == pytest.approx(found[1].fitted)


@pytest.mark.parametrize("context", [True, False])
def test_kernels_are_the_ridge_regression_written_out(context: bool) -> None:
    """Strong enough that its sign, its strength and the residual that it leaves all show."""
    geometry, strength = Geometry(3, 4, 2), 0.3
    v, y = torch.randn(5, 14, 3).double(), torch.randn(5, 12, 3).double()
    fit = StencilFit(3, geometry, CPU, context=context)
    fit.add(v[:2], y[:2])
    fit.add(v[2:], y[2:])
    found = fit.solve(strength)
    for channel in range(3):
        rows = []
        for image in v[..., channel]:
            grid = torch.nn.functional.pad(image[2:].view(3, 4), (1, 1, 1, 1))
            for i in range(3):
                for j in range(4):
                    window = grid[i : i + 3, j : j + 3].flatten()
                    rest = [image[:2], image[2:].mean()[None], torch.ones(1).double()]
                    rows.append(torch.cat([window, *(rest if context else [])]))
        x, target = torch.stack(rows), y[..., channel].flatten()
        gram = x.T @ x
        energy = gram.diagonal().clone()
        energy[: 12 if context else 9] = energy[: 12 if context else 9].mean()
        ridge = strength * energy.diag()  # the constant's is its own
        w = torch.linalg.solve(gram + ridge, x.T @ target)
        rest = w[9:] if context else torch.zeros(4).double()
        torch.testing.assert_close(found.kernel[channel].flatten(), w[:9])
        torch.testing.assert_close(found.kappa[:, channel], rest[:2])
        torch.testing.assert_close(found.mu[channel], rest[2])
        torch.testing.assert_close(found.beta[channel], rest[3])
        torch.testing.assert_close(found.residual[channel], (target - x @ w).square().sum())
        torch.testing.assert_close(found.energy[channel], target.square().sum())


def test_static_prefix_rows_are_the_ridge_regression_written_out() -> None:
    v, y, strength = torch.randn(7, 8, 3).double(), torch.randn(7, 2, 3).double(), 0.3
    fit = PrefixFit(2, 3, CPU)
    fit.add(v[:3], y[:3])
    fit.add(v[3:], y[3:])
    a, b = fit.solve(strength)
    for t in range(2):
        for c in range(3):
            x = torch.stack([v[:, t, c], v[:, 2:, c].mean(1)], 1)
            gram = x.T @ x
            ridge = strength * gram.diagonal().mean() * torch.eye(2).double()
            expected = torch.linalg.solve(gram + ridge, x.T @ y[:, t, c])
            torch.testing.assert_close(torch.stack([a[t, c], b[t, c]]), expected)
