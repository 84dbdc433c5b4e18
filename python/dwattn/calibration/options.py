"""The options of calibration, checked."""

from __future__ import annotations

from dataclasses import dataclass

from dwattn.amp import AMP_NAMES, Amp
from dwattn.errors import CalibrationError
from dwattn.numeric import is_number, whole

REFIT_SCOPES = ("all", "replaced", "attention", "none")


@dataclass(frozen=True)
class CalibrationOptions:
    """How a model is calibrated.

    Args:
        batch_size: images that pass through a block together; None for the fastest number: on a CPU as many as have
            activations that fit into its cache.
        num_images: use at most this many images; None for all.
        photos: number of photos, if ``data`` already holds several views of each (``views`` must then be 1): image ``i``
            shows photo ``i % photos``, and all views of a photo are either fitted or held out.
        views: views of each photo: the photo itself, a mirrored random crop, then mosaics of four photos.
        refit: which linear layers are corrected: ``all`` that write to the residual stream after the first
            replacement, those of ``replaced`` blocks, only the ``attention`` output of replaced layers, or ``none``.
            A correction serves all tokens, most of which are patches: if only the last block is replaced and CLS alone
            is used, ``attention`` leaves CLS as it was.
        held_out: share of the photos that is not fitted, on which ridge strengths are judged (every ``1 / held_out``-th
            photo); at most a half.
        rank: of ``lowrank_dw``: ``{"fidelity": share}`` gives each layer the smallest width that keeps this share of its
            output energy; anything else keeps the width the layer was built with.
        amp: dtype in which the blocks of both models compute, ``bf16`` or ``fp16`` by autocast; residual streams,
            regressions and weights stay fp32.
        seed: of crops and mosaics.
        progress: show a progress bar on stderr.
    """

    batch_size: int | None = None
    num_images: int | None = None
    photos: int | None = None
    views: int = 3
    refit: str = "all"
    held_out: float = 0.25
    rank: int | float | dict[str, float] | None = None
    amp: Amp = "no"
    seed: int = 0
    progress: bool = True

    @property
    def fidelity(self) -> float | None:
        """The fidelity target of ``rank``, if it is one."""
        return self.rank.get("fidelity") if isinstance(self.rank, dict) else None

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_images", "photos", "views", "seed"):
            value = getattr(self, name)
            if value is not None or name in ("views", "seed"):
                object.__setattr__(self, name, whole(name, value, CalibrationError))
        if self.refit not in REFIT_SCOPES:
            raise CalibrationError(
                f"refit={self.refit!r} must be one of {', '.join(REFIT_SCOPES)}."
            )
        if self.amp not in AMP_NAMES:
            raise CalibrationError(f"amp={self.amp!r} must be one of {', '.join(AMP_NAMES)}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise CalibrationError(f"batch_size={self.batch_size} must be at least 1.")
        if self.views < 1:
            raise CalibrationError(f"views={self.views} must be at least 1: the photo itself.")
        if self.photos is not None and (self.photos < 1 or self.views > 1):
            raise CalibrationError(
                f"photos={self.photos} says that the images are views of so many photos already: it must be at least 1, "
                f"and views={self.views} must be 1."
            )
        if not (is_number(self.held_out) and 0 < self.held_out <= 0.5):
            raise CalibrationError(
                f"held_out={self.held_out!r} must be a share above 0 and at most 0.5."
            )
        if self.fidelity is not None and not (is_number(self.fidelity) and 0 < self.fidelity <= 1):
            raise CalibrationError(f"fidelity={self.fidelity!r} must lie in (0, 1].")
