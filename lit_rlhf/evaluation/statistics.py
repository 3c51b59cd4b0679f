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


class TextMetric(Metric):
    """Keeps all texts, as bytes, so that processes can put theirs together."""

    full_state_update = False
    bytes_: list[Tensor]
    sizes: list[Tensor]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("bytes_", default=[], dist_reduce_fx="cat")
        self.add_state("sizes", default=[], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", errors="replace") for text in texts]
        joined = bytearray(b"".join(encoded))
        self.bytes_.append(torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.zeros(0, dtype=torch.uint8))
        self.sizes.append(torch.tensor([len(text) for text in encoded], dtype=torch.long))

    @property
    def texts(self) -> list[str]:
        """All texts so far, those of other processes too once they are synchronised."""
        if len(self.sizes) == 0:
            return []
        joined = dim_zero_cat(self.bytes_).cpu().numpy().tobytes()
        texts, start = [], 0
        for size in dim_zero_cat(self.sizes).tolist():
            texts.append(joined[start : start + size].decode("utf-8"))
            start += size
        return texts
