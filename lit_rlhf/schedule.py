"""Coefficients that change over a run."""


def linear(start: float, end: float, progress: float) -> float:
    """A straight line from ``start`` at progress 0 to ``end`` at progress 1, exact at both.

    Raises:
        ValueError: ``progress`` lies outside [0, 1], where the line would go on beyond its ends.

    >>> linear(0.3, 0.1, progress=1.0)
    0.1
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} must lie in [0, 1]")
    return start * (1 - progress) + end * progress
