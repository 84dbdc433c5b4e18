"""The replacements that a plan asks for: options checked, layers found, and new layers built; the model is not changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dwattn.adapters import BackboneLayout, BlockSite, ConvertedAttention, adapter_for, refusal
from dwattn.errors import DwattnError, PlanError
from dwattn.fingerprint import Fingerprint, LayerPrint, relative_name
from dwattn.initial import KERNEL_INITS, gaussian_init, mean_init
from dwattn.numeric import is_number, is_whole
from dwattn.plan import KernelInit, LayerPlan, Plan
from dwattn.projections import AttentionWeights
from dwattn.token_grid import Grid, GridSource
from dwattn.variants import REPLACEMENTS, build_replacement

Rank = int | float | dict[str, float]
DEFAULT_RANK = 0.25


@dataclass(frozen=True)
class Options:
    """What :func:`dwattn.replace` was asked for, validated."""

    variant: str
    rank: Rank | None
    prefix: str
    context: bool | None
    grid: Grid | None
    kernel_init: str
    seed: int


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the plan, found in the model.

    Args:
        site: the block; weights: of its attention layer.
        heads: the heads to replace; None for all of them.
        init: mean attention of these heads in ascending order; None if the plan has no maps.
    """

    site: BlockSite
    weights: AttentionWeights
    heads: list[int] | None
    init: KernelInit | None


def check_rank(rank: Rank | None, variant: str, calibrated: bool) -> Rank | None:
    """``rank``, as an int, a float or a fidelity target.

    Raises:
        DwattnError: a rank for a variant without one, out of range, or a fidelity target without calibration.
    """
    if rank is None:
        return None
    if variant != "lowrank_dw":
        raise DwattnError(
            f"rank={rank!r} is an option of variant='lowrank_dw', not of {variant!r}."
        )
    if isinstance(rank, dict):
        if set(rank) != {"fidelity"}:
            raise DwattnError(f"rank={rank!r} must have one key, as in rank={{'fidelity': 0.95}}.")
        if not calibrated:
            raise DwattnError(
                f"rank={rank!r} is met by calibration: pass calibrate=images (--calibrate DIR), or give a width."
            )
        return rank
    if not is_number(rank) or rank <= 0:
        raise DwattnError(
            f"rank={rank!r} must be a width, a fraction of C such as 0.25, or a fidelity target."
        )
    if is_whole(rank):
        return int(rank)
    if rank > 1:
        raise DwattnError(
            f"rank={rank} is more than all channels; give a fraction up to 1.0, or an integer "
            f"width."
        )
    return float(rank)


def rank_width(rank: Rank | None, channels: int) -> int:
    """The inner width for ``C`` channels: fractions are rounded to a multiple of 8, which the
    kernels like.
    """
    if isinstance(rank, int):
        if rank > channels:
            raise DwattnError(
                f"rank={rank} is more than the layer's {channels} channels; variant='dw' keeps "
                f"them all."
            )
        return rank
    share = rank if isinstance(rank, float) else DEFAULT_RANK
    return min(channels, max(8, 8 * round(channels * share / 8)))


def check_grid(layout: BackboneLayout, grid: Grid | None, dynamic: bool) -> Grid | None:
    """The grid to fix, or None for a dynamic one."""
    if dynamic:
        if grid is not None:
            raise DwattnError(
                f"grid={grid} fixes the patch grid and dynamic_grid=True does not; give one of "
                f"them."
            )
        return None
    if grid is None:
        return layout.geometry().grid
    sides = list(grid) if hasattr(grid, "__len__") else []
    if len(sides) != 2 or not all(is_whole(side) and side > 0 for side in sides):
        raise DwattnError(
            f"grid={grid!r} must be two positive integers: patch rows and patch columns."
        )
    return (int(sides[0]), int(sides[1]))


def check_variant(variant: str) -> str:
    """``variant``, or a :class:`DwattnError` if it is unknown."""
    if variant not in REPLACEMENTS:
        raise DwattnError(f"Unknown variant {variant!r}; choose one of {', '.join(REPLACEMENTS)}.")
    return variant


def check_kernel_init(kernel_init: str | None, plan: Plan) -> str:
    """The initialisation to use: the one asked for, else the best one that the plan allows.

    Raises:
        DwattnError: an unknown name.
        PlanError: ``mean-attention`` without maps in the plan.
    """
    lacking = [layer.name for layer in plan.layers if layer.kernel_init is None]
    if kernel_init is None:
        return "gaussian" if lacking else "mean-attention"
    if kernel_init not in KERNEL_INITS:
        raise DwattnError(f"kernel_init={kernel_init!r} must be one of {', '.join(KERNEL_INITS)}.")
    if kernel_init == "mean-attention" and lacking:
        raise PlanError(
            f"kernel_init='mean-attention' needs the mean attention maps, which the plan lacks for "
            f"{', '.join(lacking)}: make it with dwattn.select(), or use kernel_init='gaussian'."
        )
    return kernel_init


def planned_layers(layout: BackboneLayout, plan: Plan) -> tuple[list[PlannedLayer], dict[str, str]]:
    """The plan's layers found in the model, and the reasons for those that cannot be replaced.

    Raises:
        PlanError: a layer or head that the model does not have, or maps that do not fit its heads.
    """
    sites = {relative_name(layout, site.attention_name): site for site in layout.blocks}
    found, refused = [], {}
    for name, entry in zip(plan.relative_names(), plan.layers, strict=True):
        if name not in sites:
            raise PlanError(
                f"The plan names {entry.name}, which is not an attention layer of {layout.family}; its layers are "
                f"{', '.join(sites)}."
            )
        reason = refusal(sites[name].attention)
        if reason is None:
            found.append(_planned(sites[name], entry, layout.num_prefix))
        else:
            refused[sites[name].attention_name] = reason
    return found, refused


def _planned(site: BlockSite, entry: LayerPlan, num_prefix: int) -> PlannedLayer:
    adapter = adapter_for(site.attention)
    assert adapter is not None
    weights = adapter.weights(site.attention)
    heads = entry.heads
    if heads is not None and max(heads) >= weights.num_heads:
        raise PlanError(
            f"The plan lists heads {heads} of {entry.name}, which has heads 0 to "
            f"{weights.num_heads - 1}."
        )
    whole = heads is None or len(heads) == weights.num_heads
    return PlannedLayer(
        site, weights, None if whole else heads, _initial(entry, weights.num_heads, num_prefix)
    )


def _initial(entry: LayerPlan, num_heads: int, num_prefix: int) -> KernelInit | None:
    """The plan's maps of the replaced heads, in ascending order of the heads."""
    init = entry.kernel_init
    if init is None:
        return None
    heads = list(range(num_heads)) if entry.heads is None else entry.heads
    count, prefix = len(init.kernel), {len(masses) for masses in init.prefix}
    if count not in (len(heads), num_heads) or prefix != {num_prefix}:
        wanted = f"all {num_heads} heads"
        if len(heads) < num_heads:
            wanted = f"the {len(heads)} listed heads {heads}, or {wanted},"
        raise PlanError(
            f"kernel_init of {entry.name} must cover {wanted} with {num_prefix} prefix tokens each; it covers "
            f"{count} heads with {sorted(prefix)}. Correct it, or take it out of the plan."
        )
    order = sorted(range(len(heads)), key=heads.__getitem__)
    return init.of(order if count == len(heads) else [heads[row] for row in order])


def build_planned(
    layer: PlannedLayer,
    layout: BackboneLayout,
    printed: Fingerprint,
    options: Options,
    source: GridSource,
) -> ConvertedAttention:
    """A replacement of the layer with its first weights, beside the model.

    Args:
        printed: of the model, so that the converted layer keeps its identity.
        source: where the replacement reads the grid of the current images.
    """
    block = [site.attention_name for site in layout.blocks].index(layer.site.attention_name)
    shim = build_shim(
        layer.site,
        printed.layers[block],
        layout.num_prefix,
        options.variant,
        layer.heads,
        _choices(layer, options),
    )
    if options.kernel_init == "mean-attention" and layer.init is not None:
        mean_init(shim.layer, layer.init)
    else:
        gaussian_init(shim.layer, options.seed * len(layout.blocks) + block)
    finish(shim, layer.site, source)
    return shim


def _choices(layer: PlannedLayer, options: Options) -> dict[str, Any]:
    """Arguments of the replacement's constructor."""
    choices: dict[str, Any] = {"grid": options.grid}
    if options.context is not None:
        choices["context"] = options.context
    if layer.heads is None:
        choices["prefix"] = options.prefix
        if options.variant == "lowrank_dw":
            choices["rank"] = rank_width(options.rank, layer.weights.channels)
    elif options.prefix == "static":
        raise DwattnError(
            "prefix='static' replaces the prefix rows of whole layers, but the plan lists single heads of "
            f"{layer.site.attention_name}; use prefix='exact'."
        )
    return choices


def build_shim(
    site: BlockSite,
    printed: LayerPrint,
    num_prefix: int,
    variant: str,
    heads: list[int] | None,
    choices: dict[str, Any],
) -> ConvertedAttention:
    """A replacement that holds the layer's projections, on their device and in their dtype.

    Args:
        choices: further arguments of :func:`dwattn.variants.build_replacement`.
    """
    adapter = adapter_for(site.attention)
    assert adapter is not None
    weights = adapter.weights(site.attention)
    # Default initialisations draw random numbers that are overwritten at once.
    devices = [weights.wv.device] if weights.wv.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        layer = build_replacement(variant, weights, num_prefix=num_prefix, heads=heads, **choices)
    shim = ConvertedAttention(layer, adapter.convention(site.attention))
    shim.original_print = printed.model_dump(mode="json")
    return shim


def finish(shim: ConvertedAttention, site: BlockSite, source: GridSource) -> None:
    """Set the mode, ``requires_grad`` flags and grid source of the replacement. Called again after calibration, which may
    have put in a layer of another rank.

    Frozen projections stay frozen; new parameters train if the value or output projection does.
    """
    adapter = adapter_for(site.attention)
    assert adapter is not None
    with torch.enable_grad():  # views of a parameter carry its flag only then
        weights = adapter.weights(site.attention)
    shim.train(site.attention.training)
    shim.layer.grid_source = source
    # Pruned and normed weights are plain tensors, which a call without gradients leaves without a flag.
    computed = any(
        "weight" in vars(part) and any(p.requires_grad for p in part.parameters(recurse=False))
        for part in site.attention.modules()
    )
    fresh = weights.wv.requires_grad or weights.wo.requires_grad or computed
    for name, parameter in shim.layer.named_parameters():
        owner = name.split(".")[-2] if "." in name else ""
        if owner in ("q_norm", "k_norm") or ".q_norm." in name or ".k_norm." in name:
            continue  # copies, which brought their flags along
        role = _SOURCES.get(owner.removeprefix("prefix_"))
        like = None if role is None else getattr(weights, role[name.endswith(".bias")])
        trains = like is not None and like.requires_grad
        own = like is None or (computed and name.endswith(".weight"))
        parameter.requires_grad_(fresh if own else trains)


_SOURCES = {"query": ("wq", "bq"), "key": ("wk", "bk"), "value": ("wv", "bv"), "proj": ("wo", "bo")}
