"""Checks of constructor arguments, with messages that name the config key and the value."""

import math

from lit_rlhf.errors import UserError


def check_number(
    key: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """``value`` as a float, if it is a finite number within the bounds.

    Raises:
        UserError: it is not; names ``key``, the bounds and ``value``.

    >>> check_number("kl.target", 6, above=0)
    6.0
    """
    bounds = (("above", above), ("at least", at_least), ("below", below), ("at most", at_most))
    wanted = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not number
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (below is not None and value >= below)
        or (at_most is not None and value > at_most)
    ):
        raise UserError(f"{key} must be a finite number {wanted}".rstrip() + f", got {value!r}")
    return float(value)


def check_bool(key: str, value: bool) -> bool:
    """``value``, if it is true or false: a text such as "off" would count as true.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, bool):
        raise UserError(f"{key} must be true or false, got {value!r}")
    return value


def check_text(key: str, value: str) -> str:
    """``value``, if it is a text with something in it.

    Raises:
        UserError: it is not; names ``key`` and ``value``.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{key} must be a text, got {value!r}")
    return value


def check_int(key: str, value: int, *, at_least: int) -> int:
    """``value``, if it is a whole number of at least ``at_least``.

    Raises:
        UserError: it is not; names ``key``, the bound and ``value``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise UserError(f"{key} must be a whole number of at least {at_least}, got {value!r}")
    return value
