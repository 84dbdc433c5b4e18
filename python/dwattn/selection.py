"""``select``: from scores to a plan, for a number of blocks or heads, or for a speedup on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dwattn.errors import PlanError
from dwattn.latency import LatencyTable, measure_latency
from dwattn.numeric import is_whole
from dwattn.plan import Plan
from dwattn.scores import LayerScore, Scores, block_score, check_criterion, head_scores

Head = tuple[int, int]
#: Two scores are close if they differ by no more than this share: such blocks swap ranks from one set of images to
#: another, and a set with the wrong one can be much worse (``benchmarks/results/distill-without-exchange.json``).
CLOSE = 0.05


def select(
    scores: Scores,
    blocks: int | None = None,
    heads: int | None = None,
    target_speedup: float | None = None,
    criterion: str = "variance",
    order: Iterable[int | str] | Iterable[Head] | None = None,
    latency: LatencyTable | None = None,
    model: nn.Module | None = None,
) -> Plan:
    """Choose what to replace; the lowest scores first, equal ones in depth order.

    Args:
        scores: of :func:`dwattn.score`. Layers that it refused are never chosen.
        blocks: number of whole layers.
        heads: number of heads anywhere in the model (scattered).
        target_speedup: as few whole layers as reach this speedup of the whole model, as estimated
            from ``latency``, or from a measurement of ``model`` on this machine.
        criterion: ``"variance"`` (Sigma_b, Sigma_h), ``"residual"`` (unexplained share of the
            layer's output) or ``"perturbation"`` (what the unexplained part does to the residual
            stream).
        order: the user's own ranking instead: block indices or attention layer names, or ``(block,
            head)`` pairs with ``heads=``. Without ``blocks``, ``heads`` and ``target_speedup`` all
            of it is chosen.
        latency, model: see ``target_speedup``.

    Returns:
        A plan with the mean attention maps as initial kernels.

    Raises:
        PlanError: arguments that contradict each other, more blocks or heads than there are, a
            speedup that cannot be reached, or an order with unknown, repeated or refused layers.
        ScoreError: an unknown criterion, or scores that are missing or NaN.
    """
    wanted = {"blocks": blocks, "heads": heads, "target_speedup": target_speedup}
    given = [name for name, value in wanted.items() if value is not None]
    if len(given) > 1 or (not given and order is None):
        raise PlanError(
            "Pass exactly one of blocks=, heads= and target_speedup= (or order= alone); got "
            f"{', '.join(f'{name}={wanted[name]}' for name in given) or 'none of them'}."
        )
    check_criterion(criterion)
    label = criterion if order is None else "manual"
    own = None if order is None else list(order)
    if heads is not None or (own and _is_pair(own[0])):
        ranked_heads = _rank_heads(scores, criterion) if own is None else _check_pairs(scores, own)
        count = _count(heads, len(ranked_heads), "heads", scores)
        return _heads_plan(scores, ranked_heads[:count], criterion, label)
    ranked = rank_blocks(scores, criterion) if own is None else _check_order(scores, own)
    if target_speedup is not None:
        count = _blocks_for(target_speedup, ranked, latency, model, scores)
    else:
        count = _count(blocks, len(ranked), "blocks", scores)
    return _blocks_plan(scores, ranked[:count], criterion, label)


def rank_blocks(scores: Scores, criterion: str) -> list[LayerScore]:
    """Scored layers, the lowest scores first, equal ones in depth order."""
    return sorted(scores.layers, key=lambda layer: (block_score(layer, criterion), layer.block))


def close_call(
    scores: Scores, blocks: int, criterion: str = "variance"
) -> tuple[LayerScore, LayerScore] | None:
    """The last of ``blocks`` chosen and the first that is not, if their scores are too close to decide; else None.

    :func:`dwattn.refine` with ``width=1`` and the same criterion tries both.

    Raises:
        ScoreError: an unknown criterion, or scores that are missing or NaN.
    """
    ranked = rank_blocks(scores, criterion)
    if not 0 < blocks < len(ranked):
        return None
    last, left = ranked[blocks - 1], ranked[blocks]
    low, high = block_score(last, criterion), block_score(left, criterion)
    return (last, left) if high - low <= CLOSE * abs(high) else None


def _rank_heads(scores: Scores, criterion: str) -> list[Head]:
    ranked = [
        (value, layer.block, head)
        for layer in scores.layers
        for head, value in enumerate(head_scores(layer, criterion))
    ]
    return [(block, head) for _, block, head in sorted(ranked)]


def _count(count: int | None, available: int, what: str, scores: Scores) -> int:
    if count is None:
        return available
    if not is_whole(count) or count < 1:
        raise PlanError(f"{what}={count!r} must be a whole number of at least 1.")
    if count > available:
        refused = (
            f" ({len(scores.refused)} more layers were refused: {_refusals(scores)})"
            if scores.refused
            else ""
        )
        raise PlanError(
            f"{what}={count} were asked for, but only {available} can be replaced{refused}."
        )
    return int(count)


def _refusals(scores: Scores) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in scores.refused.items())


def _is_pair(entry: Any) -> bool:
    """A tuple, a list or a row of an array, not a name."""
    return hasattr(entry, "__len__") and not isinstance(entry, str)


def _check_order(scores: Scores, order: list[Any]) -> list[LayerScore]:
    chosen: list[LayerScore] = []
    for entry in order:
        found = [
            layer
            for layer in scores.layers
            if entry == layer.name or (is_whole(entry) and entry == layer.block)
        ]
        if not found:
            reason = scores.refused.get(str(entry))
            known = ", ".join(f"{layer.block} ({layer.name})" for layer in scores.layers)
            raise PlanError(
                f"order names {entry!r}, which {f'was refused: {reason}' if reason else 'is not a scored layer.'} "
                f"Scored are {known}."
            )
        if found[0] in chosen:
            raise PlanError(f"order names {entry!r} twice.")
        chosen += found
    if not chosen:
        raise PlanError("order is empty; list at least one block.")
    return chosen


def _check_pairs(scores: Scores, order: list[Any]) -> list[Head]:
    sizes = {layer.block: layer.num_heads for layer in scores.layers}
    pairs: list[Head] = []
    for entry in order:
        pair = tuple(entry) if _is_pair(entry) else ()
        if (
            len(pair) != 2
            or not all(is_whole(x) for x in pair)
            or not 0 <= pair[1] < sizes.get(pair[0], 0)
        ):
            raise PlanError(
                f"order names {entry!r}; expected (block, head) of a scored layer, whose heads are "
                f"{sizes}."
            )
        if pair in pairs:
            raise PlanError(f"order names {entry!r} twice.")
        pairs.append((int(pair[0]), int(pair[1])))
    return pairs


def _blocks_for(
    target: float,
    ranked: list[LayerScore],
    latency: LatencyTable | None,
    model: nn.Module | None,
    scores: Scores,
) -> int:
    """The smallest number of the ranked blocks that reaches the target."""
    if not target > 1:
        raise PlanError(f"target_speedup={target} must be more than 1.")
    if latency is None:
        if model is None:
            raise PlanError(
                "target_speedup= needs the latencies of this machine: pass model= to measure them "
                "now, or latency= from dwattn.latency.measure_latency(model)."
            )
        latency = measure_latency(model, grid=scores.grid)
    best = 1.0
    for count in range(1, len(ranked) + 1):
        best = latency.speedup({layer.name: None for layer in ranked[:count]})
        if best >= target:
            return count
    raise PlanError(
        f"target_speedup={target} cannot be reached: replacing all {len(ranked)} layers is "
        f"estimated to give {best:.2f}x on this machine ({latency.describe()}). Ask for less, or "
        "time a narrower variant: measure_latency(model, variant='lowrank_dw') (--variant)."
    )


def _blocks_plan(scores: Scores, layers: list[LayerScore], criterion: str, label: str) -> Plan:
    chosen = sorted(layers, key=lambda layer: layer.block)
    return _plan(
        scores, [(layer, None, _score_or_none(layer, criterion, label)) for layer in chosen], label
    )


def _heads_plan(scores: Scores, pairs: list[Head], criterion: str, label: str) -> Plan:
    entries: list[tuple[LayerScore, list[int] | None, float | None]] = []
    for layer in scores.layers:
        heads = sorted(head for block, head in pairs if block == layer.block)
        if not heads:
            continue
        value = None
        if label != "manual":
            each = head_scores(layer, criterion)
            value = sum(each[head] for head in heads) / len(heads)
        entries.append((layer, None if len(heads) == layer.num_heads else heads, value))
    return _plan(scores, entries, label)


def _score_or_none(layer: LayerScore, criterion: str, label: str) -> float | None:
    return None if label == "manual" else block_score(layer, criterion)


def _plan(
    scores: Scores, entries: list[tuple[LayerScore, list[int] | None, float | None]], criterion: str
) -> Plan:
    layers = [
        {
            "name": layer.name,
            "heads": heads,
            "score": None if value is None else _short(value),
            "kernel_init": _kernel_init(layer, heads),
        }
        for layer, heads, value in entries
    ]
    # Scores may come from a damaged file, with a NaN among the maps or a layer listed twice.
    return Plan.validated(
        {"criterion": criterion, "model": scores.model, "layers": layers}, "A plan of these scores"
    )


def _kernel_init(layer: LayerScore, heads: list[int] | None) -> dict[str, list[Any]]:
    """The fields of :class:`dwattn.plan.KernelInit`."""
    index = list(range(layer.num_heads)) if heads is None else heads
    return {
        "kernel": [
            [[_short(x) for x in row] for row in layer.mean_kernel[h].tolist()] for h in index
        ],
        "prefix": [[_short(x) for x in layer.prefix_mass[h].tolist()] for h in index],
        "uniform": [_short(layer.uniform[h].item()) for h in index],
    }


def _short(value: float) -> float:
    """Six significant digits: a plan is read by people."""
    return float(f"{value:.6g}")
