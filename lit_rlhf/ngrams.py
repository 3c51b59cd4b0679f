"""Runs of words."""

from collections.abc import Sequence


def ngrams(words: Sequence[str], n: int) -> list[str]:
    """All runs of ``n`` words, which hold no blanks, in order, joined by blanks.

    >>> ngrams(["a", "b", "c"], 2)
    ['a b', 'b c']
    """
    return [" ".join(run) for run in zip(*(words[start:] for start in range(n)), strict=False)]
