"""Hydra's override grammar: values in it, and the keys of a pipeline's stages."""

import re
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict


def encode_key(key: str) -> str:
    """``kl.coef`` as one name, so that ``ppo.kl=adaptive ppo.kl.target=3`` are two keys and not a tree with one branch.

    >>> encode_key("reward@gold.on"), decode_key(encode_key("reward@gold.on"))
    ('reward-at-gold--on', 'reward@gold.on')
    """
    return key.replace("@", "-at-").replace(".", "--")


def decode_key(key: str) -> str:
    return key.replace("--", ".").replace("-at-", "@")


def quote(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A bare word, unless Hydra would read another type from it
        if re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
            return value
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return "[" + ",".join(quote(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quote(item)}" for key, item in value.items()) + "}"
    return str(value)


#: The parts of a config that a user's own class may take the place of, and the groups that choose them.
_OWN = {
    **{name: name for name in ("data", "policy", "reward", "kl", "clip", "entropy", "sampler")},
    "gold": "reward@gold",
}


def replaced_parts(overrides: list[str]) -> list[str]:
    """The parts of a config that overrides give to a class of the user's own, by its name alone.

    >>> replaced_parts(["data._target_=my_pkg.MyPrompts", "reward=length", "reward._target_=my_pkg.MyLength"])
    ['data']
    """
    chosen = {override.partition("=")[0] for override in overrides}
    return [part for part, group in _OWN.items() if f"{part}._target_" in chosen and group not in chosen]


def replace_parts(overrides: list[str]) -> list[str]:
    """Lets ``data._target_=my_pkg.MyPrompts`` take the place of a whole part, with only the keys that are given.

    Otherwise the keys of the group's member would stay and go to a class that does not read them. Where the member is
    named, too, as in ``data=list data._target_=...``, they do stay.

    >>> replace_parts(["data._target_=my_pkg.MyPrompts", "data.opening=A film", "kl.coef=0.1"])
    ['+data._target_=my_pkg.MyPrompts', '+data.opening=A film', 'kl.coef=0.1', '~data']
    """
    own = replaced_parts(overrides)
    return [
        *(f"+{override}" if override.partition(".")[0] in own else override for override in overrides),
        *(f"~{_OWN[part]}" for part in own),
    ]


def without_parts(overrides: list[str], parts: list[str]) -> list[str]:
    """Overrides without those that choose or set one of these parts.

    >>> without_parts(["experiment=tiny", "reward=model", "reward.path=x", "reward@gold=vader"], ["reward"])
    ['experiment=tiny', 'reward@gold=vader']
    """
    keys = [(override, override.partition("=")[0].lstrip("+~")) for override in overrides]
    taken = {*parts, *(_OWN[part] for part in parts)}
    return [override for override, key in keys if key not in taken and key.partition(".")[0] not in parts]


def drop_keys_not_given(config: DictConfig, overrides: list[str]) -> None:
    """Takes from the parts that `replace_parts` replaced, in a composed config, what the overrides do not give them.

    It comes from an experiment, which sets keys of the member that was to be there.
    """
    keys = {override.partition("=")[0] for override in overrides}
    for part, group in _OWN.items():
        if {f"~{group}", f"+{part}._target_"} <= keys:
            given = {key.lstrip("+") for key in keys if key.lstrip("+").startswith(f"{part}.")}
            with open_dict(config):
                config[part] = _only(OmegaConf.to_container(config[part]), given, part)


def _only(node: dict[str, Any], given: set[str], prefix: str) -> dict[str, Any]:
    kept = {}
    for name, value in node.items():
        key = f"{prefix}.{name}"
        if key in given:
            kept[name] = value
        elif isinstance(value, dict) and any(other.startswith(f"{key}.") for other in given):
            kept[name] = _only(value, given, key)
    return kept


def split_override(override: str) -> tuple[str, str]:
    """The key and the value of an override, as text.

    >>> split_override("kl.coef=0.1"), split_override("++ppo.kl--coef=0.1"), split_override("~reward")
    (('kl.coef', '0.1'), ('ppo.kl.coef', '0.1'), ('reward', ''))
    """
    key, _, value = override.partition("=")
    return decode_key(key.lstrip("+~")), value
