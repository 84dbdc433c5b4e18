"""Drop-in replacements for a Vision Transformer's self-attention layer, as modules.

All take ``(B, N, D)`` tokens, prefix tokens first, and return the layer's output after Wo, ``(B, N, D)``.
The equations are those of :mod:`dwattn.reference`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn import functional, reference
from dwattn.errors import DwattnError
from dwattn.geometry import Geometry
from dwattn.prefix import PREFIX_MODES, ExactPrefixRows, StaticPrefixRows
from dwattn.projections import AttentionWeights, is_plain_linear, linear_weights
from dwattn.rotary import Rotary
from dwattn.token_grid import Grid, TokenGridModule, head_width


class ReplacementAttention(TokenGridModule):
    """Base of the replacements of whole layers, ``(B, N, D) -> (B, N, D)``: prefix rows, context terms, output projection.

    Args:
        dim, num_heads, grid, num_prefix, head_dim, scale: see :class:`TokenGridModule`.
        inner_dim: channels ``C`` between value and output projection.
        qkv_bias, proj_bias: whether the projections have biases.
        prefix: ``exact``, ``static`` or ``drop`` (see :mod:`dwattn.prefix`); ``drop`` needs ``num_prefix=0``.
        own_prefix_value, own_prefix_proj: whether exact prefix rows have their own value and output projection instead
            of using the layer's; always true if the layer's have another width than ``n_h d_h``.
        context: whether the terms ``kappa (P, C)``, ``mu (C)``, ``beta (C)`` exist.
        q_norm, k_norm, rotary: query and key norms of the replaced layer, and whether its calls come with a rotary
            embedding; for exact prefix rows.
        device, dtype: of the parameters.

    Raises:
        DwattnError: sizes or options that do not fit together, with their values.
        GeometryError: at the call, when ``N != P + H * W`` or no grid is known.
    """

    variant = ""
    kernel: nn.Parameter  # every variant but spvit has one, of its own shape
    kappa: nn.Parameter | None
    mu: nn.Parameter | None
    beta: nn.Parameter | None
    prefix_rows: ExactPrefixRows | StaticPrefixRows | None
    prefix_value: nn.Linear | None
    prefix_proj: nn.Linear | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid | None = None,
        num_prefix: int = 0,
        head_dim: int | None = None,
        inner_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        prefix: str = "exact",
        own_prefix_value: bool = False,
        own_prefix_proj: bool = False,
        context: bool = True,
        scale: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rotary: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, grid=grid, num_prefix=num_prefix, head_dim=head_dim, scale=scale
        )
        if prefix not in PREFIX_MODES:
            raise DwattnError(
                f"Unknown prefix mode {prefix!r}; choose one of {', '.join(PREFIX_MODES)}."
            )
        if prefix == "drop" and num_prefix:
            raise DwattnError(
                f"prefix='drop' needs a model without prefix tokens, but num_prefix={num_prefix}: remove the CLS "
                f"and register tokens from the model first (timm: class_token=False), or use 'exact' or 'static'."
            )
        self.inner_dim = num_heads * self.head_dim if inner_dim is None else inner_dim
        self.prefix = prefix if num_prefix else "drop"
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.value = nn.Linear(dim, self.value_dim, bias=qkv_bias, **options)
        self.proj = nn.Linear(self.output_dim, dim, bias=proj_bias, **options)
        add_context(self, context, num_prefix, self.inner_dim, options)
        norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "rotary": rotary}
        self._add_prefix({"qkv_bias": qkv_bias, **norms}, options)
        channels = num_heads * self.head_dim
        if self.prefix == "exact" and (own_prefix_value or self.value_dim != channels):
            self.prefix_value = nn.Linear(dim, channels, bias=qkv_bias, **options)
        if self.prefix == "exact" and (own_prefix_proj or self.output_dim != channels):
            self.prefix_proj = nn.Linear(channels, dim, bias=proj_bias, **options)

    @property
    def value_dim(self) -> int:
        """Rows of the value projection's weight."""
        return self.inner_dim

    @property
    def output_dim(self) -> int:
        """Columns of the output projection's weight."""
        return self.inner_dim

    def _add_prefix(self, attention: dict[str, Any], options: dict[str, Any]) -> None:
        self.prefix_rows, self.prefix_value, self.prefix_proj = None, None, None
        if self.prefix == "static":
            self.prefix_rows = StaticPrefixRows(self.num_prefix, self.output_dim, **options)
        elif self.prefix == "exact":
            self.prefix_rows = ExactPrefixRows(
                self.dim, self.num_heads, self.head_dim, self.num_prefix,
                scale=self.scale, **attention, **options,
            )  # fmt: skip

    def own_prefix_projection(self) -> None:
        """Give exact prefix rows a copy of the output projection, so that correcting Wo leaves these rows exact."""
        if self.prefix == "exact" and self.prefix_proj is None:
            self.prefix_proj = copy.deepcopy(self.proj)

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments that rebuild a module with the same state-dict keys and shapes."""
        return {
            "grid": None if self.grid is None else list(self.grid),
            "prefix": self.prefix,
            "own_prefix_value": self.prefix_value is not None,
            "own_prefix_proj": self.prefix_proj is not None,
            "context": self.beta is not None,
        }

    def forward(self, x: Tensor, grid: Grid | None = None, rotary: Rotary | None = None) -> Tensor:
        """``(B, N, D) -> (B, N, D)``; ``grid=(H, W)`` overrides the fixed grid for this call."""
        geometry = self.geometry(x, grid)
        patches = self.patch_output(x, geometry)
        if self.prefix_rows is None:
            return patches
        return torch.cat([self.prefix_output(x, rotary), patches], dim=1)

    def patch_features(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Patch rows before the output projection: ``(B, H*W, C)``."""
        raise NotImplementedError

    def patch_output(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Patch rows after the output projection: ``(B, H*W, D)``."""
        return self.output_projection(self.patch_features(x, geometry))

    def prefix_output(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Prefix rows after the output projection: ``(B, P, D)``."""
        assert self.prefix_rows is not None
        if isinstance(self.prefix_rows, ExactPrefixRows):
            fused = self.prefix_rows.projected(
                x,
                self.value if self.prefix_value is None else self.prefix_value,
                self.proj if self.prefix_proj is None else self.prefix_proj,
            )
            if fused is not None:
                return fused
        if self.prefix_value is None:
            rows: Tensor = self.prefix_rows(x, *self.value_projection(), rotary)
        elif is_plain_linear(self.prefix_value):
            rows = self.prefix_rows(x, self.prefix_value.weight, self.prefix_value.bias, rotary)
        else:
            rows = self.prefix_rows.of_values(x, self.prefix_value(x), rotary)
        project = self.output_projection if self.prefix_proj is None else self.prefix_proj
        out: Tensor = project(rows)
        return out

    def value_projection(self) -> tuple[Tensor, Tensor | None]:
        """Value weight and bias as the forward pass uses them."""
        return linear_weights(self.value, f"The {self.variant} layer's value projection here")

    def output_projection(self, rows: Tensor) -> Tensor:
        """Inner channels to model width, as the forward pass does it."""
        out: Tensor = self.proj(rows)
        return out

    def thin_context(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """``ctx (B, 1, C)`` from ``P + 1`` projected rows, for variants that never form V."""
        if self.mu is None or self.beta is None:
            return None
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        values = F.linear(torch.cat([prefix, patches.mean(1, keepdim=True)], 1), weight, bias)
        ctx = self.mu * values[:, self.num_prefix :] + self.beta
        if self.kappa is not None:
            ctx = ctx + (self.kappa * values[:, : self.num_prefix]).sum(1, keepdim=True)
        return ctx

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Copy the pretrained projections in; kernels and context terms keep their initial values."""
        copy_linear(self.value, weights.wv, weights.bv)
        copy_linear(self.proj, weights.wo, weights.bo)
        self.load_prefix(weights)

    @torch.no_grad()
    def load_prefix(self, weights: AttentionWeights) -> None:
        """Copy what exact prefix rows need from the attention layer that is replaced."""
        if not isinstance(self.prefix_rows, ExactPrefixRows):
            return
        copy_linear(self.prefix_rows.query, weights.wq, weights.bq)
        copy_linear(self.prefix_rows.key, weights.wk, weights.bk)
        if self.prefix_value is not None:
            copy_linear(self.prefix_value, weights.wv, weights.bv)
        if self.prefix_proj is not None:
            copy_linear(self.prefix_proj, weights.wo, weights.bo)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, inner_dim={self.inner_dim}, num_heads={self.num_heads}, grid={self.grid}, "
            f"num_prefix={self.num_prefix}, prefix={self.prefix!r}"
        )


def add_context(
    module: nn.Module, context: bool, num_prefix: int, channels: int, options: dict[str, Any]
) -> None:
    """Register ``kappa (P, C)``, ``mu (C)``, ``beta (C)`` as zeros, or as absent."""

    def zeros(*shape: int) -> nn.Parameter | None:
        return nn.Parameter(torch.zeros(*shape, **options)) if context else None

    module.register_parameter("kappa", zeros(num_prefix, channels) if num_prefix else None)
    module.register_parameter("mu", zeros(channels))
    module.register_parameter("beta", zeros(channels))


def copy_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Copy a projection; an absent bias becomes zeros."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        if bias is None:
            linear.bias.zero_()
        else:
            linear.bias.copy_(bias)


def gaussian_kernel_(kernel: Tensor, std: float = 0.02) -> Tensor:
    """The paper's initialisation: kernels drawn from a Gaussian."""
    return nn.init.normal_(kernel, std=std)


class FusedDWAttention(ReplacementAttention):
    """``dw`` (Eq. 11): value projection, 3x3 depthwise aggregation with ``ctx``, output projection.

    Equivalent to :func:`dwattn.reference.dw_layer`. Kernels start from a Gaussian as in the paper; calibration
    replaces them by the closed-form fit.
    """

    variant = "dw"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.kernel = nn.Parameter(torch.empty(self.inner_dim, 3, 3, **factory_of(self.value)))
        gaussian_kernel_(self.kernel)

    def forward(self, x: Tensor, grid: Grid | None = None, rotary: Rotary | None = None) -> Tensor:
        """``(B, N, D) -> (B, N, D)``; ``grid=(H, W)`` overrides the fixed grid for this call."""
        geometry = self.geometry(x, grid)
        if not (is_plain_linear(self.value) and is_plain_linear(self.proj)):
            return self._through_modules(x, geometry, rotary)
        return functional.dw_layer(
            x, self.value.weight, self.value.bias, self.kernel, self.proj.weight, self.proj.bias, geometry,
            self.kappa, self.mu, self.beta,
            prefix_out=None if self.prefix_rows is None else self.prefix_output(x, rotary),
        )  # fmt: skip

    def _through_modules(self, x: Tensor, geometry: Geometry, rotary: Rotary | None) -> Tensor:
        """The same layer with the projections called as modules: adapters, quantised layers, layers with hooks."""
        v = self.value(x)
        y = functional.dw_aggregate(v, self.kernel, geometry, self.kappa, self.mu, self.beta)
        if self.prefix_rows is None:
            return self.output_projection(y)
        own = v if self.prefix_value is None else self.prefix_value(x)
        rows = self.prefix_rows.of_values(x, own, rotary).to(y.dtype)
        if self.prefix_proj is None:
            return self.output_projection(torch.cat([rows, y], dim=1))
        return torch.cat([self.prefix_proj(rows), self.output_projection(y)], dim=1)

    def patch_features(self, x: Tensor, geometry: Geometry) -> Tensor:
        weight, bias = self.value_projection()
        return functional.dw_attention(
            x, weight, bias, self.kernel, geometry, self.kappa, self.mu, self.beta
        )


class LowRankDWAttention(FusedDWAttention):
    """``lowrank_dw``: :class:`FusedDWAttention` with an inner width ``rank`` between ``d_h`` and ``C``.

    ``value.weight`` is the factor ``A (r, D)``, ``proj.weight`` the factor ``B (D, r)``. From pretrained weights they
    start as the ``r`` leading singular directions of ``Wo Wv``; calibration replaces them by their closed form. Exact
    prefix rows keep the pretrained projections at any rank: even at ``r = C`` the channels of the factors are not those
    of the heads.

    Args:
        rank: inner width ``r``; further options as for :class:`ReplacementAttention`.
    """

    variant = "lowrank_dw"

    def __init__(self, dim: int, num_heads: int, *, rank: int, **options: Any) -> None:
        if rank < 1 or rank % 1:
            raise DwattnError(
                f"rank={rank} must be a whole number of at least 1; a multiple of 8 suits the kernels."
            )
        own = {"own_prefix_value": True, "own_prefix_proj": True}
        super().__init__(dim, num_heads, inner_dim=rank, **{**options, **own})

    def config(self) -> dict[str, Any]:
        return {**super().config(), "rank": self.inner_dim}

    def with_rank(self, rank: int) -> LowRankDWAttention:
        """A layer of another inner width with the same prefix rows and new factors, still to be fitted."""
        other = _low_rank_like(self, rank)
        if isinstance(self.prefix_rows, ExactPrefixRows):
            other.prefix_rows = copy.deepcopy(self.prefix_rows)
            other.prefix_value = copy.deepcopy(self.prefix_value)
            other.prefix_proj = copy.deepcopy(self.prefix_proj)
        other.grid_source = self.grid_source
        return other.train(self.training)

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Initial factors: the ``r`` leading directions of ``Wo Wv``, the layer's action on a uniform map."""
        product = weights.wo.double() @ weights.wv.double()
        left, values, right = torch.linalg.svd(product)
        rank = min(self.inner_dim, values.numel())
        root = values[:rank].sqrt()
        self.value.weight.zero_()
        self.proj.weight.zero_()
        self.value.weight[:rank].copy_(root[:, None] * right[:rank])
        self.proj.weight[:, :rank].copy_(left[:, :rank] * root)
        if self.value.bias is not None:
            self.value.bias.zero_()
        if self.proj.bias is not None:
            bias = torch.zeros_like(product[0]) if weights.bo is None else weights.bo.double()
            self.proj.bias.copy_(
                bias if weights.bv is None else bias + weights.wo.double() @ weights.bv.double()
            )
        self.load_prefix(weights)


def _low_rank_like(layer: ReplacementAttention, rank: int) -> LowRankDWAttention:
    """A new layer of inner width ``rank`` with the other sizes and options of ``layer``."""
    return LowRankDWAttention(
        layer.dim, layer.num_heads, rank=rank, grid=layer.grid, num_prefix=layer.num_prefix,
        head_dim=layer.head_dim, qkv_bias=layer.value.bias is not None, proj_bias=layer.proj.bias is not None,
        prefix=layer.prefix, context=layer.beta is not None, scale=layer.scale, **factory_of(layer.value),
    )  # fmt: skip


class ConvAttention(ReplacementAttention):
    """``conv`` (Eq. 9-10): per-head ``kernel (n_h, 3, 3)`` folded into Wv, one dense convolution ``D -> C``."""

    variant = "conv"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.kernel = nn.Parameter(torch.empty(num_heads, 3, 3, **factory_of(self.value)))
        gaussian_kernel_(self.kernel)

    def patch_features(self, x: Tensor, geometry: Geometry) -> Tensor:
        weight, bias = self.value_projection()
        y = reference.conv_attention(x, weight, bias, self.kernel, geometry)
        ctx = self.thin_context(x, weight, bias)
        return y if ctx is None else y + ctx


class EnsembleDWAttention(ReplacementAttention):
    """``ens_dw`` (Eq. 12-13): all heads' projections averaged by ``softmax(gamma)``, then ``dw`` on d_h channels.

    :meth:`fold` gives the equal :class:`LowRankDWAttention` of inner width ``d_h`` for deployment.
    """

    variant = "ens_dw"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        head_dim = head_width(dim, num_heads, options.get("head_dim"))
        super().__init__(dim, num_heads, **{**options, "inner_dim": head_dim})
        factory = factory_of(self.value)
        self.gamma = nn.Parameter(torch.zeros(num_heads, **factory))
        self.kernel = nn.Parameter(torch.empty(head_dim, 3, 3, **factory))
        gaussian_kernel_(self.kernel)

    @property
    def value_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def output_dim(self) -> int:
        return self.num_heads * self.head_dim

    def ensemble(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """``Wve (d_h, D)``, ``bve (d_h)``, ``Woe (D, d_h)`` of Eq. 12."""
        weight, bias = self.value_projection()
        wo, _ = linear_weights(self.proj, "The ens_dw layer's output projection here")
        return reference.ensemble_weights(weight, bias, wo, self.gamma)

    def patch_features(self, x: Tensor, geometry: Geometry) -> Tensor:
        weight, bias, _ = self.ensemble()
        return functional.dw_attention(
            x, weight, bias, self.kernel, geometry, self.kappa, self.mu, self.beta
        )

    def patch_output(self, x: Tensor, geometry: Geometry) -> Tensor:
        _, _, out = self.ensemble()
        return F.linear(self.patch_features(x, geometry), out, self.proj.bias)

    @torch.no_grad()
    def fold(self) -> LowRankDWAttention:
        """The same function with ``gamma`` folded in: inner width ``d_h``, two thin projections."""
        if self.prefix == "static":
            raise DwattnError(
                "Static prefix rows of ens_dw use all heads' channels; fold with prefix='exact'."
            )
        folded = _low_rank_like(self, self.head_dim)
        weight, bias, out = self.ensemble()
        copy_linear(folded.value, weight, bias)
        copy_linear(folded.proj, out, self.proj.bias)
        for name in ("kernel", "kappa", "mu", "beta"):
            parameter = getattr(self, name)
            if parameter is not None:
                getattr(folded, name).copy_(parameter)
        if self.prefix_rows is not None:
            folded.prefix_rows = self.prefix_rows
            folded.prefix_value = self.prefix_value or self.value
            folded.prefix_proj = self.prefix_proj or self.proj
        folded.grid_source = self.grid_source
        return folded


class SPViTAttention(ReplacementAttention):
    """``spvit`` (Eq. A.4): heads averaged at each displacement by a softmax of ``logits (n_h, 3, 3)``.

    One dense convolution ``D -> d_h``, then ``Woe (D, d_h)``.
    """

    variant = "spvit"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        head_dim = head_width(dim, num_heads, options.get("head_dim"))
        super().__init__(dim, num_heads, **{"context": False, **options, "inner_dim": head_dim})
        self.logits = nn.Parameter(torch.zeros(num_heads, 3, 3, **factory_of(self.value)))

    @property
    def value_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def output_dim(self) -> int:
        return self.num_heads * self.head_dim

    def patch_output(self, x: Tensor, geometry: Geometry) -> Tensor:
        weight, bias = self.value_projection()
        wo, bo = linear_weights(self.proj, "The spvit layer's output projection here")
        out = reference.spvit_attention(x, weight, bias, wo, bo, self.logits, geometry)
        if self.beta is None:
            return out
        share = torch.softmax(self.logits, dim=0).mean((1, 2))
        weight, bias, woe = reference.ensemble_weights(weight, bias, wo, share.log())
        ctx = self.thin_context(x, weight, bias)
        assert ctx is not None
        return out + F.linear(ctx, woe)


def factory_of(like: nn.Linear) -> dict[str, Any]:
    """Device and dtype of a layer, as factory arguments."""
    return {"device": like.weight.device, "dtype": like.weight.dtype}
