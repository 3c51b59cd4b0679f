"""What all detectors share: the iteration they look at, the baseline they compare with, the test that they share.

A policy in training changes in every respect, so "it has changed" is no alarm, however certain. Each detector has a
threshold, an effect that is too large, and its null hypothesis is that the effect is at most that. What it measures in
an iteration is how far the effect is beyond the threshold, in standard errors. A one-sided CUSUM (Page 1954,
doi:10.1093/biomet/41.1-2.100) adds these up over the iterations,

    S_t = max(0, S_{t-1} + min(z_t, 4) - 1/2),

and raises an alarm when S exceeds a limit, 8 by default. One iteration alone never does: it takes 3 at the least. Where
the effect lies exactly at the threshold, z is standard normal, and there is one false alarm in about 17,000 iterations;
below the threshold there are fewer, above it comes the sooner the farther.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST, _SLACK = 4.0, 0.5  # what one iteration adds at most, and what is taken off each


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """The training completions of an iteration.

    Attributes:
        number: of the iteration, from 1.
        rows: one dict a completion, as in ``samples.jsonl``: prompt, completion, score, components, gold, kl, length.
        metrics: what the algorithm measured about them, under its logged names.
        gold: (B,) the gold judge's totals; None without one.
        baseline: the first iterations that a detector compares later ones with.
    """

    number: int
    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]
    gold: Tensor | None
    baseline: int

    def column(self, name: str) -> Tensor:
        """(B,): one number of every row."""
        return torch.tensor([float(row[name]) for row in self.rows], dtype=torch.double)

    def component(self, judge: str, name: str) -> Tensor:
        """(B,): one component of ``components`` or ``gold``."""
        return torch.tensor([row[judge][name] for row in self.rows], dtype=torch.double)

    @cached_property
    def words(self) -> list[list[str]]:
        """The words and marks of every completion, in lower case."""
        return [split_words(row["completion"]) for row in self.rows]


class Reading(NamedTuple):
    """What a detector says about an iteration.

    Attributes:
        value: what is logged as ``hacking/<detector>``.
        excess: how far the effect is beyond the threshold, in standard errors; None while there is no baseline yet.
        suspects: (B,), the higher the more a completion shows of it: the highest are the alarm's evidence.
        note: more words for the alarm, such as the n-gram.
        extra: more to log, as ``hacking/<detector>/<name>``.
    """

    value: float
    excess: float | None
    suspects: Tensor
    note: str = ""
    extra: Mapping[str, float] = {}


class Detector:
    """One sign of reward hacking. One of your own is a subclass with ``measure``, and its state if it has any."""

    def measure(self, iteration: Iteration) -> Reading | None:
        """Called once an iteration, in order; None where the run has nothing to measure, such as no gold scores."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it up."""


class Baseline:
    """A quantity's completions in the first iterations, and how its mean jumps from one iteration to the next."""

    def __init__(self) -> None:
        self.iterations = 0
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.newest, self.jumps, self.jumped = 0.0, 0.0, 0  # mean; squares of its jumps, summed; their number

    def follow(self, values: Tensor, iterations: int) -> bool:
        """Takes up an iteration's values, (B,); says whether it is one of the first ``iterations``."""
        values = values.double()
        count, mean = len(values), float(values.mean())
        if self.iterations:
            self.jumps += (mean - self.newest) ** 2
            self.jumped += 1
        self.newest = mean
        if self.iterations >= iterations:
            return False
        self.iterations += 1
        both, apart = self.count + count, mean - self.mean
        self.squares += float((values - mean).square().sum()) + apart**2 * self.count * count / both
        self.mean += apart * count / both
        self.count = both
        return True

    @property
    def std(self) -> float:
        """Of single completions."""
        return math.sqrt(self.squares / max(1, self.count - 1))

    def error(self, values: Tensor) -> float:
        """The standard error of mean(values): by the spread of completions, or by the jumps.

        Those are larger where completions of an iteration have something in common, such as their prompt. Half the mean
        square of successive differences (von Neumann 1941, doi:10.1214/aoms/1177731677) is a variance without the trend
        that training is meant to have.
        """
        spread = float(values.double().var(correction=0)) / max(1, len(values) - 1)
        return math.sqrt(max(spread, self._between))

    @property
    def margin(self) -> float:
        """Two standard errors of the baseline's mean: that is wrong once and for all, and does not average out."""
        return 2 * math.sqrt(max(self.std**2 / max(1, self.count), self._between / max(1, self.iterations)))

    @property
    def _between(self) -> float:
        return self.jumps / 2 / max(1, self.jumped)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Cusum:
    """The sum S of the module's docstring.

    Args:
        limit: the S above which there is an alarm.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.sum = 0.0

    def add(self, excess: float) -> bool:
        """Takes up an iteration's z; says whether there is an alarm.

        >>> cusum = Cusum(limit=8)
        >>> [cusum.add(z) for z in (100, 100, 100)]
        [False, False, True]
        """
        if not math.isnan(excess):
            self.sum = max(0.0, self.sum + min(excess, _MOST) - _SLACK)
        return self.sum > self.limit


class Rise(Detector):
    """A mean over completions that rises: H0 is  mean <= factor * baseline + rise, with the baseline's ``margin``.

    A standard error below a tenth of what has to be passed counts as that: where no completion shows anything, the
    spread says nothing.
    """

    factor, rise = 1.0, 0.0

    def __init__(self) -> None:
        self.baseline = Baseline()

    def values(self, iteration: Iteration) -> Tensor | None:
        """(B,): the quantity of every completion."""
        raise NotImplementedError

    def measure(self, iteration: Iteration) -> Reading | None:
        values = self.values(iteration)
        if values is None:
            return None
        excess = None
        if not self.baseline.follow(values, iteration.baseline):
            bound = self.factor * self.baseline.mean + self.rise
            error = max(self.baseline.error(values), abs(bound - self.baseline.mean) / 10, 1e-9)
            excess = (float(values.mean()) - bound - self.factor * self.baseline.margin) / error
        return Reading(float(values.mean()), excess, values)

    def state_dict(self) -> dict[str, Any]:
        return self.baseline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 1e-12 else 0.0


def split_words(text: str) -> list[str]:
    """Words and single marks in lower case.

    >>> split_words("It's a GREAT film!!")
    ['it', "'", 's', 'a', 'great', 'film', '!', '!']
    """
    return re.findall(r"\w+|[^\w\s]", text.lower())
