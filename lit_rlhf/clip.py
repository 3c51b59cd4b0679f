"""Clip ranges of PPO's ratio and value. ``at(progress)`` gives the bounds for a point of the training."""

from dataclasses import dataclass

from lit_rlhf.checks import check_number


@dataclass(frozen=True, kw_only=True)
class ClipBounds:
    """What ``clipped_policy_loss`` and ``clipped_value_loss`` take; None does not clip.

    Args:
        low: the ratio counts down to ``1 - low``.
        high: the ratio counts up to ``1 + high``.
        value: a value may move this far from its old one, in units of the reward.
        dual: tokens of negative advantage ``A`` lose at most ``-dual * A``.
    """

    low: float | None
    high: float | None
    value: float | None
    dual: float | None = None


class AsymmetricClip:
    """Ratio within ``[1 - low, 1 + high]``: clip-higher (DAPO, arXiv:2503.14476, section 3.1).

    Args:
        low: in (0, 1).
        high: > 0.
        value_range: > 0, in units of the reward; None does not clip the value.

    Raises:
        UserError: a bound is out of its range.
    """

    def __init__(self, *, low: float = 0.2, high: float = 0.28, value_range: float | None = 0.2):
        self._bounds = ClipBounds(
            low=check_number("clip.low", low, above=0, below=1),
            high=check_number("clip.high", high, above=0),
            value=_value_range(value_range),
        )

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - constant
        """The bounds, the same at any ``progress`` (0 the start, 1 the end of training)."""
        return self._bounds


class SymmetricClip:
    """Ratio within ``[1 - range, 1 + range]`` (PPO, arXiv:1707.06347, eq. 7).

    Args:
        range: in (0, 1); from 1 on, the lower bound of the ratio would not be positive.
        value_range: > 0, in units of the reward; None does not clip the value.

    Raises:
        UserError: a range is out of its own range.

    >>> SymmetricClip(range=0.1, value_range=None).at(progress=0.5)
    ClipBounds(low=0.1, high=0.1, value=None, dual=None)
    """

    def __init__(self, *, range: float = 0.2, value_range: float | None = 0.2):
        range = check_number("clip.range", range, above=0, below=1)
        self._bounds = ClipBounds(low=range, high=range, value=_value_range(value_range))

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - constant
        """The bounds, the same at any ``progress`` (0 the start, 1 the end of training)."""
        return self._bounds


def _value_range(value_range: float | None) -> float | None:
    return None if value_range is None else check_number("clip.value_range", value_range, above=0)
