"""What a config takes from the environment, say a token, is written nowhere: it stays ``${oc.env:NAME}``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

_SHORTEST = 4  # characters of a value that is worth hiding: "1" stands in every message
_names: set[str] = set()  # of the variables that configs of this process refer to


@contextmanager
def references_kept() -> Iterator[None]:
    """Within it, configs resolve ``${oc.env:NAME}`` to itself, also where it is part of something else."""
    OmegaConf.register_new_resolver("oc.env", _reference, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _reference(name: str, *default: Any) -> str:
    _names.add(name)
    # The default, too, stands in the config as it was written
    return "${oc.env:" + ",".join([name, *("null" if value is None else str(value) for value in default)]) + "}"


def redact(text: str) -> str:
    """The text with the values of those variables replaced by references to them, for messages and logs."""
    values = {os.environ.get(name, ""): name for name in sorted(_names)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"${{oc.env:{values[value]}}}")
    return text


def redact_error(error: BaseException) -> None:
    """Redacts the message of an exception and of those that led to it, in place."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(redact(item) if isinstance(item, str) else item for item in error.args)
        error = error.__cause__ or error.__context__
