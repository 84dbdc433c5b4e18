"""Learned selection after Differentiable Subset Pruning (section 2.3.2): which blocks or heads to replace is trained.

Every attention layer computes both softmax attention and its ``dw`` replacement, which share their projections, and
a gate mixes them by head. The gates are a relaxed top-k of trained scores with Gumbel noise, whose temperature falls
until they are a subset. The subset is then an ordinary plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwattn import functional
from dwattn.adapters import (
    AttentionAdapter,
    BlockSite,
    ConvertedAttention,
    adapter_for,
    describe,
    refusal,
)
from dwattn.attention import FusedDWAttention, add_context, copy_linear, gaussian_kernel_
from dwattn.conversion import Conversion, conversion, find_conversion, restore
from dwattn.errors import CheckpointError, TrainingError
from dwattn.finetune.trainer import Callback, Trainer
from dwattn.finetune.views import mix
from dwattn.fingerprint import fingerprint
from dwattn.grid_hook import GridHook
from dwattn.plan import Plan
from dwattn.projections import AttentionWeights
from dwattn.reference import merge_heads, split_heads
from dwattn.replacements import check_grid, finish
from dwattn.rotary import Rotary, placed
from dwattn.scattered import ScatteredDWAttention
from dwattn.surgery import install, replace
from dwattn.surgery_report import ReplacementReport
from dwattn.token_grid import Grid, GridSource, TokenGridModule

Granularity = Literal["blocks", "heads"]


class SubsetGate(nn.Module):
    """A learned subset of ``size`` out of ``count``, relaxed to gates in [0, 1].

    While it is ``learning`` (in the steps of a run with :class:`Annealing`) the gates are the Gumbel top-k relaxation of
    the scores at the current temperature. Otherwise, also when such a run evaluates, the gates of the ``size`` largest
    scores are 1 and the others 0. The scores are trained at the recipe's ``gate_lr``. The noise is a function of seed and
    step, so all layers, micro-batches and processes of a step see the same gates, and so does a resumed run.

    Args:
        start, end: temperatures; the decay is exponential over the first ``anneal`` (a share) of the steps.
        seed: of the noise.
    """

    def __init__(
        self,
        count: int,
        size: int,
        *,
        start: float = 1.0,
        end: float = 1e-3,
        anneal: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < size < count:
            raise TrainingError(
                f"A subset of {size} of {count} cannot be learned: 0 < size < count."
            )
        if not 0 < end <= start or not 0 < anneal <= 1:
            raise TrainingError(
                f"The temperature falls from start={start} to end={end} > 0 in anneal={anneal} of the steps."
            )
        self.scores = nn.Parameter(torch.zeros(count))
        self.learning = False
        #: Whether the run that trains the gate is evaluating. (Not ``self.training``: a student is trained in eval mode.)
        self.evaluating: Callable[[], bool] = bool
        self.size, self.start, self.end, self.anneal, self.seed = size, start, end, anneal, seed
        self.at(0, 1)

    def at(self, step: int, steps: int) -> None:
        """Set the noise and temperature of ``step`` out of ``steps``."""
        progress = min(1.0, step / max(1.0, self.anneal * steps))
        self.temperature = self.start * (self.end / self.start) ** progress
        rng = torch.Generator().manual_seed(mix(self.seed, step))
        uniform = torch.rand(len(self.scores), generator=rng).clamp(1e-9, 1 - 1e-7)
        self._noise = -(-uniform.log()).log()

    def forward(self) -> Tensor:
        """Gates ``(count,)``, fp32."""
        scores = self.scores.float()
        if not self.learning or self.evaluating():
            hard = torch.zeros_like(scores)
            hard[self.chosen()] = 1.0
            return hard
        keys = scores + self._noise.to(scores.device)
        left = torch.ones_like(scores)
        for _ in range(self.size):
            share = torch.softmax(keys / self.temperature, dim=0)
            left = left * (1 - share)
            # What was taken is not taken again, however far it lies above the others.
            keys = keys + torch.log1p(-share.clamp(max=1 - 1e-6))
            keys = keys.masked_fill(share > 1 - 1e-6, -torch.inf)
        # Not the sum of the shares, which can pass 1 while the temperature is high: a gate mixes two layers.
        return 1 - left

    @torch.no_grad()
    def chosen(self) -> list[int]:
        """Indices of the largest scores, ascending; ties go to the first."""
        order = torch.argsort(self.scores.float(), descending=True, stable=True)
        return sorted(order[: self.size].tolist())


class Annealing(Callback):
    """Lets a gate follow a trainer's steps; give it to the trainer as a callback."""

    def __init__(self, gate: SubsetGate) -> None:
        self.gate = gate

    def on_start(self, trainer: Trainer) -> None:
        self.gate.learning = True
        self.gate.evaluating = lambda: not trainer.module.training
        self.gate.at(trainer.step, trainer.recipe.steps)

    def on_step(self, trainer: Trainer, step: int, losses: dict[str, float]) -> None:
        self.gate.at(step, trainer.recipe.steps)

    def on_end(self, trainer: Trainer) -> None:
        self.gate.learning, self.gate.evaluating = False, bool


class GatedAttention(TokenGridModule):
    """Softmax attention and ``dw`` with common projections, mixed head by head: ``(B, N, D) -> (B, N, D)``.

    Prefix rows are softmax attention in both. ``gate`` is shared by the layers; ``slots`` are this layer's places in
    it, one a head or one for all heads.
    """

    variant = "gated"
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    proj: nn.Linear
    kappa: nn.Parameter | None
    mu: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        weights: AttentionWeights,
        gate: SubsetGate,
        slots: list[int],
        *,
        grid: Grid | None,
        num_prefix: int,
    ) -> None:
        super().__init__(
            weights.dim, weights.num_heads, grid=grid, num_prefix=num_prefix,
            head_dim=weights.head_dim, scale=weights.scale,
        )  # fmt: skip
        factory: dict[str, Any] = {"device": weights.wv.device, "dtype": weights.wv.dtype}
        channels, dim = weights.channels, weights.dim
        projections = {
            "query": (dim, channels, weights.wq, weights.bq),
            "key": (dim, channels, weights.wk, weights.bk),
            "value": (dim, channels, weights.wv, weights.bv),
            "proj": (channels, dim, weights.wo, weights.bo),
        }
        for name, (rows, columns, weight, bias) in projections.items():
            linear = nn.Linear(rows, columns, bias=bias is not None, **factory)
            with torch.no_grad():
                copy_linear(linear, weight, bias)
            self.add_module(name, linear)
        # Copies, so that training cannot change the original that is kept for restore().
        self.q_norm, self.k_norm = copy.deepcopy(weights.q_norm), copy.deepcopy(weights.k_norm)
        add_context(self, True, num_prefix, channels, factory)
        self.kernel = nn.Parameter(torch.empty(channels, 3, 3, **factory))
        gaussian_kernel_(self.kernel)
        self.gate, self.slots = gate, slots

    def forward(self, x: Tensor, grid: Grid | None = None, rotary: Rotary | None = None) -> Tensor:
        geometry = self.geometry(x, grid)
        value = self.value(x)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.query(x), self.key(x), value))
        q, k = placed(q, k, self, rotary)
        rows = merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        static = functional.dw_aggregate(
            value, self.kernel, geometry, self.kappa, self.mu, self.beta
        )
        prefix, patches = rows[:, : self.num_prefix], rows[:, self.num_prefix :]
        patches = patches + self.gates().to(rows.dtype) * (static.to(rows.dtype) - patches)
        out: Tensor = self.proj(torch.cat([prefix, patches], dim=1))
        return out

    def config(self) -> NoReturn:
        """Gates are no part of a checkpoint."""
        raise CheckpointError("A model with gates cannot be saved; call settle(model) first.")

    def gates(self) -> Tensor:
        """One gate a channel: ``(C,)``."""
        own: Tensor = self.gate()[self.slots]
        return own.repeat_interleave(self.num_heads * self.head_dim // len(self.slots))


def add_gates(
    model: nn.Module,
    size: int,
    *,
    granularity: Granularity = "blocks",
    grid: Grid | None = None,
    **options: Any,
) -> SubsetGate:
    """Put gated layers into all attention layers that can be replaced, in place; :func:`dwattn.restore` undoes it.

    Train the model then (a :class:`Distillation` or a task, with :class:`Annealing` as a callback), and take
    :func:`learned_plan` or :func:`settle`.

    Args:
        model: not converted yet.
        size: blocks or heads to replace.
        grid: patch grid, where it is not that of the model's configured image size.
        options: of :class:`SubsetGate`.

    Raises:
        TrainingError: the model is converted already, or ``size`` does not fit.
    """
    if granularity not in ("blocks", "heads"):
        raise TrainingError(f"granularity={granularity!r} must be 'blocks' or 'heads'.")
    if find_conversion(model) is not None:
        raise TrainingError(
            "The model has replaced layers; gates choose among those of the original."
        )
    layout = describe(model)
    grid = check_grid(layout, grid, False)
    sites = [site for site in layout.blocks if refusal(site.attention) is None]
    if not sites:
        raise TrainingError(
            f"No attention layer of {layout.family} can be replaced, so there is nothing to choose."
        )
    weights = [_adapter(site).weights(site.attention) for site in sites]
    counts = [1 if granularity == "blocks" else w.num_heads for w in weights]
    gate = SubsetGate(sum(counts), size, **options).to(weights[0].wv.device)
    source, printed = GridSource(), fingerprint(layout)
    prints = dict(zip([site.name for site in layout.blocks], printed.layers, strict=True))
    shims, first = {}, 0
    with torch.random.fork_rng():
        torch.manual_seed(gate.seed)
        for site, own, count in zip(sites, weights, counts, strict=True):
            slots = list(range(first, first + count))
            layer = GatedAttention(own, gate, slots, grid=grid, num_prefix=layout.num_prefix)
            first += count
            shim = ConvertedAttention(layer, _adapter(site).convention(site.attention))  # type: ignore[arg-type]
            shim.original_print = prints[site.name].model_dump(mode="json")
            finish(shim, site, source)
            shims[site.attention_name] = shim
    gate.scores.requires_grad_(True)
    plan = Plan.for_layers(model, list(shims), criterion="dsp")
    hook = GridHook(source, layout.patch_size, layout.padded, fixed=grid)
    install(model, layout, shims, {}, Conversion(plan=plan, backbone=layout.name), hook)
    return gate


def _adapter(site: BlockSite) -> AttentionAdapter:
    adapter = adapter_for(site.attention)
    assert adapter is not None
    return adapter


def gated_layers(model: nn.Module) -> dict[str, GatedAttention]:
    """The gated layers by the name of the attention layer.

    Raises:
        TrainingError: there are none.
    """
    record = conversion(model)
    layers = {} if record is None else record.layers
    found = {n: r.converted.layer for n, r in layers.items() if r.variant == GatedAttention.variant}
    if not found:
        raise TrainingError(
            f"{type(model).__name__} has no gates; call add_gates(model, size) first."
        )
    return found  # type: ignore[return-value]


def learned_plan(model: nn.Module) -> Plan:
    """The learned subset as a plan for the original model: ``two-stage`` selection reuses it there."""
    layers = gated_layers(model)
    names: list[str] = []
    heads: list[list[int] | None] = []
    for name, layer in layers.items():
        chosen = set(layer.gate.chosen())
        own = [place for place, slot in enumerate(layer.slots) if slot in chosen]
        if own:
            names.append(name)
            heads.append(None if len(own) == len(layer.slots) else own)
    return Plan.for_layers(model, names, heads, criterion="dsp")


def settle(model: nn.Module, *, dynamic_grid: bool = False) -> ReplacementReport:
    """End-to-end selection: make the learned subset final, with the weights that were trained, in place.

    The chosen layers become ordinary ``dw`` layers, the others attention layers of the model's library again.

    Args:
        dynamic_grid: as in :func:`dwattn.replace`; else the grid is that of the gated layers.
    """
    plan, layers = learned_plan(model), gated_layers(model)
    grid = None if dynamic_grid else next(iter(layers.values())).grid
    restore(model)
    for site in describe(model).blocks:
        if site.attention_name in layers:
            _write_back(layers[site.attention_name], site)
    report = replace(
        model, plan, kernel_init="gaussian", allow_stale=True, grid=grid, dynamic_grid=dynamic_grid
    )
    record = conversion(model)
    assert record is not None
    for name, layer in record.layers.items():
        _copy_kernels(layers[name], layer.converted.layer)
    return report


@torch.no_grad()
def _write_back(layer: GatedAttention, site: BlockSite) -> None:
    """Copy trained projections and norms into an attention layer of the model's library."""
    weights = _adapter(site).weights(site.attention)
    for name, linear in zip("qkvo", (layer.query, layer.key, layer.value, layer.proj), strict=True):
        getattr(weights, f"w{name}").copy_(linear.weight)
        if getattr(weights, f"b{name}") is not None:
            getattr(weights, f"b{name}").copy_(linear.bias)
        # The projections are views of the layer's own parameters; if they were not, nothing would have been written.
        if not torch.equal(
            getattr(_adapter(site).weights(site.attention), f"w{name}"), linear.weight
        ):
            raise TrainingError(
                f"Trained weights cannot be written into {type(site.attention).__name__}; use learned_plan(model) "
                f"on a fresh model instead."
            )
    for mine, theirs in ((layer.q_norm, weights.q_norm), (layer.k_norm, weights.k_norm)):
        if mine is not None and theirs is not None:
            theirs.load_state_dict(mine.state_dict())


@torch.no_grad()
def _copy_kernels(gated: GatedAttention, layer: Any) -> None:
    """Copy kernels and context terms of the replaced heads' channels."""
    channels = torch.arange(gated.num_heads * gated.head_dim).view(gated.num_heads, -1)
    if isinstance(layer, ScatteredDWAttention):
        channels = channels[layer.replaced]
    else:
        assert isinstance(layer, FusedDWAttention)
    index = channels.flatten()
    layer.kernel.copy_(gated.kernel[index])
    for name in ("mu", "beta"):
        getattr(layer, name).copy_(getattr(gated, name)[index])
    if layer.kappa is not None:
        assert gated.kappa is not None
        layer.kappa.copy_(gated.kappa[:, index])
