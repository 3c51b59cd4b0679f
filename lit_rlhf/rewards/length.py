"""A reward for completions of a wanted length."""

from collections.abc import Sequence
from typing import Any

from lit_rlhf.checks import check_number


class LengthReward:
    """Minus ``penalty`` for every word (run of non-blanks) that a completion is away from ``target``.

    With a margin of ``tolerance`` words on both sides that costs nothing:

        reward = - penalty * max(0, |words - target| - tolerance)

    Args:
        target: the wanted number of words, at least 0.
        penalty: reward per word, above 0.
        tolerance: words, at least 0.

    Raises:
        UserError: a value out of range.
    """

    name = "length"

    def __init__(self, *, target: int, penalty: float = 0.1, tolerance: int = 0) -> None:
        self.target = check_number("reward.target", target, at_least=0)
        self.penalty = check_number("reward.penalty", penalty, above=0)
        self.tolerance = check_number("reward.tolerance", tolerance, at_least=0)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:  # noqa: ARG002
        distances = [abs(len(completion.split()) - self.target) for completion in completions]
        return [-self.penalty * max(0.0, distance - self.tolerance) for distance in distances]
