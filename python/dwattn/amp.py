"""Mixed precision by name (``no``, ``bf16``, ``fp16``), for scoring, calibration and training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Amp = Literal["no", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AMP_NAMES = ("no", *_DTYPES)


def autocast(amp: Amp, device: str, *, cache: bool = True) -> AbstractContextManager[None]:
    """The autocast context of a device type; ``no`` leaves everything as it is.

    ``cache`` keeps cast weights until the outermost autocast ends, which is only right while no weight changes.
    """
    if amp == "no":
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(
        device, dtype=_DTYPES[amp], cache_enabled=cache
    )
    return context
