"""Intervals of means by resampling, and the state that metrics of texts keep."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RESAMPLES = 2000
_AT_ONCE = 2**22  # weights of rows in samples that are held in memory


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


Estimate = Callable[[Tensor, Tensor], Tensor]
"""Rows (N, ...) and their weights in R samples (R, N) to the samples' estimates (R,)."""


def weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """The mean of scalar rows (N,) in each sample."""
    return (weights @ rows) / weights.sum(1)


def bootstrap(
    rows: Tensor,
    estimate: Estimate = weighted_mean,
    *,
    groups: Tensor | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """An estimate of rows (N, ...) with its percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    Rows are drawn with replacement, always the same ones for a seed. Of rows that are all alike both ends are the
    value; of a single row, or group, which says nothing of how much others differ, they are not a number.

    Args:
        estimate: see ``Estimate``; a row that was drawn twice has the weight 2.
        groups: (N,) numbers; rows with the same one, say several completions of a prompt, are drawn together, because
            they are alike (the cluster bootstrap).
        resamples: 0 gives the estimate alone, its ends not a number.
        level: share of the intervals that hold the true value, asymptotically.

    >>> bootstrap(torch.tensor([1.0, 1.0, 1.0]))
    Interval(value=1.0, low=1.0, high=1.0)
    """
    if not len(rows):
        return Interval(float("nan"), float("nan"), float("nan"))
    rows = rows.double()
    value = float(estimate(rows, torch.ones(1, len(rows), dtype=rows.dtype)))
    if not resamples:
        return Interval(value, float("nan"), float("nan"))
    if groups is None:
        groups = torch.arange(len(rows))
    distinct, member = groups.unique(return_inverse=True)
    if len(distinct) == 1:
        return Interval(value, float("nan"), float("nan"))
    count, generator, found = len(distinct), torch.Generator().manual_seed(seed), []
    for start in range(0, resamples, step := max(1, _AT_ONCE // len(rows))):
        drawn = torch.randint(count, (min(step, resamples - start), count), generator=generator)
        times = torch.zeros(len(drawn), count, dtype=rows.dtype)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=rows.dtype))
        found.append(estimate(rows, times[:, member]))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=rows.dtype)
    low, high = torch.quantile(torch.cat(found), ends).tolist()
    return Interval(value, low, high)


class KeepingMetric(Metric):
    """Keeps rows, which processes put together; one that has seen none, as where there are few batches, adds none."""

    full_state_update = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._nothing: dict[str, Tensor] = {}

    def add_rows(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Adds a state ``name`` of rows of a shape."""
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._nothing[name] = torch.zeros(0, *shape, dtype=dtype)

    def keep(self, name: str, rows: Tensor) -> None:
        getattr(self, name).append(rows.to(self.device, self._nothing[name].dtype))

    def kept(self, name: str) -> Tensor:
        """All rows so far, on the CPU, those of other processes too once they are synchronised."""
        state = getattr(self, name)
        return dim_zero_cat(state).cpu() if len(state) else self._nothing[name]

    def sync(self, *arguments: Any, **settings: Any) -> None:
        """torchmetrics' own; where there is nothing yet, that puts floats together with the others' rows."""
        for name, nothing in self._nothing.items():
            if len(getattr(self, name)) == 0:
                self.keep(name, nothing)
        super().sync(*arguments, **settings)


class TextMetric(KeepingMetric):
    """Keeps all texts, as bytes, so that processes can put theirs together."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_rows("bytes_", torch.uint8)
        self.add_rows("sizes", torch.long)

    def update(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", errors="replace") for text in texts]
        joined = bytearray(b"".join(encoded))
        self.keep("bytes_", torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0))
        self.keep("sizes", torch.tensor([len(text) for text in encoded]))

    @property
    def texts(self) -> list[str]:
        """All texts so far, those of other processes too once they are synchronised."""
        joined = self.kept("bytes_").numpy().tobytes()
        texts, start = [], 0
        for size in self.kept("sizes").tolist():
            texts.append(joined[start : start + size].decode("utf-8"))
            start += size
        return texts
