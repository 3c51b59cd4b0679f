"""RAFT, reward-ranked fine-tuning, or iterated best-of-n (Dong et al. 2023, arXiv:2304.06767, algorithm 1).

Against PPO nothing is left of reinforcement learning in the update: sample, keep the best, imitate it.
"""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.functional import per_token
from lit_rlhf.models.policy import PolicyOutput


class RAFT(OnlineAlgorithm):
    """RAFT: maximises the log-likelihood of the best of ``group_size`` completions of each prompt.

    An iteration's target is the best-of-n distribution of the policy that it starts from: with F the distribution of
    scores, p_n(y) = p(y) (F(s)^n - F(s-)^n) / (F(s) - F(s-)). The KL penalty, if there is one, is part of what ranks.

    Args:
        group_size: completions of each prompt, of which the best is learned from; at least 2.
        epochs: passes over the best completions.
        **online: as for ``PPO``; ``minibatch_size`` counts best completions.

    Raises:
        UserError: groups of one, or sizes that do not divide.
    """

    smallest_group = 2
    experience_key = "algorithm.rollout_batch_size / algorithm.group_size"

    def __init__(self, *, group_size: int = 4, epochs: int = 1, **online: Any) -> None:
        super().__init__(group_size=group_size, epochs=epochs, **online)

    @property
    def experience_size(self) -> int:
        return self.rollout_batch_size // self.group_size

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: the reward of the completion, by which ``select`` ranks."""
        return per_token(rewards.sum(-1), rollout.response_mask), None

    def select(self, experience: Experience) -> Experience:
        """Stage 6: the best of each group, the first one of several."""
        rewards = experience.advantages[:, 0].reshape(-1, self.group_size)
        best, number = rewards.max(-1)
        self.pending["rollout/kept_reward"] = float(best.mean())
        return experience[torch.arange(len(rewards)) * self.group_size + number]

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the negative log-likelihood of a token of the best completions."""
        loss = -self.mean(output.logprobs, batch.response_mask)
        return loss, {"loss/policy": loss.detach()}
