"""Intervals of means by resampling, and the state that metrics of texts keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    rows: Tensor,
    estimate: Callable[[Tensor], Tensor] = lambda sample: sample.mean(-1),
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """An estimate of rows (N, ...) with its percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    Rows are drawn with replacement, always the same ones for a seed. No interval is narrower than what one row can
    say: of a single row, and of rows that are all alike, both ends are the value.

    Args:
        estimate: of samples (R, N) of scalar rows, or of one sample (N, ...) at a time; (R,) or a scalar.
        level: share of the intervals that hold the true value, asymptotically.
    """
    if not len(rows):
        return Interval(float("nan"), float("nan"), float("nan"))
    rows = rows.double()
    drawn = torch.randint(len(rows), (resamples, len(rows)), generator=torch.Generator().manual_seed(seed))
    if rows.ndim == 1:
        found, value = estimate(rows[drawn]), estimate(rows[None])[0]
    else:
        found, value = torch.stack([estimate(rows[numbers]) for numbers in drawn]), estimate(rows)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=found.dtype)
    low, high = torch.quantile(found, ends).tolist()
    return Interval(float(value), low, high)


class TextMetric(Metric):
    """Keeps all texts, as bytes, so that processes can put theirs together."""

    full_state_update = False
    bytes_: list[Tensor]
    sizes: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
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
