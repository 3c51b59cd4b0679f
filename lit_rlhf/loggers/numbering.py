"""Which iteration a row belongs to that does not say so itself."""

from collections.abc import Mapping
from typing import Any

STEP = "step"


def numbered(metrics: Mapping[str, Any], step: int | None, iteration: int | None) -> dict[str, Any]:
    """A row with its iteration.

    Rows of an algorithm name theirs. Those of Lightning and its callbacks (``LearningRateMonitor``, ``self.log``) come
    with the number of optimiser steps before them. Within the run of an algorithm they belong to ``iteration``, that of
    its newest row, and keep the steps in a column of their own. Without an algorithm, None, ``step`` is the iteration.

    >>> numbered({"lr-AdamW": 0.1}, 12, 3), numbered({"loss": 0.5}, 12, None)
    ({'iteration': 3, 'step': 12, 'lr-AdamW': 0.1}, {'iteration': 12, 'loss': 0.5})
    """
    if "iteration" in metrics or step is None or iteration is None:
        return {**({} if step is None else {"iteration": step}), **metrics}
    return {"iteration": iteration, STEP: step, **metrics}
