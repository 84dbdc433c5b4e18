"""What a study compares: named products of settings that share one recipe, one set of seeds and one baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dwattn.errors import TrainingError
from dwattn.files import parse_json
from dwattn.finetune.recipe import Recipe, Seed
from dwattn.finetune.stages import KernelInit, Stages, second_stage
from dwattn.plan import problems

Criterion = Literal[
    "variance", "residual", "perturbation", "highest-variance", "refine", "dsp", "dsp-e2e"
]
#: Criteria that choose among whole blocks only.
OF_BLOCKS = ("highest-variance", "refine")
Count = Annotated[int, Field(ge=1)]
BASELINE = "mhsa"
SETTINGS = ("attention", "criterion", "count", "stages", "init")


class Kind(BaseModel):
    """A replacement: ``variant`` and, of ``lowrank_dw``, ``rank``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = "dw"
    rank: int | float | None = None

    def __str__(self) -> str:
        return self.variant if self.rank is None else f"{self.variant} {self.rank:.4g}"


class Comparison(BaseModel):
    """The product of all lists.

    Args:
        blocks: numbers of whole blocks to replace; heads: numbers of single heads anywhere, which only ``dw`` can.
        criteria: how they are chosen. ``refine`` starts from ``residual`` and exchanges blocks where that helps a
            calibrated copy, see :func:`dwattn.refine`. ``dsp`` trains gates on the fine-tuned model and reuses the
            learned set there (the paper's DSP-2S); ``dsp-e2e`` keeps what the gates' training made of the weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = (Kind(),)
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1)] = ("variance",)
    blocks: tuple[Count, ...] = ()
    heads: tuple[Count, ...] = ()
    stages: Annotated[tuple[Stages, ...], Field(min_length=1)] = ("two-stage",)
    kernel_inits: Annotated[tuple[KernelInit, ...], Field(min_length=1)] = ("calibrated",)

    @model_validator(mode="after")
    def _fits(self) -> Comparison:
        if not self.blocks and not self.heads:
            raise ValueError("give blocks, heads or both")
        others = [kind.variant for kind in self.kinds if kind.variant != "dw"]
        if others and self.heads:
            raise ValueError(f"single heads can only be dw, not {', '.join(others)}")
        whole = [criterion for criterion in self.criteria if criterion in OF_BLOCKS]
        if self.heads and whole:
            raise ValueError(f"{', '.join(whole)}: for blocks alone")
        if "refine" in self.criteria and "spvit" in [kind.variant for kind in self.kinds]:
            raise ValueError("refine calibrates what it compares, and spvit has no calibration")
        if "calibrated" in self.kernel_inits and "spvit" in others:
            raise ValueError(
                "spvit has no calibration: its kernel_inits are mean-attention and gaussian"
            )
        if "dsp" in self.criteria and "mean-attention" in self.kernel_inits:
            raise ValueError(
                "dsp measures no mean attention: its kernel_inits are calibrated and gaussian"
            )
        gated = (set(self.stages), set(self.kernel_inits)) == ({"two-stage"}, {"gaussian"})
        if "dsp-e2e" in self.criteria and (others or not gated):
            raise ValueError("dsp-e2e trains dw in two-stage from gaussian kernels")
        return self

    @property
    def needs_second(self) -> bool:
        """Whether any cell trains by the recipe of the second stage; ``dsp`` learns by it in any case."""
        return set(self.stages) != {"one-stage"} or "dsp" in self.criteria

    def cells(self, seed: int) -> Iterator[Cell]:
        """All settings with one seed."""
        counts = [(count, "blocks") for count in self.blocks]
        counts += [(count, "heads") for count in self.heads]
        for stages in self.stages:
            for criterion in self.criteria:
                for count, unit in counts:
                    for kind in self.kinds:
                        for init in self.kernel_inits:
                            yield Cell(seed, stages, kind, criterion, count, unit, init)


class StudyGrid(BaseModel):
    """A study: comparisons, and the unconverted model (``mhsa``) trained as long, for every seed.

    Args:
        comparisons: by name, in the order in which they are run; what several have in common is run once.
        score_images: to measure the criteria on; calibration_images: for ``calibrated``.
        calibration: options of the closed-form fit, see :mod:`dwattn.calibration`.
        recipe: of the first (or only) stage; its seed is replaced by the cell's.
        second: recipe of the second stage; default: half the epochs at half the batch size, as in the paper.
        head: recipe that fits the head to the frozen backbone before anything else, once for each seed; default: the
            head starts from nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["dwattn-study"] = "dwattn-study"
    schema_version: Literal[1] = 1
    comparisons: Annotated[dict[str, Comparison], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    score_images: Annotated[int, Field(ge=2)] = 1000
    calibration_images: Annotated[int, Field(ge=1)] = 120
    calibration: dict[str, Any] = {}
    recipe: Recipe
    second: Recipe | None = None
    head: Recipe | None = None

    @model_validator(mode="after")
    def _has_a_second_stage(self) -> StudyGrid:
        """Refuse a batch that has no half now, not when the first stage is done."""
        if any(comparison.needs_second for comparison in self.comparisons.values()):
            self.second_recipe(0)
        return self

    def second_recipe(self, seed: int) -> Recipe:
        """Of the second stage of the cells with this seed."""
        return (self.second or second_stage(self.recipe)).but(seed=seed)

    def own_steps(self, cell: Cell) -> int:
        """Optimiser steps of a run, without the head's and the first stage, which the runs of a seed share."""
        second = self.second_recipe(cell.seed).steps
        learned = second if cell.criterion == "dsp" else 0
        if cell.stages != "one-stage":
            return learned + second
        return 0 if cell.kind is None else learned + self.recipe.steps

    @classmethod
    def load(cls, path: str | Path) -> StudyGrid:
        """Read a grid file (JSON).

        Raises:
            TrainingError: missing, not JSON, or fields that are wrong, each named.
        """
        try:
            return cls.model_validate(parse_json(Path(path).read_bytes()))
        except OSError as error:
            raise TrainingError(f"Cannot read the study {str(path)!r}: {error.strerror}.") from None
        except ValidationError as error:
            raise TrainingError(
                f"The study {str(path)!r} is malformed: {problems(error)}."
            ) from None
        except ValueError as error:
            raise TrainingError(f"The study {str(path)!r} is no JSON: {error}.") from None

    def cells(self, only: Sequence[str] | None = None) -> list[Cell]:
        """All cells of all comparisons (or of those named), each once, baselines before the cells compared with them.

        Raises:
            TrainingError: a name that is no comparison.
        """
        unknown = sorted(set(only or ()) - set(self.comparisons))
        if unknown:
            raise TrainingError(
                f"There is no comparison {', '.join(unknown)}; there are {', '.join(self.comparisons)}."
            )
        found: dict[Cell, None] = {}
        for name in self.comparisons if only is None else only:
            for seed in self.seeds:
                found[Cell(seed)] = None
                for cell in self.comparisons[name].cells(seed):
                    found[cell.baseline] = None
                    found[cell] = None
        return list(found)

    def shared(self) -> dict[str, Any]:
        """The settings that all cells share and that a begun study cannot change; comparisons and seeds may be added."""
        return self.model_dump(mode="json", exclude={"comparisons", "seeds"})


@dataclass(frozen=True)
class Cell:
    """One training run of a study; without ``kind`` the unconverted model, trained in the same stages."""

    seed: int
    stages: Stages = "one-stage"
    kind: Kind | None = None
    criterion: Criterion | None = None
    count: int = 0
    unit: str = "blocks"
    kernel_init: KernelInit | None = None

    @property
    def baseline(self) -> Cell:
        """The unconverted model that was trained on as many images; for ``frozen`` all of it is trained."""
        return Cell(self.seed, "one-stage" if self.stages == "one-stage" else "two-stage")

    @property
    def label(self) -> tuple[str, ...]:
        """Everything but the seed, for tables."""
        if self.kind is None:
            return (BASELINE, "", "", self.stages, "")
        count = str(self.count) if self.unit == "blocks" else f"{self.count} heads"
        return (str(self.kind), str(self.criterion), count, self.stages, str(self.kernel_init))

    @property
    def name(self) -> str:
        """A file name."""
        words = "-".join(word.replace(" ", "-") for word in self.label if word)
        return f"{words}-seed{self.seed}"


def paper_grid(depth: int, heads: int, recipe: Recipe, **shared: Any) -> StudyGrid:
    """The paper's comparisons with its counts of 24 blocks scaled to ``depth``, and ours.

    Args:
        depth, heads: of the model: blocks, and heads a block.
        shared: other fields of :class:`StudyGrid`.
    """

    def blocks(of_24: int) -> int:
        return max(1, min(depth - 1, round(of_24 * depth / 24)))

    half, most = blocks(12), blocks(18)
    dw, quarter = Kind(variant="dw"), Kind(variant="lowrank_dw", rank=0.25)
    narrow = [Kind(variant="lowrank_dw", rank=rank) for rank in (0.5, 0.125)]
    ensemble = Kind(variant="ens_dw")
    return StudyGrid(
        comparisons={
            # What the project is for: half of the blocks and three quarters.
            "main": Comparison(kinds=(dw, quarter), blocks=(half, most), criteria=("residual",)),
            # Table 2: CL2, CL3, CL6; CL4; CL5, CL7.
            "conv": Comparison(kinds=(dw, Kind(variant="conv")), blocks=(half,)),
            "ensemble": Comparison(kinds=(ensemble,), blocks=(blocks(10), half)),
            "spvit": Comparison(
                kinds=(Kind(variant="spvit"),), blocks=(blocks(10),), kernel_inits=("mean-attention",)
            ),
            # Closed form against the paper's start.
            "init": Comparison(blocks=(half,), kernel_inits=("calibrated", "gaussian", "mean-attention")),
            "ensemble-init": Comparison(kinds=(ensemble,), blocks=(blocks(10),), kernel_inits=("gaussian",)),
            # Tables 5 and A.1.
            "stages": Comparison(blocks=(half,), stages=("two-stage", "one-stage", "frozen")),
            "selection": Comparison(blocks=(half,), criteria=("variance", "highest-variance", "residual", "dsp")),
            "selection-more": Comparison(blocks=(blocks(17),), criteria=("variance", "dsp")),
            "selection-few": Comparison(blocks=(blocks(7),), criteria=("highest-variance",)),
            "dsp-e2e": Comparison(
                blocks=(half, blocks(17)), criteria=("dsp-e2e",), kernel_inits=("gaussian",)
            ),
            "scattered": Comparison(heads=(half * heads,), criteria=("variance", "dsp")),
            # How far it goes, and at what width.
            "ranks": Comparison(kinds=(*narrow, ensemble), blocks=(half, most), criteria=("residual",)),
            "depth": Comparison(
                kinds=(dw, quarter), blocks=(blocks(16), blocks(20), depth), criteria=("residual",)
            ),
        },
        recipe=recipe,
        **shared,
    )  # fmt: skip


def read_part(path: Path) -> Any:
    """A JSON file that a study keeps in its folder.

    Raises:
        TrainingError: it cannot be read, or is damaged.
    """
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} of the study cannot be read ({error}); remove it, and it is made again."
        ) from error
