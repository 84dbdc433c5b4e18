"""Numbers that a user gave, which may be numpy's."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from dwattn.errors import DwattnError


def is_number(value: object) -> bool:
    """A finite real number; no truth value."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """A whole number; no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, error: type[DwattnError] = DwattnError) -> int:
    """The value of the argument ``name`` as Python's integer.

    Raises:
        error: it is something else.
    """
    if not is_whole(value):
        raise error(f"{name}={value!r} must be a whole number.")
    return int(value)
