"""Checks of numbers given by a user, Python's or numpy's."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from dwattn.errors import DwattnError


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number (a bool is not one)."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number (a bool is not one)."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, error: type[DwattnError] = DwattnError) -> int:
    """The value of the argument ``name`` as a Python int.

    Raises:
        error: it is something else.
    """
    if not is_whole(value):
        raise error(f"{name}={value!r} must be a whole number.")
    return int(value)


def valid_seed(value: Any, error: type[DwattnError] = DwattnError) -> int:
    """The argument ``seed`` as a Python int that PyTorch's generators take.

    Raises:
        error: it is something else.
    """
    seed = whole("seed", value, error)
    if not 0 <= seed < 2**63:
        raise error(f"seed={seed} must be from 0 to 2^63 - 1.")
    return seed
