"""Between Hydra and the library: where configs lie, how objects are made from them, what is written to config.yaml.

Below this module nobody sees a DictConfig.
"""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_rlhf.config_types import check_types, default_of
from lit_rlhf.errors import UserError, printable
from lit_rlhf.imports import find
from lit_rlhf.overrides import CHOSEN, as_written, drop_keys_of_others, part_of, replace_parts
from lit_rlhf.preemption import Preempted
from lit_rlhf.redact import redact_error, references_kept
from lit_rlhf.run_folder import CONFIG
from lit_rlhf.sweep import Stopped, Sweep

#: Config keys that hold a reward.
REWARDS = ("reward", "gold", "judge")
_PACKAGE = Path(__file__).parent
#: An installed wheel carries conf/ inside the package; a checkout has it beside the package.
CONFIG_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """``@hydra.main`` with the project's configs, and with one readable message for a mistake of the user.

    With HYDRA_FULL_ERROR=1 the whole traceback is shown instead.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(task)
        def guarded(config: DictConfig) -> Any:
            if Sweep.stopped_worker():
                return Stopped
            try:
                with suppress(OmegaConfBaseException):
                    resolved(config)  # notes what no message may show
                hydra = HydraConfig.get()
                overrides = as_written(hydra.overrides.task)
                where = [o for o in as_written(hydra.overrides.hydra) if o.startswith("hydra.searchpath=")]
                preset = [override for override in overrides if override.startswith("experiment=")]
                given = [override for override in overrides if override not in preset]
                again = functools.partial(compose, hydra.job.config_name)
                drop_keys_of_others(config, again, hydra.runtime.choices, where, preset, given)
                return task(config)
            except Preempted:
                if Sweep.stopped_worker():
                    return Stopped
                raise
            except (UserError, OmegaConfBaseException) as error:
                redact_error(error)
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                # Hydra prints the message of this type alone.
                raise CompactHydraException(f"\n{printable(str(error))}") from None
            except Exception as error:  # of which Hydra prints the traceback
                redact_error(error)
                raise

        run = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(guarded)

        @functools.wraps(task)
        def main() -> None:
            try:
                if config_name == "train":
                    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in _NO_MEMBER]
                refuse_no_member(sys.argv[1:])
            except UserError as error:
                sys.exit(f"\n{error}")
            sys.argv[1:] = replace_parts(sys.argv[1:])
            try:
                run()
            except BaseException:
                Sweep.cut_short()
                raise

        return main

    return decorate


#: What train.yaml itself says, and Hydra refuses on a command line.
_NO_MEMBER = ("experiment=null", "hparams_search=null", "debug=null")


def refuse_no_member(overrides: list[str]) -> None:
    """Raises UserError for ``reward=null`` and ``kl=0.1``, for which Hydra has only tracebacks, and for ``~kl``.

    Without a part, a run would take what the code has by default, and no config would show it.
    """
    for override in overrides:
        key, given, value = override.lstrip("+~").partition("=")
        folder = CONFIG_DIR / key.partition("@")[0]
        part = part_of(override)
        if not key or not os.path.isdir(folder):  # Path's own raises for a name that is too long
            continue
        members = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if given and re.fullmatch(r"null|[-+.\d]*", value.strip()):
            raise UserError(f"{override}: the group {key} has no such member, but {members}")
        own = any(part_of(other) == part for other in overrides if not other.startswith("~"))
        if override.startswith("~") and part in CHOSEN and not own:
            raise UserError(f"{override}: a run needs its {part}; choose one of {members}")


def instantiate(node: Any, key: str, **objects: Any) -> Any:
    """Makes the object that a config node describes; ``objects`` are passed on as they are.

    In a reward, a ``_target_`` that is a plain or async function is not called but returned, its other keys bound, so
    that ``reward._target_=my_package.my_reward`` works for functions and classes alike.

    Raises:
        UserError: whatever is wrong with the node, with its full key.
    """
    if node is None or (isinstance(node, DictConfig) and not node):
        return None
    if missing := OmegaConf.missing_keys(node):
        name = f"{key}.{min(missing).removeprefix(f'{key}.')}"
        raise UserError(f"{name} has no value; give it one: {name}=...")
    if taken := sorted(set(objects) & set(node)):
        raise UserError(f"nobody reads the config key {key}.{taken[0]}: it comes from elsewhere in the config")
    plain = _plain(node)
    _require_targets(plain, key)
    try:
        if key.split(".")[0] in REWARDS:
            node = _without_calls(plain, key)
        made = hydra.utils.instantiate(node, _convert_="all", **objects)
        if isinstance(made, functools.partial):
            _check_keywords(made, key)  # else a wrong key would be found out only when the call is completed
        check_types(plain, key)  # only now, for a constructor says more of what is wrong
        return made
    except InstantiationException as error:
        cause = error.__cause__
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            cause.args = (_with_full_key(str(cause), key, node, str(error)),)
            raise cause from None
        if isinstance(cause, Exception) and os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        check_types(plain, key)
        raise UserError(f"config key '{key}': {_first_words(cause or error)}") from error


def _require_targets(plain: Any, key: str) -> None:
    """Raises UserError if what a node, or one inside it, is to be made from is not there."""
    if isinstance(plain, list):
        for number, item in enumerate(plain):
            _require_targets(item, f"{key}[{number}]")
    elif isinstance(plain, dict):
        for name, value in plain.items():
            if name == "_target_" and isinstance(value, str):
                find(f"{key}.{name}", value)
            _require_targets(value, f"{key}.{name}")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig | ListConfig) else node


def _with_full_key(message: str, key: str, node: Any, report: str) -> str:
    """What a constructor says, with the place of its config node: it knows its own parameters alone.

    A reward calls them ``reward.<name>``, wherever it stands.

    >>> _with_full_key("reward.n must be 1", "gold", {}, "full_key: rewards.distinct")
    'gold.rewards.distinct.n must be 1'
    >>> _with_full_key("prompts=[]: none", "data", {"prompts": []}, "")
    'data.prompts=[]: none'
    """
    found = re.search(r"^full_key: (.+)$", report, flags=re.MULTILINE)
    inside = found[1] if found else ""
    if key not in ("reward", "gold"):  # whose nodes are copies; others are parts of the whole config
        inside = re.sub(rf"^{re.escape(key)}(\.|$)", "", inside)
    place = f"{key}.{inside}" if inside else key
    if key in REWARDS:
        message = re.sub(r"\breward\.(?=\w)", lambda _: f"{place}.", message)
    parameter = re.match(r"(\w+)(?:=| must\b)", message)
    if parameter and parameter[1] in ((OmegaConf.select(node, inside) if inside else node) or {}):
        return f"{place}.{message}"
    named = re.search(rf"\b{re.escape(key)}\.\w|\b[a-z_]+\.[a-z_]+(=| must)|config key", message)
    return message if named else f"config key '{key}': {message}"


def _without_calls(plain: Any, key: str) -> Any:
    """A reward's node with every function in it, a member of a composite too, to be returned instead of called.

    Raises:
        UserError: a key that a function has no argument for. It may take every column there is, and would take the key
            for one.
    """
    if isinstance(plain, list):
        return [_without_calls(item, f"{key}[{number}]") for number, item in enumerate(plain)]
    if not isinstance(plain, dict):
        return plain
    plain = {name: _without_calls(value, f"{key}.{name}") for name, value in plain.items()}
    function = _function(plain)
    if function is None:
        return plain
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C have none
        parameters = []
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    if unknown := [name for name in plain if name not in ("_target_", *named)]:
        raise UserError(f"{key}.{unknown[0]}: {plain['_target_']} has no argument of this name")
    return {**plain, "_partial_": True}


def _function(node: dict[str, Any]) -> Callable | None:
    """The function, or other object that can be called as a reward is, that a node names; None for what makes one."""
    target = node.get("_target_")
    if target is None or "_partial_" in node:
        return None
    found = hydra.utils.get_object(target)
    if not callable(found) or inspect.isclass(found) or inspect.ismethod(found):
        return None
    if "." in getattr(found, "__qualname__", ""):  # a static method: is it called as a reward is, or does it make one?
        return found if {"prompts", "completions"} <= set(inspect.signature(found).parameters) else None
    return found


def _check_keywords(call: functools.partial, key: str) -> None:
    """Raises UserError for a keyword that the function does not take."""
    try:
        signature = inspect.signature(call.func)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind_partial(*call.args, **call.keywords)
    except TypeError as error:
        raise UserError(f"config key '{key}': {call.func.__qualname__}() {_first_words(error)}") from error


def _first_words(error: BaseException) -> str:
    text = str(error).strip()
    # Python's message for a key that a constructor does not take
    return text.replace("got an unexpected keyword argument", "does not read the key")


def instantiate_all(node: DictConfig | None, key: str) -> list[Any]:
    """The objects of a group whose members are themselves named nodes, such as loggers and callbacks."""
    if not node:
        return []
    made = [instantiate(member, f"{key}.{name}") for name, member in node.items() if member is not None]
    return [item for item in made if item is not None]


def refuse_unknown(config: DictConfig, known: Mapping[str, Any] | set[str] | list[str], under: str = "") -> None:
    """Raises UserError for a key of ``config[under]`` that nobody reads: no name in ``known``, no interpolation's aim.

    ``under`` is a key of the config, such as ``paths``; by default the top level is checked.
    """
    node = config[under] if under else config
    raw = OmegaConf.to_yaml(config)
    keys = [f"{under}.{name}" if under else str(name) for name in node if name not in known]
    unknown = sorted(key for key in keys if not re.search(rf"\$\{{{re.escape(key)}[.\[}}]", raw))
    if unknown:
        keys_read = f"; the keys of {under or 'this run'} are {', '.join(sorted(map(str, known)))}" if known else ""
        raise UserError(f"nobody reads the config key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}{keys_read}")


def resolved(config: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved but those of the environment, which may be secret."""
    with references_kept():
        return OmegaConf.to_container(config, resolve=True)


def read_config(run: Path, *, needs: Iterable[str] = ("algorithm",)) -> DictConfig:
    """What a run folder's config.yaml says, interpolations as they are.

    Raises:
        UserError: there is none, it cannot be read, or one of the keys that it ``needs`` is missing.
    """
    path = run / CONFIG
    try:
        stored = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"run={run} is no run folder: it has no {CONFIG}") from None
    except Exception as error:  # of YAML, OmegaConf or the system
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if missing := set(needs) - (set(stored) if isinstance(stored, DictConfig) else set()):
        raise UserError(f"{path} is not the config of a run: it has no '{min(missing)}'")
    return stored


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: tuple[str, ...]) -> list[str]:
    """``key: old -> new`` for every leaf in which two plain configs differ, but for keys that start with ``ignore``.

    What ``old`` does not mention was, when it was written, as it is by default: the key may have come since.
    """
    flat_old, flat_new = flatten(old), flatten(new)
    keys = [k for k in {**flat_old, **flat_new} if not any(k == i or k.startswith(f"{i}.") for i in ignore)]
    missing = "(absent)"
    return [
        f"{key}: {flat_old.get(key, missing)} -> {flat_new.get(key, missing)}"
        for key in keys
        if flat_old.get(key, missing) != flat_new.get(key, missing)
        and not (key not in flat_old and _is_default(new, key))
    ]


def _is_default(plain: Mapping[str, Any], key: str) -> bool:
    *path, name = key.split(".")
    for part in path:
        plain = plain.get(part) if isinstance(plain, Mapping) else None
    if not isinstance(plain, Mapping) or name not in plain:  # a name with a dot in it
        return False
    default = default_of(plain["_target_"], name) if "_target_" in plain else None if not path else _NOTHING
    return plain[name] == (list(default) if isinstance(default, tuple) else default)


_NOTHING = object()


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> flatten({"kl": {"coef": 0.1}, "seed": 1})
    {'kl.coef': 0.1, 'seed': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain_command(usage: str) -> Callable[[Callable[[list[str]], Any]], Callable[[], None]]:
    """A command that takes plain arguments instead of overrides, with the same treatment of mistakes.

    ``--help`` prints ``usage``.
    """

    def decorate(task: Callable[[list[str]], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(f"usage: {usage}")
                return
            try:
                task(sys.argv[1:])
            except UserError as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                sys.exit(f"\n{printable(str(error))}")

        return main

    return decorate
