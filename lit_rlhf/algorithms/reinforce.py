"""REINFORCE, the vanilla policy gradient (Williams 1992, Machine Learning 8, theorem 1).

Against PPO it drops the ratio, the clipping and the passes: every completion is learned from once, soon after it was
sampled. What is subtracted from the return is a part of its own: nothing, the batch's mean, or a learned value.
"""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.baseline import Baseline, BatchMeanBaseline
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_number
from lit_rlhf.functional import gae, masked_mean, masked_var
from lit_rlhf.models.policy import PolicyOutput


class Reinforce(OnlineAlgorithm):
    """REINFORCE: the gradient is the mean over tokens of (R_t - b_t) grad log policy(a_t | s_t).

    R_t is the discounted sum of the token rewards from t on, the KL penalty included. The gradient is on-policy in the
    first minibatch of an iteration; ``minibatch_size=rollout_batch_size`` makes it so throughout.

    Args:
        baseline: b, see ``lit_rlhf/baseline.py``; the batch's mean by default.
        gamma: discount.
        **online: as for ``PPO``.

    Raises:
        UserError: ``gamma`` is not in [0, 1].
    """

    def __init__(self, *, baseline: Baseline | None = None, gamma: float = 1.0, **online: Any) -> None:
        self.baseline = baseline or BatchMeanBaseline()
        super().__init__(critic=self.baseline.critic, **online)
        self.gamma = check_number("algorithm.gamma", gamma, at_least=0, at_most=1)

    def advantages(self, rewards: Tensor, rollout: Rollout, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stage 5: the discounted reward to go (GAE without a value and with lambda 1), less the baseline."""
        mask = rollout.response_mask
        returns, _ = gae(rewards, torch.zeros_like(rewards), mask, self.gamma, lam=1.0)
        self.pending["returns/mean"] = float(masked_mean(returns, mask))
        self.pending["returns/var"] = float(masked_var(returns, mask))
        return returns - self.baseline(returns, mask, values), returns

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: minus the advantage-weighted log-likelihood."""
        loss = -self.mean(batch.advantages * output.logprobs, batch.response_mask)
        return loss, {"loss/policy": loss.detach()}

    def value_loss(self, batch: Experience, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: what the baseline learns by."""
        loss = self.baseline.loss(values, batch.returns, batch.response_mask)
        return loss, {"loss/value": loss.detach()}
