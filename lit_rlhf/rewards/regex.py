"""A reward for completions that match a regular expression."""

import re
from collections.abc import Sequence
from typing import Any

from lit_rlhf.checks import check_bool
from lit_rlhf.errors import UserError


class RegexReward:
    """1 for a completion in which ``pattern`` is found, 0 for one without it.

    Args:
        pattern: a regular expression of Python's ``re``. ``.`` matches newlines too; anchor it with ``^`` and ``$``.
        whole: the whole completion must match, surrounding blanks aside.

    Raises:
        UserError: an empty pattern, or one that cannot be compiled.
    """

    name = "regex"

    def __init__(self, *, pattern: str, whole: bool = False) -> None:
        if pattern == "":
            raise UserError("reward.pattern is empty: it would match every completion")
        if not isinstance(pattern, str):
            raise UserError(f"reward.pattern must be a text, got {pattern!r}")
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"reward.pattern={pattern!r} is no regular expression: {error}") from error
        self._whole = check_bool("reward.whole", whole)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:  # noqa: ARG002
        if self._whole:
            return [float(self._pattern.fullmatch(text.strip()) is not None) for text in completions]
        return [float(self._pattern.search(text) is not None) for text in completions]
