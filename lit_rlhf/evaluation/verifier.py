"""Whether any of several tries is right."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rlhf.checks import check_int
from lit_rlhf.errors import UserError


class PassAtK(Metric):
    """The probability that one of k completions is right, from n of each prompt (Chen et al. 2021, arXiv:2107.03374).

    The unbiased estimate, 1 - C(n - c, k) / C(n, k) with c right ones, as a mean over prompts.

    Args:
        k: completions of which one is to be right.
        **settings: of ``torchmetrics.Metric``.

    Raises:
        UserError: ``k`` below 1; updated, fewer than k completions of a prompt.

    >>> metric = PassAtK(2)
    >>> metric.update(torch.tensor([[1, 0, 0], [0, 0, 0]]))  # of three tries of the first prompt one is right
    >>> round(float(metric.compute()), 3)
    0.333
    """

    full_state_update = False
    higher_is_better = True
    passed: Tensor
    count: Tensor

    def __init__(self, k: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.k = check_int("k", k, at_least=1)
        self.add_state("passed", default=torch.tensor(0.0, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """``correct`` (B, n): which of the n completions of each prompt are right."""
        passed = pass_at_k(correct, self.k)
        self.passed += passed.sum()
        self.count += len(passed)

    def compute(self) -> Tensor:
        """A probability, NaN without any prompt."""
        return self.passed / self.count if self.count else torch.tensor(float("nan"))


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """The same of every prompt by itself: ``correct`` (B, n) to (B,) in double precision.

    Raises:
        UserError: n is below k.
    """
    tries = correct.shape[1]
    if tries < k:
        raise UserError(f"pass@{k} needs at least {k} completions of each prompt, got {tries}")
    ways = math.comb(tries, k)
    return torch.tensor([1 - math.comb(tries - c, k) / ways for c in correct.bool().sum(1).tolist()]).double()
