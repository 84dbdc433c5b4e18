"""Closed-form weights of one replaced layer, before its output projection is corrected.

For each variant: which channels it aggregates, what they should reproduce (a linear mix of the true attention
output before Wo), and the regression that gives kernel and context terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn.attention import (
    ConvAttention,
    EnsembleDWAttention,
    FusedDWAttention,
    LowRankDWAttention,
    ReplacementAttention,
    SPViTAttention,
)
from dwattn.calibration.lowrank import (
    Directions,
    OutputCovariance,
    kept_energy,
    output_directions,
)
from dwattn.calibration.stencil import PrefixFit, StencilFit, StencilWeights
from dwattn.errors import CalibrationError
from dwattn.geometry import Geometry
from dwattn.prefix import StaticPrefixRows
from dwattn.projections import AttentionWeights
from dwattn.reference import merge_heads, split_heads
from dwattn.rotary import Rotary, placed
from dwattn.scattered import ScatteredDWAttention
from dwattn.variants import Replacement


def true_rows(weights: AttentionWeights, x: Tensor, rotary: Rotary | None = None) -> Tensor:
    """The attention output of all tokens before Wo: ``x (B, N, D) -> (B, N, C)``, in the dtype of ``x``."""
    projections = ((weights.wq, weights.bq), (weights.wk, weights.bk), (weights.wv, weights.bv))
    q, k, v = (split_heads(F.linear(x, w, b), weights.num_heads) for w, b in projections)
    q, k = placed(q, k, weights, rotary)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=weights.scale)).to(x.dtype)


@dataclass(frozen=True)
class LayerFit:
    """What one fit left unexplained: ``residual`` is a share of the target's energy, on the fitted images."""

    residual: float
    rank: int | None = None


#: Gives the layer's inputs ``x (B, N, D)`` for all calibration images, chunk by chunk, each with :func:`true_rows`
#: beside it; may be called repeatedly.
Samples = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@torch.no_grad()
def fit_layer(
    layer: Replacement, weights: AttentionWeights, samples: Samples, geometry: Geometry
) -> LayerFit:
    """Fill ``layer`` (fp32) with closed-form factors, kernels and context terms.

    Raises:
        CalibrationError: the variant has no closed form.
    """
    if isinstance(layer, SPViTAttention):
        raise CalibrationError(
            "spvit has no closed-form calibration: its head weights pass through a softmax and share two projections. "
            "Convert without calibrate= and fine-tune, or use variant='lowrank_dw', which costs less."
        )
    if isinstance(layer, ScatteredDWAttention):
        return _fit_scattered(layer, weights, samples, geometry)
    if isinstance(layer, LowRankDWAttention):
        mix = _low_rank_mix(layer, weights, samples, geometry)
        rank = layer.inner_dim
    elif isinstance(layer, EnsembleDWAttention):
        _, _, woe = layer.ensemble()
        mix = (torch.linalg.pinv(woe.double()) @ weights.wo.double()).float()
        rank = None
    else:
        mix, rank = None, None
    fitted = _fit_stencil(layer, samples, geometry, mix)
    _fit_static_prefix(layer, samples, mix)
    return LayerFit(_share(fitted), rank)


def choose_rank(
    weights: AttentionWeights,
    samples: Samples,
    geometry: Geometry,
    fidelity: float,
    *,
    multiple: int = 8,
) -> int:
    """The least inner width, a multiple of 8, that keeps a share ``fidelity`` of the layer's output energy."""
    _, cov, directions = _directions(weights, samples, geometry)
    kept = kept_energy(directions.mix, cov, weights.wo)
    needed = int((kept < fidelity).sum()) + 1
    return min(-(-needed // multiple) * multiple, weights.channels)


def _directions(
    weights: AttentionWeights, samples: Samples, geometry: Geometry
) -> tuple[OutputCovariance, Tensor, Directions]:
    """The moments of ``Y``, its covariance with a floor, and the directions."""
    covariance = OutputCovariance(
        weights.channels, weights.wv.device, centred=weights.bo is not None
    )
    for _, rows in samples():
        covariance.add(rows[:, geometry.num_prefix :])
    cov = covariance.covariance()
    return covariance, cov, output_directions(cov, weights.wo, weights.num_heads)


def _share(fitted: StencilWeights) -> float:
    return float(fitted.residual.sum() / fitted.energy.sum().clamp(min=1e-300))


def _low_rank_mix(
    layer: LowRankDWAttention, weights: AttentionWeights, samples: Samples, geometry: Geometry
) -> Tensor:
    """Choose the kept directions, set ``A`` and a first ``B``; returns the mix ``M (r, C)``."""
    covariance, cov, directions = _directions(weights, samples, geometry)
    mix = directions.mix[: layer.inner_dim]
    layer.value.weight.copy_(mix @ weights.wv.double())
    if layer.value.bias is not None:
        layer.value.bias.copy_(
            torch.zeros_like(mix[:, 0]) if weights.bv is None else mix @ weights.bv.double()
        )
    # Y ~ Y M^T pinv(M)^T in the metric of cov(Y), so B starts as the best decoder of the kept channels.
    decoder = weights.wo.double() @ cov @ mix.T @ torch.linalg.inv(mix @ cov @ mix.T)
    layer.proj.weight.copy_(decoder)
    if layer.proj.bias is not None:
        mean = covariance.sum / covariance.count
        bias = torch.zeros_like(decoder[:, 0]) if weights.bo is None else weights.bo.double()
        layer.proj.bias.copy_(bias + weights.wo.double() @ mean - decoder @ (mix @ mean))
    return mix.float()


def _fit_stencil(
    layer: ReplacementAttention, samples: Samples, geometry: Geometry, mix: Tensor | None
) -> StencilWeights:
    value, bias = (
        layer.ensemble()[:2] if isinstance(layer, EnsembleDWAttention) else layer.value_projection()
    )
    fit = StencilFit(layer.inner_dim, geometry, value.device, context=layer.beta is not None)
    for x, rows in samples():
        target = rows[:, geometry.num_prefix :]
        fit.add(F.linear(x, value, bias), target if mix is None else target @ mix.T)
    if isinstance(layer, ConvAttention):
        fit.tie(layer.num_heads)
    fitted = fit.solve()
    _store(layer, fitted)
    return fitted


def _store(layer: Replacement, fitted: StencilWeights) -> None:
    assert isinstance(
        layer, (FusedDWAttention, ConvAttention, EnsembleDWAttention, ScatteredDWAttention)
    )
    kernel = fitted.kernel
    layer.kernel.copy_(kernel[:: len(kernel) // len(layer.kernel)])
    for name, values in (("kappa", fitted.kappa), ("mu", fitted.mu), ("beta", fitted.beta)):
        parameter: nn.Parameter | None = getattr(layer, name)
        if parameter is not None:
            parameter.copy_(values)


def _fit_static_prefix(layer: ReplacementAttention, samples: Samples, mix: Tensor | None) -> None:
    prefix = layer.prefix_rows
    if not isinstance(prefix, StaticPrefixRows):
        return
    value, bias = layer.value_projection()
    fit = PrefixFit(prefix.num_prefix, value.shape[0], value.device)
    for x, rows in samples():
        target = rows[:, : prefix.num_prefix]
        lifted = target if mix is None or mix.shape[0] != value.shape[0] else target @ mix.T
        fit.add(F.linear(x, value, bias), lifted)
    a, b = fit.solve()
    prefix.a.copy_(a)
    prefix.b.copy_(b)


def _fit_scattered(
    layer: ScatteredDWAttention, weights: AttentionWeights, samples: Samples, geometry: Geometry
) -> LayerFit:
    replaced = weights.head_rows(layer.replaced).to(weights.wv.device)
    fit = StencilFit(layer.inner_dim, geometry, weights.wv.device, context=layer.beta is not None)
    for x, rows in samples():
        target = rows[:, geometry.num_prefix :, replaced]
        value = layer.value(x)[..., layer.kept_dim :]
        fit.add(value, target)
    fitted = fit.solve()
    _store(layer, fitted)
    return LayerFit(_share(fitted))
