"""REINFORCE++ (Hu 2025, arXiv:2501.03262): PPO without a critic.

Against PPO it drops the critic; against GRPO and RLOO the groups: the baseline is the whole batch's, by whitening.
"""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_number
from lit_rlhf.clip import Clip, SymmetricClip
from lit_rlhf.functional import gae, masked_mean, masked_var, masked_whiten
from lit_rlhf.models.policy import PolicyOutput


class ReinforcePP(OnlineAlgorithm):
    """REINFORCE++: maximises the mean over tokens of min(rho A_t, clip(rho) A_t).

    A_t is the discounted sum of the token rewards from t on, the KL penalty of each token included, whitened over all
    tokens of the iteration.

    Args:
        clip: bounds of the ratio rho of a token.
        gamma: discount.
        epochs: passes over the experience of an iteration.
        **online: as for ``PPO``.

    Raises:
        UserError: ``gamma`` is not in [0, 1].
    """

    def __init__(self, *, clip: Clip | None = None, gamma: float = 1.0, epochs: int = 1, **online: Any) -> None:
        super().__init__(epochs=epochs, **online)
        self.gamma = check_number("algorithm.gamma", gamma, at_least=0, at_most=1)
        self.clip = clip or SymmetricClip()

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: the discounted reward to go (GAE without a value and with lambda 1), whitened."""
        mask = rollout.response_mask
        returns, _ = gae(rewards, torch.zeros_like(rewards), mask, self.gamma, lam=1.0)
        self.pending["returns/mean"] = float(masked_mean(returns, mask))
        self.pending["returns/var"] = float(masked_var(returns, mask))
        return masked_whiten(returns, mask), None

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the clipped surrogate of tokens."""
        return self.clipped_loss(output.logprobs, batch.logprobs, batch.advantages, batch.response_mask)
