"""What needs no completions: the perplexity of held-out texts, and the accuracy of rewards on held-out pairs."""

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_rlhf.config import instantiate
from lit_rlhf.data.completions import answer_text, read_columns
from lit_rlhf.data.text_files import opened
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.perplexity import Perplexity, text_nats, text_rows
from lit_rlhf.evaluation.preference import PairAccuracy
from lit_rlhf.models.policy import Policy
from lit_rlhf.rewards.scoring import freeze, score


def documents(node: Any) -> list[tuple[Any, str]]:
    """(prompt or None, text) of all held-out documents.

    Args:
        node: the config of a datamodule whose batches have ``text``, or ``prompt`` and ``completion``; or the name of
            a text file, or a glob pattern, whose documents are what blank lines part.

    Raises:
        UserError: there are none.
    """
    if not isinstance(node, str):
        return [row for batch in held_out_batches(node, "text") for row in text_rows(batch)]
    files = sorted(glob.glob(node, recursive=True))
    if not files:
        raise UserError(f"text={node}: there is no such file")
    found = []
    for file in files:
        with opened(Path(file), "text", "text") as stream:
            try:
                text = stream.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"text: {file} is not UTF-8: {error}") from None
        found += [(None, part.strip("\r\n")) for part in re.split(r"(?:\r?\n[ \t]*){2,}", text) if part.strip()]
    if not found:
        raise UserError(f"text={node} holds nothing but blank lines")
    return found


def measure_texts(policy: Policy, rows: list[tuple[Any, str]]) -> dict[str, Any]:
    """The perplexity of a policy on documents, as JSON."""
    metric = Perplexity(sync_on_compute=False)
    metric.update(*text_nats(policy, rows))
    return _plain(metric.compute())


def measure_pairs(judges: Mapping[str, Any], node: Any, device: torch.device) -> dict[str, Any]:
    """Accuracy and calibration on pairs, by the scores of rewards and their components, as JSON.

    Args:
        judges: "reward" and "gold" to the rewards that are there.
        node: the config of a datamodule whose batches have ``chosen`` and ``rejected``, and maybe ``prompt``.

    Raises:
        UserError: there are no pairs.
    """
    metrics: dict[str, PairAccuracy] = {}
    numbers: dict[tuple[str, str], int] = {}  # of texts after their prompts: they stand in several pairs
    for judge in judges.values():
        freeze(judge, device)
    for batch in held_out_batches(node, "pairs"):
        columns = read_columns(batch, ["chosen", "rejected"], "pairs", optional=[k for k in batch if k != "chosen"])
        sides = [[answer_text(text) for text in columns.pop(side)] for side in ("chosen", "rejected")]
        prompts = columns.pop("prompt", [""] * len(sides[0]))
        keys = [[(str(prompt), text) for prompt, text in zip(prompts, side, strict=True)] for side in sides]
        texts = torch.tensor([[numbers.setdefault(key, len(numbers)) for key in side] for side in keys]).T
        for prefix, judge in judges.items():
            chosen, rejected = (score(judge, prompts, side, columns) for side in sides)
            pairs = {f"{prefix}/{name}": (x, rejected.components[name]) for name, x in chosen.components.items()}
            if prefix == "reward":
                pairs = {"objective/scores": (chosen.total, rejected.total), **(pairs if len(pairs) > 1 else {})}
            for name, (one, other) in pairs.items():
                metric = metrics.setdefault(name, PairAccuracy(sync_on_compute=False))
                metric.update(*(x.sum(-1) if x.ndim == 2 else x for x in (one, other)), texts)
    counts = {name: sum(map(len, metric.margins)) for name, metric in metrics.items()}
    return {name: {**_plain(metric.compute()), "pairs": counts[name]} for name, metric in metrics.items()}


def held_out_batches(node: Any, key: str) -> Iterator[Any]:
    """The batches of a datamodule's ``val_dataloader``; where nothing is held out, those of its ``train_dataloader``.

    Args:
        node: its config, or the datamodule.
        key: of the config, for messages.

    Raises:
        UserError: it is no datamodule, or there are none.
    """
    try:
        data = node if isinstance(node, LightningDataModule) else instantiate(node, key)
        if not isinstance(data, LightningDataModule):
            raise UserError(f"config key '{key}' makes a {type(data).__name__}, not a LightningDataModule")
        data.prepare_data()
        data.setup("validate")
        found = False
        for loaders in (data.val_dataloader, data.train_dataloader):
            for loader in _flat(_loaders(loaders)):
                for batch in loader:
                    found = True
                    yield batch
            if found:
                return
    except UserError as error:  # which calls any datamodule's keys data
        raise UserError(re.sub(r"\bdata\.(?=\w)", f"{key}.", str(error))) from error
    raise UserError(f"{key}: there are no rows: both dataloaders are empty")


def _loaders(make: Any) -> Any:
    """A datamodule's loaders; none where it does not say which."""
    try:
        return make()
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":  # Lightning's own method, not overridden
            raise
        return []


def _flat(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _plain(found: Any) -> dict[str, Any]:
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in found._asdict().items()}
