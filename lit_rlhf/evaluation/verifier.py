"""Whether any of several tries is right."""

import math

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

    Raises:
        UserError: ``k`` below 1; updated, fewer than k completions of a prompt.
    """

    full_state_update = False
    higher_is_better = True
    passed: Tensor
    count: Tensor

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = check_int("k", k, at_least=1)
        self.add_state("passed", default=torch.tensor(0.0, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """``correct`` (B, n): which of the n completions of each prompt are right."""
        tries = correct.shape[1]
        if tries < self.k:
            raise UserError(f"pass@{self.k} needs at least {self.k} completions of each prompt, got {tries}")
        ways = math.comb(tries, self.k)
        right = correct.bool().sum(1).tolist()
        self.passed += sum(1 - math.comb(tries - c, self.k) / ways for c in right)
        self.count += len(correct)

    def compute(self) -> Tensor:
        """A probability, NaN without any prompt."""
        return self.passed / self.count if self.count else torch.tensor(float("nan"))
