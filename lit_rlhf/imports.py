"""Objects by their dotted names, with messages that name the part which failed."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lit_rlhf.errors import UserError


def lazily(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that imports a name from its submodule, ``home[name]``, when it is first used."""

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return get


def find(key: str, dotted: str) -> Any:
    """What ``package.module.name`` names, or ``package.module.Class.name``.

    Args:
        key: the config key that holds the name, for messages.
        dotted: the name.

    Raises:
        UserError: it is no dotted name, or a part of it cannot be imported or found.

    >>> find("reward.function", "os.path.basename")("a/b")
    'b'
    """
    parts = dotted.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{key}={dotted!r} must be a dotted name such as my_package.my_reward")
    found, modules = _import(key, dotted)
    for end in range(modules, len(parts)):
        before, name = ".".join(parts[:end]), parts[end]
        if hasattr(found, name):
            found = getattr(found, name)
        elif end > modules:
            raise UserError(f"{key}={dotted}: '{before}' has no '{name}'")
        elif end < len(parts) - 1:
            raise _no_module(key, dotted, f"{before}.{name}")
        else:
            raise UserError(
                f"{key}={dotted}: the module '{before}' ({getattr(found, '__file__', 'built in')}) has no '{name}'"
            )
    return found


def _import(key: str, dotted: str) -> tuple[Any, int]:
    """Imports from the left as many parts as are modules; returns the last of them, and how many there are."""
    parts, found = dotted.split("."), None
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        try:
            found = importlib.import_module(name)
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != name:
                kind = type(error).__name__
                raise UserError(f"{key}={dotted}: importing '{name}' failed: {kind}: {error}") from error
            if end == 1:
                raise _no_module(key, dotted, name) from error
            return found, end - 1
    return found, len(parts)


#: Packages that configs of conf/ name and not every installation has, with the extra that brings them.
_EXTRAS = {"bitsandbytes": "bnb"}


def _no_module(key: str, dotted: str, name: str) -> UserError:
    if name in _EXTRAS:
        return UserError(f"{key}={dotted}: {name} is not installed: pip install 'lit-rlhf[{_EXTRAS[name]}]'")
    return UserError(f"{key}={dotted}: there is no module '{name}'. Is it installed, or its folder on PYTHONPATH?")
