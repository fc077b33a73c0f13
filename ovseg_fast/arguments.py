"""Numbers that a caller gives: finite and in their range, or refused in one sentence that names them."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def check_number(
    name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf, what: str = "a finite number"
) -> float:
    """The value as a float, if it is a finite number in lowest..highest; `what` it is called otherwise.

    Raises:
        TypeError: it is no number. ValueError: it is NaN, infinite or out of range.
    """
    where = f" of at least {lowest:g}" if highest == math.inf else f" in {lowest:g}..{highest:g}"
    wrong = f"{name} must be {what}{'' if lowest == -math.inf else where}, got {value!r}."
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(wrong)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last by a tensor of several
        raise TypeError(wrong) from None
    if not math.isfinite(number) or not lowest <= number <= highest:
        raise ValueError(wrong)
    return number


def check_whole(name: str, value: Any, of: str = "") -> None:
    """Raises TypeError for anything but a whole number, such as `True`, 1.0 or NaN; `of` says what it counts."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number{of and ' of '}{of}, got {value!r}.")
