"""What training changed: the same held-out prompts before and after, as paired differences."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlhf.student import t_quantile

Row = dict[str, Any]
Pair = tuple[Row, Row]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something every completion has: what it is called, its unit, and the keys that lead to it in a sample."""

    label: str
    unit: str
    keys: tuple[str, ...]
    judged: bool  # a reward or gold score, as opposed to the KL or the length

    def of(self, row: Row) -> float | None:
        value: Any = row
        for key in self.keys:
            value = (value or {}).get(key)
        return value

    def of_pairs(self, pairs: Iterable[Pair]) -> list[tuple[float, float]]:
        """Its values before and after, of the pairs that have both."""
        values = ((self.of(before), self.of(after)) for before, after in pairs)
        return [(b, a) for b, a in values if b is not None and a is not None]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A quantity before and after: means with standard errors, and the mean paired difference.

    `half` is half the width of the 95 % interval of that difference by Student's t; None for fewer than 5 pairs.
    """

    quantity: Quantity
    n: int
    before: float
    before_se: float
    after: float
    after_se: float
    change: float
    half: float | None


def pair_up(rows: Iterable[Row], first: int, last: int) -> list[Pair]:
    """The rows of two iterations, matched by prompt; a prompt that occurs twice is matched in order."""
    found: dict[int, dict[tuple[str, int], Row]] = {first: {}, last: {}}
    seen: Counter[tuple[int, str]] = Counter()
    for row in rows:
        iteration, prompt = row["iteration"], row["prompt"]
        if iteration in found:
            found[iteration][prompt, seen[iteration, prompt]] = row
            seen[iteration, prompt] += 1
    return [(before, found[last][key]) for key, before in found[first].items() if key in found[last]]


def quantities(pairs: Sequence[Pair]) -> list[Quantity]:
    """What these completions can be compared by; single components only where there are several."""

    def names(kind: str) -> list[str]:
        return list({name: None for pair in pairs for row in pair for name in row.get(kind) or {}})

    components = names("components")
    return [
        Quantity(label="Reward", unit="", keys=("score",), judged=True),
        *(
            Quantity(label=f"Reward: {name}", unit="", keys=("components", name), judged=True)
            for name in components
            if len(components) > 1
        ),
        *(Quantity(label=f"Gold: {name}", unit="", keys=("gold", name), judged=True) for name in names("gold")),
        Quantity(label="KL to the reference", unit="nats per completion", keys=("kl",), judged=False),
        Quantity(label="Response length", unit="tokens", keys=("length",), judged=False),
    ]


def effect(quantity: Quantity, pairs: Sequence[Pair]) -> Effect | None:
    """The effect on a quantity; None if no pair has it."""
    both = quantity.of_pairs(pairs)
    if not both:
        return None
    before, after = zip(*both, strict=True)
    differences = [a - b for b, a in both]
    return Effect(
        quantity=quantity,
        n=len(both),
        before=statistics.fmean(before),
        before_se=_standard_error(before),
        after=statistics.fmean(after),
        after_se=_standard_error(after),
        change=statistics.fmean(differences),
        half=t_quantile(len(both) - 1) * _standard_error(differences) if len(both) >= 5 else None,
    )


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
