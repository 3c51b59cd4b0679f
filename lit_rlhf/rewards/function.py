"""A plain Python function, named in the config, as a reward."""

import importlib
import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lit_rlhf.checks import check_text
from lit_rlhf.errors import UserError


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
        self._function = _load(check_text("reward.function", function))
        self.name = function.rpartition(".")[2]
        with suppress(TypeError, ValueError):  # some functions written in C have none
            self.__signature__ = inspect.signature(self._function)  # says which arguments it asks for

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> Any:
        return self._function(prompts=prompts, completions=completions, **columns)


def _load(dotted: str) -> Any:
    module, _, attribute = dotted.rpartition(".")
    if not module or not attribute:
        raise UserError(f"reward.function={dotted!r} must be a dotted name such as my_package.my_reward")
    found = _import(module, dotted)
    try:
        function = getattr(found, attribute)
    except AttributeError as error:
        raise UserError(
            f"reward.function={dotted}: the module '{module}' ({getattr(found, '__file__', 'built in')}) has no "
            f"'{attribute}'"
        ) from error
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"reward.function={dotted} is a {type(function).__name__}, not a function; use _target_ for it")
    return function


def _import(module: str, dotted: str) -> Any:
    """Imports ``a.b.c`` from the left, so that the message can name the part that failed."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise UserError(f"reward.function={dotted}: importing '{name}' failed: {error}") from error
            raise UserError(
                f"reward.function={dotted}: there is no module '{name}'. Is it installed, or its folder on PYTHONPATH?"
            ) from error
        except Exception as error:
            raise UserError(
                f"reward.function={dotted}: importing '{name}' failed: {type(error).__name__}: {error}"
            ) from error
    return found
