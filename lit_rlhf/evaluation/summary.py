"""Rows of completions to numbers: what a policy wrote, and how it compares with what others wrote.

A row is one of ``samples.jsonl``. Rows are ``samples`` passes over the same prompts in the same order, and every
process that measures holds all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rlhf.evaluation.completions import EmptyRate, RefusalRate
from lit_rlhf.evaluation.diversity import DistinctN, SelfBLEU
from lit_rlhf.evaluation.preference import WinRate
from lit_rlhf.evaluation.statistics import bootstrap
from lit_rlhf.evaluation.verifier import pass_at_k
from lit_rlhf.rewards.group import RewardGroup
from lit_rlhf.rewards.verifier import VerifierReward

Rows = Sequence[Mapping[str, Any]]
Number = float | dict[str, float]
"""A value, or one with the ends of its 95 % interval: ``{"value": ..., "low": ..., "high": ...}``."""

#: Every process holds all rows: none asks the others for theirs.
_HERE = {"sync_on_compute": False}
#: Of a validation's metrics those that are no mean of a completion's own number; they have no interval.
_PLAIN = ("objective/kl_per_token", "objective/entropy", "rollout/eos_rate", "rollout/truncated_rate")


def scores_of(rows: Rows) -> dict[str, list[float]]:
    """Whatever judges completions: ``objective/scores``, ``reward/<component>``, ``gold/<component>``."""
    columns = {"objective/scores": [row["score"] for row in rows]}
    for prefix, part in (("reward", "components"), ("gold", "gold")):
        columns |= {f"{prefix}/{name}": [row[part][name] for row in rows] for name in rows[0][part]}
    return columns


def verified(reward: Any, prefix: str) -> list[str]:
    """The components of a reward, under ``prefix``, by which a completion is right (1) or wrong (0)."""
    if isinstance(reward, RewardGroup):
        return [name for key, part in reward.rewards.items() for name in verified(part, f"{prefix}/{key}")]
    if not isinstance(reward, VerifierReward):
        return []
    return [prefix if "/" in prefix else f"{prefix}/{reward.name}"]


def summarize(
    rows: Rows, metrics: Mapping[str, float], *, samples: int, right: Sequence[str] = (), kl: bool = True
) -> dict[str, Number]:
    """What there is to say about a policy's completions.

    Args:
        metrics: of the validation that made them.
        right: the scores that say right or wrong, of which there is a pass@k.
        kl: whether there is something that their KL is measured to.
    """
    scores = scores_of(rows)
    found = {name: _interval(column, samples) for name, column in scores.items()}
    for name in right:
        correct = _by_prompt(scores[name], samples).T
        for k in sorted({1, *(2**n for n in range(1, samples.bit_length())), samples}):
            found[f"{name}/pass@{k}"] = bootstrap(pass_at_k(correct, k))._asdict()
    if kl:
        found["objective/kl"] = _interval([row["kl"] for row in rows], samples)
    found["rollout/response_length"] = _interval([float(row["length"]) for row in rows], samples)
    found |= {name: metrics[name] for name in _PLAIN if name in metrics and (kl or "kl" not in name)}
    texts = [row["completion"] for row in rows]
    found |= text_metrics(texts)
    for name, metric in (("text/empty_rate", EmptyRate()), ("text/refusal_rate", RefusalRate())):
        found[name] = _interval([float(metric.counts(text)) for text in texts], samples)
    return found


def text_metrics(texts: Sequence[str]) -> dict[str, float]:
    """How diverse texts are and how many say nothing, by their names in ``metrics.py``."""
    of_texts: dict[str, Metric] = {f"text/distinct_{n}": DistinctN(n, **_HERE) for n in (1, 2, 3)}
    of_texts["text/self_bleu"] = SelfBLEU(**_HERE)
    of_texts |= {"text/empty_rate": EmptyRate(**_HERE), "text/refusal_rate": RefusalRate(**_HERE)}
    return {name: float(_measured(metric, texts)) for name, metric in of_texts.items()}


def differences(rows: Rows, others: Rows, samples: int) -> dict[str, Number]:
    """How much more a policy's completions have of everything than another's of the same prompts, mean over prompts."""
    sides = [{**scores_of(side), "rollout/response_length": [float(row["length"]) for row in side]}
             for side in (rows, others)]  # fmt: skip
    both = {name: (column, sides[1][name]) for name, column in sides[0].items()}
    return {name: _interval([a - b for a, b in zip(*pair, strict=True)], samples) for name, pair in both.items()}


def win_rates(rows: Rows, others: Rows, samples: int, *, intervals: bool = True) -> dict[str, Any]:
    """Shares of prompts on which completions are preferred to others of the same prompts, with intervals over prompts.

    By the score, ``score``, and by every gold score, ``gold/<component>``. Without ``intervals`` their ends are not a
    number.
    """
    one, other = scores_of(rows), scores_of(others)
    judges = {"score": (one["objective/scores"], other["objective/scores"])}
    judges |= {name: (one[name], other[name]) for name in one if name.startswith("gold/")}
    return _rates(judges, rows, others, samples, intervals=intervals)


def judged_rate(rows: Rows, others: Rows, samples: int, judged: Sequence[float]) -> dict[str, Any]:
    """The same by a judge of pairs, ``judge``; ``judged`` is for every row whether it is preferred, from 0 to 1."""
    return _rates({"judge": (list(judged), [1 - value for value in judged])}, rows, others, samples)


def _rates(
    judges: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    rows: Rows,
    others: Rows,
    samples: int,
    *,
    intervals: bool = True,
) -> dict[str, Any]:
    lengths = [torch.tensor([row["length"] for row in side]) for side in (rows, others)]
    prompts = torch.arange(len(rows)) % (len(rows) // samples)
    found = {}
    for name, pair in judges.items():
        rates = _measured(WinRate(intervals=intervals, **_HERE), *map(torch.tensor, pair), *lengths, prompts)
        found[name] = {kind: interval._asdict() for kind, interval in rates._asdict().items()}
    return found


def _measured(metric: Metric, *inputs: Any) -> Any:
    metric.update(*inputs)
    return metric.compute()


def _by_prompt(column: Sequence[float], samples: int) -> Tensor:
    """(samples, prompts)"""
    return torch.tensor(column).reshape(samples, -1)


def _interval(column: Sequence[float], samples: int) -> dict[str, float]:
    """The mean with its interval over prompts."""
    return bootstrap(_by_prompt(column, samples).mean(0))._asdict()
