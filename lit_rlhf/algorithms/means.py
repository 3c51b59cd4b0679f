"""Means of what optimiser steps measure, over the steps of a row and over all processes."""

import math

from torch import Tensor

from lit_rlhf.distributed import gather, rank, world_size


class RunningMean:
    """Token-weighted means (and maxima, for names that end in ``_max``) of step metrics; saved with the checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: dict[str, Tensor | float], weight: float) -> None:
        for name, value in metrics.items():
            number = float(value)
            if name.endswith("_max"):
                self.sums[name] = (max(number, self.sums.get(name, (-math.inf, 1.0))[0]), 1.0)
            else:
                total, count = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = (total + weight * number, count + weight)

    def compute(self) -> dict[str, float]:
        """The means so far over all processes, each of which must call this; afterwards counting starts anew."""
        sums, self.sums = self._merged(gather(self.sums)), {}
        return {name: total / count for name, (total, count) in sums.items() if count}

    def take(self, other: "RunningMean") -> None:
        """Adds another's sums, which starts anew."""
        self.sums, other.sums = self._merged([self.sums, other.sums]), {}

    def state(self) -> list[dict[str, tuple[float, float]]]:
        """The sums of every process, each of which must call this."""
        return gather(dict(self.sums))

    def load_state(self, state: list[dict[str, tuple[float, float]]]) -> None:
        """Takes this process's sums up again; of another number of processes, the first one takes all."""
        own = state if len(state) == world_size() else [self._merged(state)] + [{}] * (world_size() - 1)
        self.sums = {name: tuple(pair) for name, pair in own[rank()].items()}

    @staticmethod
    def _merged(parts: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
        merged: dict[str, tuple[float, float]] = {}
        for name, (total, count) in (item for part in parts for item in part.items()):
            if name.endswith("_max"):
                merged[name] = (max(total, merged.get(name, (-math.inf, 1.0))[0]), 1.0)
            else:
                so_far, weight = merged.get(name, (0.0, 0.0))
                merged[name] = (so_far + total, weight + count)
        return merged
