"""Mixed precision by name, as scoring, calibration and recipes take it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Amp = Literal["no", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AMP_NAMES = ("no", *_DTYPES)


def autocast(amp: Amp, device: str, *, cache: bool = True) -> AbstractContextManager[None]:
    """The context in which a model computes on a device type; ``no`` leaves everything as it is.

    ``cache`` keeps the cast weights until the outermost autocast ends: only while no weight changes.
    """
    if amp == "no":
        return nullcontext()
    context: AbstractContextManager[None] = torch.autocast(
        device, dtype=_DTYPES[amp], cache_enabled=cache
    )
    return context
