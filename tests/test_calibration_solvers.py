"""The solvers of closed-form calibration, against brute force and planted weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dwattn import reference
from dwattn.calibration import ridge
from dwattn.calibration.lowrank import OutputCovariance, kept_energy, output_directions
from dwattn.calibration.ridge import CorrectionFit
from dwattn.calibration.stencil import PrefixFit, StencilFit
from dwattn.errors import CalibrationError
from dwattn.geometry import Geometry


class TestCorrectionFit:
    def data(self, noise: float, count: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = torch.randn(count, 6).double()
        weight, bias = torch.randn(3, 6).double(), torch.randn(3).double()
        error = features @ weight.T + bias + noise * torch.randn(count, 3).double()
        return features, error, weight, bias

    def test_recovers_a_linear_error(self) -> None:
        features, error, weight, bias = self.data(noise=0.0)
        fit = CorrectionFit(6, 3, torch.device("cpu"))
        fit.add(features[:300], error[:300], held_out=False)
        fit.add(features[300:], error[300:], held_out=True)
        found = fit.solve()
        assert (found.weight - weight).abs().max() < 1e-3
        assert (found.bias - bias).abs().max() < 1e-3
        assert found.held_out < 1e-6

    def test_moment_error_equals_direct_error(self) -> None:
        features, error, _weight, _bias = self.data(noise=1.0)
        moments = ridge._Moments(6, 3, torch.device("cpu"), centred=True)
        for f, e in zip(features.split(50), error.split(50), strict=True):
            moments.add(f, e)
        guess, offset = torch.randn(3, 6).double(), torch.randn(3).double()
        direct = (error - features @ guess.T - offset).square().sum(1).mean()
        assert moments.error(guess.T, offset) == pytest.approx(float(direct), rel=1e-10)

    def test_a_large_mean_costs_no_accuracy(self) -> None:
        """In fp32 the squares of the mean would be rounded by more than the variance."""
        features, error, weight, bias = self.data(noise=0.0)
        moved, bias = (features + 3000).float(), bias - 3000 * weight.sum(1)
        fit = CorrectionFit(6, 3, torch.device("cpu"))
        fit.add(moved[:300], error[:300].float(), held_out=False)
        fit.add(moved[300:], error[300:].float(), held_out=True)
        found = fit.solve()
        assert (found.weight - weight).abs().max() < 1e-3
        assert (found.bias - bias).abs().max() < 1e-3 * bias.abs().max()

    def test_features_that_never_vary_are_named(self) -> None:
        fit = CorrectionFit(6, 3, torch.device("cpu"), bias=False)
        for held_out in (False, True):
            fit.add(torch.zeros(10, 6), torch.ones(10, 3), held_out=held_out)
        fit.fit.ff -= 1e-20  # what rounding may leave
        with pytest.raises(CalibrationError, match="may be constant"):
            fit.solve()

    def test_a_correction_that_hurts_on_held_out_images_is_dropped(self) -> None:
        """The held-out error has the opposite slope: every ridge strength would make it worse."""
        features, error, _, _ = self.data(noise=0.0)
        fit = CorrectionFit(6, 3, torch.device("cpu"))
        fit.add(features[:300], error[:300], held_out=False)
        fit.add(features[300:], -error[300:], held_out=True)
        found = fit.solve()
        assert found.strength == float("inf")
        assert not found.weight.any()
        assert not found.bias.any()

    def test_without_bias_the_offset_stays_zero(self) -> None:
        features, error, _, _ = self.data(noise=0.1)
        fit = CorrectionFit(6, 3, torch.device("cpu"), bias=False)
        fit.add(features[:300], error[:300], held_out=False)
        fit.add(features[300:], error[300:], held_out=True)
        assert not fit.solve().bias.any()


@pytest.mark.parametrize(
    "geometry", [Geometry(3, 5, 0), Geometry(4, 2, 1), Geometry(3, 3, 5), Geometry(1, 7, 1)]
)
def test_stencil_fit_recovers_planted_weights(geometry: Geometry) -> None:
    channels = 4
    v = torch.randn(60, geometry.num_tokens, channels).double()
    planted = {
        "kernel": torch.randn(channels, 3, 3).double(),
        "kappa": torch.randn(geometry.num_prefix, channels).double(),
        "mu": torch.randn(channels).double(),
        "beta": torch.randn(channels).double(),
    }
    if geometry.height == 1:  # rows that are always outside the grid cannot be seen
        planted["kernel"][:, 0] = planted["kernel"][:, 2] = 0
    target = reference.dw_aggregate(v, planted["kernel"], geometry, *list(planted.values())[1:])
    fit = StencilFit(channels, geometry, torch.device("cpu"))
    for part, y in zip(v.split(20), target.split(20), strict=True):
        fit.add(part, y)
    found = fit.solve(strength=1e-12)
    for name, value in planted.items():
        torch.testing.assert_close(getattr(found, name), value, atol=1e-6, rtol=1e-6)
    assert float(found.residual.sum() / found.energy.sum()) < 1e-9


def test_stencil_fit_is_no_worse_than_any_other_weights() -> None:
    geometry = Geometry(4, 4, 1)
    v, y = torch.randn(40, 17, 3).double(), torch.randn(40, 16, 3).double()
    fit = StencilFit(3, geometry, torch.device("cpu"))
    fit.add(v, y)
    found = fit.solve(strength=1e-9)
    best = (
        (y - reference.dw_aggregate(v, found.kernel, geometry, found.kappa, found.mu, found.beta))
        .square()
        .sum()
    )
    nudged = found.kernel + 0.01
    other = (
        (y - reference.dw_aggregate(v, nudged, geometry, found.kappa, found.mu, found.beta))
        .square()
        .sum()
    )
    assert best < other
    assert float(best) == pytest.approx(float(found.residual.sum()), rel=1e-6)


def test_prefix_fit_recovers_planted_rows() -> None:
    geometry, a, b = Geometry(3, 4, 2), torch.randn(2, 5).double(), torch.randn(2, 5).double()
    v = torch.randn(50, geometry.num_tokens, 5).double()
    fit = PrefixFit(2, 5, torch.device("cpu"))
    fit.add(v, reference.static_prefix_rows(v, geometry, a, b))
    found = fit.solve(strength=1e-12)
    torch.testing.assert_close(found[0], a)
    torch.testing.assert_close(found[1], b)


def test_directions_are_the_best_of_each_head() -> None:
    y, wo = torch.randn(500, 8).double() @ torch.randn(8, 8).double(), torch.randn(6, 8).double()
    covariance = OutputCovariance(8, torch.device("cpu"))
    covariance.add(y[:200])
    covariance.add(y[200:])
    cov = covariance.covariance()
    torch.testing.assert_close(cov, torch.cov(y.T, correction=0), rtol=1e-4, atol=1e-4)
    found = output_directions(cov, wo, num_heads=2)
    assert torch.equal(found.strength, found.strength.sort(descending=True).values)
    # Within a head the kept channels are uncorrelated with unit variance, and lose exactly the dropped energy.
    head = found.mix[found.mix[:, :4].abs().sum(1) > 0][:, :4]
    torch.testing.assert_close(
        head @ cov[:4, :4] @ head.T, torch.eye(len(head)).double(), rtol=1e-6, atol=1e-6
    )
    # What regression on the first channels explains, heads together; the covariance has a small floor.
    output, kept = (y - y.mean(0)) @ wo.T, kept_energy(found.mix, cov, wo)
    for rank in range(1, 9):
        channels = (y - y.mean(0)) @ found.mix[:rank].T
        rest = output - channels @ torch.linalg.lstsq(channels, output).solution
        share = 1 - rest.square().sum() / output.square().sum()
        assert kept[rank - 1] == pytest.approx(float(share), abs=1e-4)


def test_gram_matrices_are_formed_block_by_block() -> None:
    f = torch.randn(50, 2 * ridge._GRAM_COLUMNS + 3, dtype=torch.float64)
    torch.testing.assert_close(ridge._gram(f), f.T @ f)
