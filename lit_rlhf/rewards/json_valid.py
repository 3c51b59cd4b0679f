"""A reward for completions that are valid JSON."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from lit_rlhf.checks import check_bool
from lit_rlhf.errors import UserError


class JsonReward:
    """1 for a completion that is one JSON value (RFC 8259) and, where keys are required, an object that has them.

    Surrounding blanks are allowed, anything else around the value is not; NaN and Infinity are no JSON.

    Args:
        required_keys: keys that the object must have; none accepts any JSON value.
        partial: an object earns the share of required keys that it has, instead of all or nothing.

    Raises:
        UserError: ``partial`` without required keys.
    """

    name = "json"

    def __init__(self, *, required_keys: Sequence[str] = (), partial: bool = False) -> None:
        listed = isinstance(required_keys, Sequence) and not isinstance(required_keys, str)
        if not listed or not all(isinstance(key, str) for key in required_keys):
            raise UserError(f"reward.required_keys must be a list of keys, got {required_keys!r}")
        if partial and not required_keys:
            raise UserError("reward.partial=true needs reward.required_keys: without them there is nothing to share")
        self._keys = frozenset(required_keys)
        self._partial = check_bool("reward.partial", partial)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:  # noqa: ARG002
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> float:
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        if not self._keys:
            return 1.0
        share = len(self._keys & set(value)) / len(self._keys) if isinstance(value, dict) else 0.0
        return share if self._partial else float(share == 1)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
