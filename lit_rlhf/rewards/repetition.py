"""Rewards against saying the same thing again."""

from collections.abc import Sequence
from typing import Any

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.ngrams import ngrams


def distinct_share(text: str, n: int) -> float:
    """distinct-n: the number of different n-grams of words over the number of n-grams (Li et al. 2016,
    arXiv:1510.03055, section 5.3); 1 for a text that is too short to have one.

    >>> distinct_share("the film the film", n=1), distinct_share("a b", n=3)
    (0.5, 1.0)
    """
    words = text.lower().split()
    found = ngrams(words, n)
    return len(set(found)) / len(found) if found else 1.0


class DistinctReward:
    """distinct-n of the completion, in (0, 1].

    Args:
        n: words of an n-gram, at least 1.

    Raises:
        UserError: ``n`` is out of its range.
    """

    name = "distinct"

    def __init__(self, *, n: int = 2) -> None:
        self.n = check_int("reward.n", n, at_least=1)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:  # noqa: ARG002
        return [distinct_share(text, self.n) for text in completions]


class RepetitionPenalty:
    """Minus ``penalty`` for every n-gram of words that stood in the completion before.

    A count, where ``DistinctReward`` is a share: a long completion pays for each repetition.

    Args:
        n: words of an n-gram, at least 1.
        penalty: reward per repeated n-gram, above 0.

    Raises:
        UserError: a value out of range.
    """

    name = "repetition"

    def __init__(self, *, n: int = 3, penalty: float = 0.1) -> None:
        self.n = check_int("reward.n", n, at_least=1)
        self.penalty = check_number("reward.penalty", penalty, above=0)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:  # noqa: ARG002
        return [-self.penalty * self._repeated(text) for text in completions]

    def _repeated(self, text: str) -> int:
        count = max(0, len(text.split()) - self.n + 1)
        return round(count * (1 - distinct_share(text, self.n)))
