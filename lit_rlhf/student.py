"""Student's t: intervals of the mean of a few values."""

import functools
import math
import statistics
from collections.abc import Iterable


def half_width(values: Iterable[float], level: float = 0.95) -> float:
    """Half of Student's t interval of the mean of independent values, say of a few seeds; NaN of fewer than two.

    For as few values as a sweep has seeds the bootstrap would be too narrow.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)  # 4.303 standard errors of 1 / sqrt(3)
    2.484
    """
    values = [float(value) for value in values]
    if len(values) < 2:
        return math.nan
    return t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))


@functools.cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """t with P(-t < T < t) = ``level`` for Student's T (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        power = freedom % 2
        term, total = math.cos(angle) ** power, 0.0
        while power <= freedom - 2:
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
            power += 2
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if freedom % 2 else total

    low, high = 0.0, 1.0
    while inside(high) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return low
