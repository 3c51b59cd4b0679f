"""A verifiable reward: the completion's number must be the right one."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from lit_rlhf.checks import check_text
from lit_rlhf.errors import UserError

# Commas only between groups of three digits: "3,4" is two numbers.
_NUMBER = r"(?<![\d.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)"


class VerifierReward:
    """1 for a completion whose answer equals that of its prompt's column, 0 for any other.

    The answer is the last number in the completion, or what ``pattern``'s first group finds. Numbers are compared
    exactly, as decimals: ``1,200``, ``1200`` and ``1200.0`` are the same, ``0.30000000000000004`` is not ``0.3``.

    Args:
        column: the column of the prompts that holds the right answers, numbers or texts of numbers.
        pattern: a regular expression with one group around the answer, e.g. ``Answer: (.*)``; its last match counts.

    Raises:
        UserError: a pattern that cannot be compiled or has not exactly one group; an answer that is no number.
    """

    name = "verifier"

    def __init__(self, *, column: str = "answer", pattern: str | None = None) -> None:
        pattern = f"({_NUMBER})" if pattern is None else check_text("reward.pattern", pattern)
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(f"reward.pattern={pattern!r} is no regular expression: {error}") from error
        if self._pattern.groups != 1:
            raise UserError(f"reward.pattern={pattern!r} must have one group, around the answer")
        self._column = check_text("reward.column", column)
        self.columns = [column]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:  # noqa: ARG002
        right = [_number(str(answer)) for answer in columns[self._column]]
        if None in right:
            number = right.index(None)
            raise UserError(
                f"reward.column={self._column}: the answer {columns[self._column][number]!r} of sample {number} is no "
                "number"
            )
        return [float(self._answer(text) == answer) for text, answer in zip(completions, right, strict=True)]

    def _answer(self, text: str) -> Decimal | None:
        found = self._pattern.findall(text)
        return _number(found[-1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().rstrip(".").replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
