"""Replace attention layers of a model in place, all or nothing; undo it bit for bit."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from dwattn.adapters import BackboneLayout, ConvertedAttention, describe, refusal
from dwattn.calibration import CalibrationResult, calibrate
from dwattn.calibration.options import CalibrationOptions
from dwattn.conversion import (
    ATTRIBUTE,
    Conversion,
    ReplacedLayer,
    Transaction,
    find_conversion,
    of_another_record,
    placement,
    recorded_elsewhere,
)
from dwattn.errors import CalibrationError, DwattnError, PlanError
from dwattn.fingerprint import relative_name
from dwattn.grid_hook import GridHook
from dwattn.numeric import valid_seed
from dwattn.plan import Plan
from dwattn.replacements import (
    Options,
    Rank,
    build_planned,
    check_grid,
    check_kernel_init,
    check_rank,
    check_variant,
    finish,
    planned_layers,
)
from dwattn.surgery_report import ReplacementReport, ReplacementRow
from dwattn.token_grid import Grid, GridSource
from dwattn.untouched import ordinary_tensors, unwrap

#: Note on a layer with hooks of the user: the module they are on is not called while it is replaced.
RESTING_HOOKS = "its hooks are not called until it is restored"


@ordinary_tensors
def replace(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    *,
    variant: str = "dw",
    rank: Rank | None = None,
    calibrate: Any = None,
    dry_run: bool = False,
    prefix: str = "exact",
    context: bool | None = None,
    dynamic_grid: bool = False,
    grid: Grid | None = None,
    kernel_init: str | None = None,
    allow_stale: bool = False,
    seed: int = 0,
    progress: bool = True,
    **calibration_options: Any,
) -> ReplacementReport:
    """Replace the attention layers of a plan, in place on this model instance, all or nothing.

    Args:
        model: the model, or anything that contains it.
        plan: a :class:`Plan`, or the path of one.
        variant: ``dw``, ``lowrank_dw``, ``conv``, ``ens_dw`` or ``spvit``; plans that list heads
            need ``dw``.
        rank: of ``lowrank_dw``: a width, a fraction of C (0.25), or ``{"fidelity": 0.95}``, which
            only calibration can meet. Default C / 4.
        calibrate: images from which the weights are fitted in closed form.
        dry_run: change nothing, and list refused layers instead of raising.
        prefix: what prefix tokens get: ``exact`` softmax attention, ``static`` coefficients of their own value
            and the patches' mean, or ``drop`` (models without prefix tokens).
        context: whether the terms kappa, mu and beta exist; default yes, for ``spvit`` no.
        dynamic_grid: take the patch grid from the images at run time instead of fixing it.
        grid: the patch grid ``(H, W)`` to fix, where it is not that of the model's configured image
            size.
        kernel_init: ``mean-attention`` (from the plan's mean attention maps) or ``gaussian`` (the
            paper's); by default the former where the plan has maps. Calibration overrides either.
        allow_stale: accept a plan made for other weights of the same architecture.
        seed: of the Gaussian initialisation and of calibration.
        progress: show a progress bar while calibrating.
        calibration_options: fields of :class:`dwattn.calibration.CalibrationOptions` (``refit=``, ``views=``,
            ``photos=``, ``batch_size=``, ...).

    Returns:
        A table of what was replaced and what is refused and why.

    Raises:
        PlanError: the plan is malformed, stale, or names a layer that cannot be replaced (with the
            reason).
        DwattnError: options that do not fit together. In every case, also on Ctrl-C, the model is
            as before.
    """
    model = unwrap(model)
    layout = describe(model)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    printed = plan.check_model(layout, allow_stale=allow_stale)
    _check_calibration(calibration_options, calibrate is not None)
    options = Options(
        variant=check_variant(variant),
        rank=check_rank(rank, variant, calibrate is not None),
        prefix=prefix,
        context=context,
        grid=check_grid(layout, grid, dynamic_grid),
        kernel_init=check_kernel_init(kernel_init, plan),
        seed=valid_seed(seed),
    )
    previous = _previous(model, layout, options.grid)
    planned, refused = planned_layers(layout, plan)
    if refused and not dry_run:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise PlanError(f"Nothing was replaced: the plan names layers that cannot be. {listed}")
    hook = _hook(layout, options.grid, previous)
    shims = {
        layer.site.attention_name: build_planned(layer, layout, printed, options, hook.source)
        for layer in planned
    }
    if dry_run:
        return _report(layout, plan, shims, refused, options, dry_run=True)
    updates: dict[str, Tensor] = {}
    result = None
    if calibrate is not None:
        if variant == "lowrank_dw":
            calibration_options["rank"] = options.rank
        calibration_options |= {"seed": options.seed, "progress": progress}
        result = _calibrate(model, layout, shims, hook, calibrate, calibration_options)
        updates = dict(result.updates)
        for layer in planned:
            finish(shims[layer.site.attention_name], layer.site, hook.source)
    _check_values(model, shims, updates)
    report = _report(layout, plan, shims, refused, options, dry_run=False, calibration=result)
    install(model, layout, shims, updates, _record(layout, plan, previous), hook)
    return report


def _check_calibration(calibration_options: dict[str, Any], calibrates: bool) -> None:
    known = {field.name for field in fields(CalibrationOptions)}
    for name in calibration_options:
        if name not in known:
            ours = {*known, *inspect.signature(replace).parameters} - {"calibration_options"}
            close = difflib.get_close_matches(name, sorted(ours), 1)
            remedy = f"did you mean {close[0]}=?" if close else f"it has {', '.join(sorted(ours))}."
            raise DwattnError(f"replace() has no argument {name}=; {remedy}")
    if calibration_options and not calibrates:
        names = ", ".join(calibration_options)
        raise DwattnError(
            f"replace() got {names}, which only calibration uses: pass calibrate=images."
        )
    CalibrationOptions(**calibration_options)  # refuses values now, in a dry run too


def install(
    model: nn.Module,
    layout: BackboneLayout,
    shims: dict[str, ConvertedAttention],
    updates: dict[str, Tensor],
    record: Conversion,
    hook: GridHook,
    *,
    keep_originals: bool = True,
) -> None:
    """Make all changes at once and record the originals.

    Args:
        shims: by attention name.
        updates: new values of other parameters and buffers, by name.
        record: of this replacement and those before it; becomes the model's when all else is done.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    originals = {site.attention_name: site.attention for site in layout.blocks}
    layers = {
        name: ReplacedLayer(
            name=name,
            variant=shim.layer.variant,
            original=originals[name] if keep_originals else None,
            converted=shim,
            training=shim.training,
            placement=placement(shim),
        )
        for name, shim in shims.items()
    }
    kept = {name: tensors[name].detach().clone() for name in updates} if keep_originals else {}
    record.layers = {**record.layers, **layers}
    # The first original of a parameter is the one to restore.
    record.updates = {**kept, **record.updates}
    new_hook, record.hook = record.hook is None, (hook, layout.patch_embed)
    with Transaction() as change:
        if new_hook:
            change.hook(hook, layout.patch_embed)
        if layout.raster_order is not None:
            module, override = layout.raster_order
            record.raster_order = (module, override.attribute)
            change.set(module, override.attribute, override)
        for name, shim in shims.items():
            change.swap(model, name, shim)
        for name, value in updates.items():
            change.copy(tensors[name], value)
        change.set(model, ATTRIBUTE, record)


def _previous(model: nn.Module, layout: BackboneLayout, grid: Grid | None) -> Conversion | None:
    """The record of an earlier replacement that this one adds to."""
    found = find_conversion(model)
    layers = (site.attention for site in layout.blocks)
    if of_another_record(layers, None if found is None else found[2]):
        raise PlanError(recorded_elsewhere(model))
    if found is None:
        return None
    holder, _, record = found
    if holder is not model:
        raise PlanError(
            f"Layers of a part of this model ({type(holder).__name__}) were replaced before; call replace() on "
            "that part again, or restore it first."
        )
    fixed = None if record.hook is None else record.hook[0].fixed
    if fixed != grid:
        raise PlanError(
            f"Layers of this model were replaced before with {_grid_text(fixed)}, now {_grid_text(grid)} is asked "
            "for; use the same, or dwattn.restore(model) first."
        )
    return record


def _grid_text(grid: Grid | None) -> str:
    return "dynamic_grid=True" if grid is None else f"grid={grid}"


def _check_values(
    model: nn.Module, shims: dict[str, ConvertedAttention], updates: dict[str, Tensor]
) -> None:
    """Raise :class:`CalibrationError` before a value that is not finite, or fits no parameter, gets into the model."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, shim in shims.items():
        for key, parameter in shim.layer.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise CalibrationError(
                    f"{name}: {key} would hold NaN or infinite values. Check the calibration images, or replace "
                    "without calibrate=."
                )
    for name, value in updates.items():
        if name not in tensors or tensors[name].shape != value.shape:
            found = (
                "is no parameter of the model"
                if name not in tensors
                else f"is {tuple(tensors[name].shape)}"
            )
            raise CalibrationError(
                f"Calibration fitted {name} of shape {tuple(value.shape)}, which {found}."
            )
        if not bool(torch.isfinite(value).all()):
            raise CalibrationError(
                f"Calibration gave {name} NaN or infinite values. Check the images."
            )


def _calibrate(
    model: nn.Module,
    layout: BackboneLayout,
    shims: dict[str, ConvertedAttention],
    hook: GridHook,
    images: Any,
    options: dict[str, Any],
) -> CalibrationResult:
    """Fit the replacements; the hook refuses images of another grid than they are built for."""
    installed = hook in layout.patch_embed._forward_pre_hooks.values()
    with layout.in_raster_order():
        try:
            if not installed:
                hook.install(layout.patch_embed)
            return calibrate(model, layout, shims, images, **options)
        finally:
            if not installed:
                hook.remove(layout.patch_embed)


def _hook(layout: BackboneLayout, grid: Grid | None, previous: Conversion | None) -> GridHook:
    if previous is not None and previous.hook is not None:
        return previous.hook[0]
    return GridHook(GridSource(), layout.patch_size, layout.padded, fixed=grid)


def _record(layout: BackboneLayout, plan: Plan, previous: Conversion | None) -> Conversion:
    """A new record that continues ``previous``, so that a failure leaves that one as it was."""
    if previous is None:
        return Conversion(plan=plan, backbone=layout.name)
    record = copy.copy(previous)
    criteria = dict.fromkeys([*previous.plan.criterion.split("+"), *plan.criterion.split("+")])
    record.plan = plan.model_copy(
        update={"layers": [*previous.plan.layers, *plan.layers], "criterion": "+".join(criteria)}
    )
    return record


def _report(
    layout: BackboneLayout,
    plan: Plan,
    shims: dict[str, ConvertedAttention],
    refused: dict[str, str],
    options: Options,
    *,
    dry_run: bool,
    calibration: Any = None,
) -> ReplacementReport:
    entries = dict(zip(plan.relative_names(), plan.layers, strict=True))
    rows = []
    for index, site in enumerate(layout.blocks):
        entry = entries.get(relative_name(layout, site.attention_name))
        shim = shims.get(site.attention_name)
        reason = refused.get(site.attention_name) or (
            refusal(site.attention) if entry is None else None
        )
        row = ReplacementRow(index, site.attention_name, "kept", planned=entry is not None)
        if shim is not None and entry is not None:
            heads = getattr(shim.layer, "replaced", None)
            row = ReplacementRow(
                block=index,
                name=site.attention_name,
                action="replaced",
                variant=options.variant,
                heads=None if heads is None else tuple(heads),
                score=entry.score,
                parameters=(_count(site.attention), _count(shim)),
                planned=True,
                reason=RESTING_HOOKS if _has_hooks(site.attention) else "",
            )
        elif reason:
            row = ReplacementRow(
                index, site.attention_name, "refused", planned=entry is not None, reason=reason
            )
        rows.append(row)
    settings = {
        "variant": options.variant,
        "prefix": options.prefix,
        "grid": options.grid,
        "kernel_init": options.kernel_init,
        "rank": options.rank,
    }
    return ReplacementReport(layout.family, tuple(rows), dry_run, settings, calibration)


def _has_hooks(attention: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in attention.modules()
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
