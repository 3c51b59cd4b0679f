"""A plain Python function, named in the config, as a reward."""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lit_rlhf.checks import check_text
from lit_rlhf.errors import UserError
from lit_rlhf.imports import find


class FunctionReward:
    """Calls ``module.function(prompts=..., completions=..., **columns)``; an async function is awaited.

    The working directory counts as a place to import from only where Python itself looks there; install the module or
    set ``PYTHONPATH``.

    Args:
        function: the dotted name, e.g. ``my_package.rewards.politeness``.

    Raises:
        UserError: a part of the name cannot be imported or found (it is named), or the result is not callable.
    """

    def __init__(self, *, function: str) -> None:
        self._function = find("reward.function", check_text("reward.function", function))
        if not callable(self._function) or inspect.isclass(self._function):
            kind = type(self._function).__name__
            raise UserError(f"reward.function={function} is a {kind}, not a function; use _target_ for it")
        self.name = function.rpartition(".")[2]
        with suppress(TypeError, ValueError):  # some functions written in C have none
            self.__signature__ = inspect.signature(self._function)  # says which arguments it asks for

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Any:
        return self._function(prompts=prompts, completions=completions, **columns)
