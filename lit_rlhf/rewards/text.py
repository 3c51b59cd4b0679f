"""Which text a reward looks at."""

from collections.abc import Sequence
from typing import Any, Literal

from lit_rlhf.errors import UserError

Scope = Literal["text", "completion"]


def texts_to_score(prompts: Sequence[Any], completions: Sequence[str], on: Scope) -> list[str]:
    """The prompt with its completion (``on="text"``), or the completion alone.

    A chat is not part of the text even with ``on="text"``: its roles have no agreed form outside the policy's template.

    >>> texts_to_score(["A fine", [{"role": "user", "content": "Hi"}]], [" film.", "Hello."], "text")
    ['A fine film.', 'Hello.']
    """
    if on == "completion":
        return list(completions)
    return [p + c if isinstance(p, str) else c for p, c in zip(prompts, completions, strict=True)]


def check_scope(on: str, key: str = "reward.on") -> Scope:
    """``on``, the value of the config key ``key``, if it is a scope.

    Raises:
        UserError: it is not.
    """
    if on not in ("text", "completion"):
        raise UserError(f"{key}={on!r}: choose 'text' (the prompt with its completion) or 'completion'")
    return on
