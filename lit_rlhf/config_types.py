"""The values of a config node against the annotations of what it makes: the constructor is the schema.

Libraries take some wrong values without a word, or stumble over them long after the start.
"""

import inspect
import math
import typing
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import hydra

from lit_rlhf.errors import UserError

#: Whose annotations are meant as a schema. A user's own may be looser than what their class takes.
_TYPED = ("lit_rlhf", "lightning", "torch", "transformers")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


#: Least values where a library takes a smaller one and does something else: a negative norm turns the gradient round.
_AT_LEAST = {
    "trainer.gradient_clip_val": 0,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.accumulate_grad_batches": 1,
    "scheduler.num_warmup_steps": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.momentum": 0,
}


def check_types(node: Any, key: str) -> None:
    """Compares the values of a resolved config node, and of the nodes in it, with what their ``_target_`` takes.

    Raises:
        UserError: a value is NaN, too small, or of no type that its parameter has; names its full key.
    """
    if not isinstance(node, Mapping):
        return
    hints = _hints(node.get("_target_"))
    for name, value in node.items():
        full = f"{key}.{name}"
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{full} must be a number, got {value}")
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{full} must be {describe(hints[name])}, got {value!r}")
        if value is not None and full in _AT_LEAST and not (fits(value, float) and value >= _AT_LEAST[full]):
            raise UserError(f"{full} must be at least {_AT_LEAST[full]}, got {value!r}")
        check_types(value, full)


def _hints(target: Any) -> dict[str, Any]:
    if not isinstance(target, str) or target.partition(".")[0] not in _TYPED:
        return {}
    try:
        found = hydra.utils.get_object(target)
        return _hints_of_class(found) if isinstance(found, type) else typing.get_type_hints(found)
    except Exception:  # of a target that is not there, which `instantiate` reports, or names that cannot be resolved
        return {}


def _hints_of_class(found: type) -> dict[str, Any]:
    """The constructor's; where it passes keywords on, those of the class that it passes them to, too."""
    hints = typing.get_type_hints(found.__init__)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(found.__init__).parameters.values())
    return {**_hints_of_class(found.__base__), **hints} if passes_on and found.__base__ is not object else hints


def default_of(target: Any, name: str) -> Any:
    """What a parameter of ``_target_`` is if nobody gives it; ``inspect.Parameter.empty`` if it has no such default."""
    try:
        made = hydra.utils.get_object(target)
        parameters = [inspect.signature(made).parameters]
        for base in made.__mro__[1:-1] if isinstance(made, type) else ():
            if any(p.kind is p.VAR_KEYWORD for p in parameters[-1].values()):
                parameters.append(inspect.signature(base.__init__).parameters)
    except Exception:  # of a target that is not there, or has no signature
        return inspect.Parameter.empty
    return next((found[name].default for found in parameters if name in found), inspect.Parameter.empty)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be meant for a parameter; where the type says nothing of plain values, it can.

    >>> fits(1, float), fits(True, int), fits("word", int | None), fits("a", list[str]), fits(["a"], tuple[str, ...])
    (True, False, False, False, True)
    """
    origin = get_origin(hint) or hint
    if isinstance(value, str) and value.startswith("${"):
        return True  # what it refers to is checked where it is used
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin in (int, float):
        kinds = (int, float) if origin is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    if origin in (bool, str, NoneType):
        return isinstance(value, origin)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, Mapping) if _is_object(hint) else True


def _is_object(hint: Any) -> bool:
    """Whether a type is that of objects which only a config node can describe."""
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and origin.__module__ not in ("builtins", "collections.abc") and origin != NoneType


def describe(hint: Any) -> str:
    """What fits, in words.

    >>> describe(int | None), describe(Literal["a", "b"]), describe(list[int])
    ('a whole number or null', 'a or b', 'a list')
    """
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        plain = [one for one in get_args(hint) if not _is_object(one)] or get_args(hint)
        words = [word for one in plain for word in describe(one).split(" or ")]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return " or ".join(dict.fromkeys(str(one) for one in get_args(hint)))
    if origin in (list, tuple, Sequence):
        return "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return _WORDS.get(origin) or getattr(origin, "__name__", str(hint))
