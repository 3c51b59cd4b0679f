"""A reward for words that should, or should not, be in a completion."""

import re
from collections.abc import Sequence
from typing import Any

from lit_rlhf.errors import UserError


class KeywordReward:
    """The number of different ``keywords`` in a completion, minus the number of different ``forbidden`` words in it.

    A word counts once however often it is repeated, so repetition earns nothing. Whole words, in any case: ``art`` is
    not in ``party``.

    Args:
        keywords: words or phrases that earn 1 each.
        forbidden: words or phrases that cost 1 each.

    Raises:
        UserError: no words, an empty word, or a word in both lists.
    """

    name = "keyword"

    def __init__(self, *, keywords: Sequence[str] = (), forbidden: Sequence[str] = ()) -> None:
        for key, words in (("keywords", keywords), ("forbidden", forbidden)):
            listed = isinstance(words, Sequence) and not isinstance(words, str)
            if not listed or not all(isinstance(word, str) and word.strip() for word in words):
                raise UserError(f"reward.{key} must be a list of words, got {words!r}")
        wanted, unwanted = ({word.strip().lower() for word in words} for words in (keywords, forbidden))
        if not wanted | unwanted:
            raise UserError("reward.keywords and reward.forbidden are both empty: there is nothing to reward")
        if both := wanted & unwanted:
            raise UserError(f"reward.keywords and reward.forbidden share {sorted(both)}")
        self._wanted = [_whole(word) for word in sorted(wanted)]
        self._unwanted = [_whole(word) for word in sorted(unwanted)]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:  # noqa: ARG002
        return [float(_found(self._wanted, c) - _found(self._unwanted, c)) for c in completions]


def _whole(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def _found(patterns: list[re.Pattern[str]], text: str) -> int:
    return sum(pattern.search(text) is not None for pattern in patterns)
