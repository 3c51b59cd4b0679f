"""Hydra's override grammar: values in it, and the keys of a pipeline's stages."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict


def encode_key(key: str) -> str:
    """``kl.coef`` as one name, so that ``ppo.kl=adaptive ppo.kl.target=3`` are two keys and not a tree with one branch.

    >>> encode_key("reward@gold.on"), decode_key(encode_key("reward@gold.on"))
    ('reward-at-gold--on', 'reward@gold.on')
    """
    return key.replace("@", "-at-").replace(".", "--")


def decode_key(key: str) -> str:
    return key.replace("--", ".").replace("-at-", "@")


def as_written(overrides: Any) -> list[str]:
    """Overrides of Hydra's own config as they were typed; reading them there would resolve what is in them."""
    return OmegaConf.to_container(overrides, resolve=False)


def quote(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A bare word, unless Hydra would read another type from it
        plain = re.fullmatch(r"[A-Za-z_/][\w./-]*", value, flags=re.ASCII)
        if plain and value.lower() not in ("null", "true", "false", "nan", "inf"):
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
#: All parts whose members can be chosen, but those that are set for a run and not for a member, such as the trainer.
CHOSEN = {**_OWN, **{name: name for name in ("critic", "baseline", "optimizer", "scheduler", "algorithm")}}


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


def part_of(override: str) -> str:
    """The part of a config that an override chooses, or sets something in.

    >>> [part_of(o) for o in ("kl.coef=0.1", "~reward", "reward@gold=vader", "+reward@reward.rewards.short=length")]
    ['kl', 'reward', 'gold', 'reward']
    """
    return override.partition("=")[0].lstrip("+~").rpartition("@")[2].partition(".")[0]


def chosen_parts(overrides: list[str]) -> list[str]:
    """The parts whose member overrides choose.

    >>> chosen_parts(["experiment=tiny", "reward=vader", "reward@gold=none", "~data", "kl.coef=0.1"])
    ['data', 'reward', 'gold']
    """
    chosen = {override.partition("=")[0].lstrip("+~") for override in overrides}
    return [part for part, group in CHOSEN.items() if group in chosen]


def give_way(preset: list[str], given: list[str]) -> list[str]:
    """Preset overrides that `given` ones can follow: no choice is made twice, no key is missing in what they choose.

    >>> give_way(["experiment=mine", "data=csv", "data.path=x", "reward.path=y"], ["data=list", "reward.path=z"])
    ['experiment=mine', '++data.path=x', 'reward.path=y']
    """
    chosen = chosen_parts(given)
    groups = {CHOSEN[part] for part in chosen}
    stay = [override for override in preset if override.partition("=")[0].lstrip("+~") not in groups]
    changed = CHOSEN if "algorithm" in chosen else chosen  # another algorithm brings other members
    return [f"++{override.lstrip('+')}" if _sets_key_of(changed, override) else override for override in stay]


def _sets_key_of(parts: Iterable[str], override: str) -> bool:
    key = override.partition("=")[0].lstrip("+")
    return "@" not in key and any(key.startswith(f"{part}.") for part in parts)


def drop_keys_of_others(
    config: DictConfig,
    compose: Callable[..., DictConfig],
    choices: Mapping[str, Any],
    where: list[str],
    preset: list[str],
    given: list[str],
) -> None:
    """Takes from a composed config what is preset for another member than the one that was then chosen for a part.

    An experiment that sets ``kl.coef`` can so be run with ``kl=adaptive``, which has none. What the chosen member has,
    too, stays as the experiment set it. Of a reward nothing stays, because what is called the same in two rewards is
    not the same; nor of a part that `replace_parts` replaced, because its keys are not known.

    Args:
        config: changed in place.
        compose: Hydra's, of the same primary config.
        choices: group -> member, as composed.
        where: overrides that say where configs lie.
        preset: overrides such as ``experiment=tiny``.
        given: the user's own, which choose.
    """
    chosen = chosen_parts(given)
    if not preset or not chosen:
        return
    algorithm = [override for override in given if override.startswith("algorithm=")]
    try:
        before = compose([*where, *preset], return_hydra_config=True).hydra.runtime.choices
    except ConfigCompositionException:  # what is preset is meant for the groups that the given algorithm brings
        brought = [*where, *give_way(preset, algorithm), *algorithm]
        before = compose(brought, return_hydra_config=True).hydra.runtime.choices
    swapped = [part for part, group in CHOSEN.items() if choices.get(group) != before.get(group)]
    members = {CHOSEN[part] for part in {"algorithm", *swapped} - set(chosen)}
    alone = compose(
        [*where, *(f"{group}={choices[group]}" for group in sorted(members) if choices.get(group) is not None)]
        + [override for override in given if part_of(override) in swapped]
    )
    with open_dict(config):
        for part in swapped:
            set_by_preset = OmegaConf.to_container(config.pop(part)) if part in config else {}
            if part in alone:
                own = OmegaConf.to_container(alone[part])
                anew = part in ("reward", "gold") or None in (choices.get(CHOSEN[part]), before.get(CHOSEN[part]))
                config[part] = own if anew else _common(set_by_preset, own)


def _common(node: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """What stands in both, with the values of ``node``, but what is made from it is what ``known`` says."""
    both = {name: (node[name], known[name]) for name in node if name in known}
    nested = {name: all(isinstance(x, dict) and x for x in pair) for name, pair in both.items()}
    common = {name: _common(*pair) if nested[name] else pair[0] for name, pair in both.items()}
    return {**common, **{name: value for name, value in known.items() if name.startswith("_")}}


def split_override(override: str) -> tuple[str, str]:
    """The key and the value of an override, as text.

    >>> split_override("kl.coef=0.1"), split_override("++ppo.kl--coef=0.1"), split_override("~reward")
    (('kl.coef', '0.1'), ('ppo.kl.coef', '0.1'), ('reward', ''))
    """
    key, _, value = override.partition("=")
    return decode_key(key.lstrip("+~")), value
