"""Hydra's override grammar: values in it, and the keys of a pipeline's stages."""

import re
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString


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


def split_override(override: str) -> tuple[str, str]:
    """The key and the value of an override, as text.

    >>> split_override("kl.coef=0.1"), split_override("++ppo.kl--coef=0.1"), split_override("~reward")
    (('kl.coef', '0.1'), ('ppo.kl.coef', '0.1'), ('reward', ''))
    """
    key, _, value = override.partition("=")
    return decode_key(key.lstrip("+~")), value
