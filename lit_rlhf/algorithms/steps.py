"""Optimiser steps whose numbers are not finite: they are skipped and counted, and too many in a row end the run."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.checks import check_int

log = logging.getLogger(__name__)


class StepGuard:
    """Watches one optimiser step after the other.

    A step is bad if the norm of its gradient is not finite. That norm is the same in every process, so they agree
    without a word; any other number that is not finite is put into the gradient (``spoiled``) by the process that sees
    it. Of a bad step nothing is learned: neither weights, nor the optimiser's moments, nor means of metrics.

    Args:
        limit: bad steps in a row that end the run, at least 1.

    Raises:
        UserError: ``limit`` is smaller.
    """

    def __init__(self, limit: int) -> None:
        self.limit = check_int("algorithm.max_skipped_steps", limit, at_least=1)
        self.in_a_row: dict[str, int] = {}  # by kind of step
        self.skipped = 0  # since the newest row
        self.bad = False  # the newest step
        self.found: str | None = None  # what was not finite in the step under way
        self.verdict: str | None = None  # why the run must end

    def spoiled(self, loss: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """The loss, with a gradient that is NaN if one of the ``numbers`` that led to it is NaN or infinite."""
        for name, x in {**numbers, "loss": loss}.items():
            wrong = x.detach()[~torch.isfinite(x)]
            if len(wrong):
                self.found = self.found or f"the {name} is {float(wrong.flatten()[0])}"
                return loss * math.nan
        return loss

    def check(self, norm: float, step: int, kind: str = "optimiser step", *, counts: bool = True) -> bool:
        """Whether a step is good; counts it if not.

        Args:
            norm: of its gradient, or another number that is not finite if it is bad.
            step: its number, for the message.
            kind: of steps that are counted by themselves.
            counts: whether a bad one brings the run nearer to its end.
        """
        found, self.found = self.found or f"the gradient's norm is {norm}", None
        self.bad = not math.isfinite(norm)
        if not self.bad:
            self.in_a_row.pop(kind, None)
            return True
        self.skipped += 1
        count = self.in_a_row[kind] = self.in_a_row.get(kind, 0) + counts
        log.warning("%s %d is skipped: %s", kind, step, found)
        if count >= self.limit:
            self.verdict = (
                f"{count} {kind}s in a row were skipped, the last one step {step}, because numbers in them were not "
                f"finite (algorithm.max_skipped_steps={self.limit}): in the last one {found}. The weights are those "
                "before. A smaller learning rate (optimizer.lr) or trainer.precision=32-true may help"
            )
        return False

    def take_skipped(self) -> int:
        """The steps skipped since this was last called."""
        skipped, self.skipped = self.skipped, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        # A run that ended because of them goes on with as many tries as it had.
        return {"in_a_row": {} if self.verdict else dict(self.in_a_row), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.skipped = dict(state["in_a_row"]), state["skipped"]
