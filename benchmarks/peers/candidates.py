"""What is compared: every candidate builds its model, fitted on photos or only with the right shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

import dwattn
from dwattn.attention import ReplacementAttention
from dwattn.demo.pretrained import DEPTH, DIM, HEADS

from . import heads, merging
from .model import SizedModel

#: Blocks that ``dw`` takes in front of merging, which destroys the grid.
FRONT = 5
DW, LOWRANK, MERGING, PRUNING = "dw", "lowrank_dw", "token merging", "head pruning"
REFITTED, BOTH = "head pruning, refitted", "dw, then token merging"
NARROW = DIM // 4


@dataclass(frozen=True)
class Given:
    """What candidates are made from.

    Args:
        model: the original; photos: to calibrate; ranking: blocks to replace, by their number.
    """

    model: SizedModel
    photos: Tensor
    ranking: dict[int, list[int]]
    _made: dict[tuple[object, ...], SizedModel] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[], SizedModel], *key: object) -> SizedModel:
        """What ``make`` builds, kept for other candidates that need the same."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class Candidate:
    """A method at one setting.

    Args:
        method: of the names above; amount: replaced blocks, merged tokens a block, or removed heads a layer.
    """

    method: str
    amount: int

    @property
    def setting(self) -> str:
        """For people."""
        if self.method in (DW, LOWRANK):
            return f"{self.amount} of {DEPTH} blocks"
        if self.method in (PRUNING, REFITTED):
            return f"{self.amount} of {HEADS} heads"
        return f"r={self.amount}" + (f" behind block {FRONT}" if self.method == BOTH else "")

    @property
    def name(self) -> str:
        return f"{self.method}, {self.setting}"

    def fitted(self, given: Given) -> SizedModel:
        """With weights, as they are measured for fidelity."""
        if self.method in (PRUNING, REFITTED):
            pruned = given.once(lambda: self._pruned(given, given.photos), PRUNING, self.amount)
            return (
                pruned if self.method == PRUNING else heads.refit(pruned, given.model, given.photos)
            )
        blocks = self._blocks(given)
        replaced = given.once(
            lambda: self._replaced(given, given.photos), self.method == LOWRANK, *blocks
        )
        return self._merged(replaced)

    def shaped(self, given: Given) -> SizedModel:
        """The same graph with any weights, made in no time."""
        if self.method in (PRUNING, REFITTED):
            return self._pruned(given, given.photos[:1])
        return self._merged(self._replaced(given, None))

    def _pruned(self, given: Given, photos: Tensor) -> SizedModel:
        return heads.prune(given.model, self.amount / HEADS, photos)

    def _blocks(self, given: Given) -> list[int]:
        """Those to replace."""
        if self.method == MERGING:
            return []
        return list(range(FRONT)) if self.method == BOTH else given.ranking[self.amount]

    def _replaced(self, given: Given, photos: Tensor | None) -> SizedModel:
        """With its blocks replaced; without photos, with the layers that calibration would leave."""
        blocks = self._blocks(given)
        if not blocks:
            return given.model
        student = copy.deepcopy(given.model)
        narrow = {"variant": "lowrank_dw", "rank": NARROW} if self.method == LOWRANK else {}
        fit = {} if photos is None else {"calibrate": photos, "views": 1}
        plan = dwattn.Plan.for_layers(student, blocks)
        dwattn.replace(student, plan, progress=False, **narrow, **fit)
        if photos is None:
            for layer in student.modules():
                if isinstance(layer, ReplacementAttention):
                    layer.own_prefix_projection()
        return student

    def _merged(self, model: SizedModel) -> SizedModel:
        if self.method not in (MERGING, BOTH):
            return model
        return merging.merged_model(model, self.amount, FRONT if self.method == BOTH else 0)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all parameters: what two models of one graph share."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
