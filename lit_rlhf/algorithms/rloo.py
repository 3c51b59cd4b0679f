"""RLOO: REINFORCE with the other completions of a prompt as baseline (Ahmadian et al. 2024, arXiv:2402.14740).

Against PPO it drops the critic: a whole completion is one action, its baseline the mean reward of the others.
"""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.clip import Clip, SymmetricClip
from lit_rlhf.functional import leave_one_out_advantages, per_token
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.models.policy import PolicyOutput


class RLOO(OnlineAlgorithm):
    """RLOO: the gradient is the mean over completions of (R_i - mean_{j != i} R_j) grad log policy(y_i | x) (eq. 8).

    R_i is the score less the KL penalty of the whole completion. In later passes the ratio policy(y_i) / old(y_i) takes
    the place of the log-likelihood and is clipped, as in TRL; in the first the two have the same gradient.

    Args:
        clip: bounds of the ratio of whole completions.
        group_size: completions of each prompt, at least 2.
        epochs: passes over the experience of an iteration.
        **online: as for ``PPO``.

    Raises:
        UserError: groups of one, or sizes that do not divide.
    """

    smallest_group = 2
    loss_over = "completions"

    def __init__(self, *, clip: Clip | None = None, group_size: int = 4, epochs: int = 1, **online: Any) -> None:
        super().__init__(group_size=group_size, epochs=epochs, **online)
        self.clip = clip or SymmetricClip()

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: a completion's reward less the mean of the others', the same for all its tokens."""
        advantages = leave_one_out_advantages(rewards.sum(-1), self.group_size)
        return per_token(advantages, rollout.response_mask), None

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Over completions, of their sums."""
        return zero_masked(x, mask).sum(-1).mean()

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the surrogate of whole completions."""
        mask = batch.response_mask
        new, old = (zero_masked(x, mask).sum(-1, keepdim=True) for x in (output.logprobs, batch.logprobs))
        counts = torch.ones_like(new, dtype=torch.bool)
        return self.clipped_loss(new, old, batch.advantages[:, :1], counts)
