"""What a config takes from the environment, say a token, is written nowhere: it stays ``${oc.env:NAME}``."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from lit_rlhf.errors import printable

_SHORTEST = 4  # characters of a value that is worth hiding: "1" stands in every message
_names: set[str] = set()  # of the variables that configs of this process refer to


@contextmanager
def references_kept() -> Iterator[None]:
    """Within it, configs resolve ``${oc.env:NAME}`` to itself, also where it is part of something else.

    So does what another resolver would make of it, as ``${oc.decode:${oc.env:NAME}}``: of a reference that is something
    else than of the value, and one with a cache would bring the value to light.
    """
    resolvers = BaseContainer._resolvers
    before = dict(resolvers)
    resolvers.update({name: _keeping(name, resolver) for name, resolver in before.items()})
    OmegaConf.register_new_resolver("oc.env", _reference, replace=True)
    try:
        yield
    finally:
        resolvers.clear()
        resolvers.update(before)


def _reference(name: str, *default: Any) -> str:
    _names.add(name)
    # The default, too, stands in the config as it was written
    return "${oc.env:" + ",".join([name, *("null" if value is None else str(value) for value in default)]) + "}"


def _keeping(name: str, resolver: Callable[..., Any]) -> Callable[..., Any]:
    """A resolver that gives itself back where one of its arguments is, or holds, a reference."""

    def keep(config: Any, parent: Any, node: Any, args: tuple[Any, ...], written: tuple[str, ...]) -> Any:
        held = ["${" in str(arg) for arg in args]
        if not any(held):
            return resolver(config, parent, node, args, written)
        given = [_quoted(a) if has and isinstance(a, str) else w for a, has, w in zip(args, held, written, strict=True)]
        return "${" + name + ":" + ",".join(given) + "}"

    return keep


def _quoted(text: str) -> str:
    """A text with references in it, as an argument: not the key that it may have come from, which is elsewhere."""
    return text if re.fullmatch(r"[\w-]*\$\{oc\.env:\w+\}[\w-]*", text) else "'" + text.replace("'", r"\'") + "'"


def redact(text: str) -> str:
    """The text with the values of those variables replaced by references to them, for messages and logs."""
    values = {os.environ.get(name, ""): name for name in sorted(_names)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"${{oc.env:{values[value]}}}")
    return text


def redact_error(error: BaseException) -> None:
    """Redacts the message of an exception and of those that led to it, in place, and makes it fit for a terminal."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(printable(redact(item)) if isinstance(item, str) else item for item in error.args)
        error = error.__cause__ or error.__context__
