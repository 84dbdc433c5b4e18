"""``score``: how much the attention of each block varies between images, and what static attention would lose."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dwattn import data as images
from dwattn.adapters import describe
from dwattn.amp import AMP_NAMES, Amp, autocast
from dwattn.errors import ScoreError
from dwattn.plan import ModelInfo
from dwattn.progress import progress_bar
from dwattn.ranks import Ranks
from dwattn.scores import Scores
from dwattn.scoring_run import ScoringRun, scoreable
from dwattn.untouched import ordinary_tensors, untouched, unwrap


@ordinary_tensors
def score(
    model: nn.Module,
    data: Any,
    num_images: int = 1000,
    *,
    batch_size: int = 16,
    entries: str = "patches",
    residual: bool = True,
    memory_budget: int | None = None,
    keep_maps: bool = False,
    amp: Amp = "no",
    progress: bool = True,
    distributed: bool | None = None,
) -> Scores:
    """Score every attention layer of a model; the model is exactly as before afterwards, also after
    an error.

    Args:
        model: a Vision Transformer, or a model that contains one; it is called as a whole, in eval
            mode, without gradients.
        data: an image tensor ``(N, 3, H, W)`` or an iterable of batches, see
            :func:`dwattn.data.iterate`.
        num_images: images to use (a warning says if there were fewer); over all processes together.
        batch_size: images per batch where ``data`` does not come in batches.
        entries: ``"patches"`` sums the standard deviations over patch-patch entries, ``"all"`` over
            all.
        residual: also measure the ``residual`` criterion.
        memory_budget: bytes for the attention statistics (16 per entry of a layer's maps); layers
            that do not fit together are scored in several passes over ``data``. None scores all of
            them in one pass.
        keep_maps: keep full mean and standard deviation maps in the result.
        amp: dtype in which the model computes, ``bf16`` or ``fp16`` by autocast; statistics stay fp64.
        progress: show a progress bar.
        distributed: merge the statistics of all processes of ``torch.distributed``, each of which
            passes its own share of the images (as a ``DistributedSampler`` deals them out) and gets
            the same result. None does so whenever a process group is initialised.

    Raises:
        UnsupportedAttentionError: the model has no attention layer that can be scored.
        DataError: no images, images of different sizes, or a one-shot iterator where several passes
            are needed.
        ScoreError: a single image, an unknown ``amp``, NaN activations (names the layer), or a budget smaller than one
            layer needs.
    """
    if num_images < 2:
        raise ScoreError(
            f"num_images={num_images}: the variance between images needs at least 2 of them."
        )
    if amp not in AMP_NAMES:
        raise ScoreError(f"amp={amp!r} must be one of {', '.join(AMP_NAMES)}.")
    model = unwrap(model)
    ranks = Ranks.find(distributed)
    share = ranks.share(num_images)
    with ranks.agreement():
        layout = describe(model)
        layers, refused = scoreable(layout, entries)
        run = ScoringRun(layout, layers, residual, memory_budget, data)
    like = next(layout.module.parameters())
    with (
        untouched(model),
        layout.in_raster_order(),
        run.installed(),
        _bar(progress and ranks.rank == 0, share, data) as advance,
    ):
        while run.waiting:
            with ranks.agreement():
                run.start_pass()
                for batch in images.iterate(
                    data,
                    batch_size=batch_size,
                    num_images=share,
                    device=like.device,
                    dtype=like.dtype,
                ):
                    with autocast(amp, like.device.type):
                        batch.call(model)
                    run.end_batch()
                    advance(batch.size, run.passes)
            run.finish_pass(ranks, keep_maps)
    assert run.geometry is not None
    _warn_of_doubtful(run, num_images)
    return Scores(
        layers=sorted(run.results, key=lambda layer: layer.block),
        num_images=run.total_images,
        entries=entries,
        grid=run.geometry.grid,
        num_prefix=layout.num_prefix,
        model=ModelInfo.of(layout),
        refused=refused,
    )


def _warn_of_doubtful(run: ScoringRun, num_images: int) -> None:
    """Warn the caller of :func:`score` about fewer images than asked for, and about images that are all alike."""
    if run.total_images < num_images:
        warnings.warn(
            f"The data held {run.total_images} images, fewer than num_images={num_images}; the "
            "scores are of these.",
            stacklevel=3,
        )
    if not any(layer.sigma.any() for layer in run.results):
        warnings.warn(
            f"Every attention map is the same for all {run.total_images} images (each Sigma is 0), so the scores "
            "cannot rank anything. Check that the images still differ from one another when they reach the model.",
            stacklevel=3,
        )


@contextlib.contextmanager
def _bar(show: bool, share: int, data: Any) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over images and passes; yields ``advance(images, passes)``."""
    known = images.count_images(data)
    with progress_bar("scoring", "images", show=show, transient=True) as bar:
        task = bar.add_task("scoring", total=None)

        def advance(count: int, passes: int) -> None:
            bar.update(task, advance=count, total=min(share, known or share) * passes)

        yield advance
