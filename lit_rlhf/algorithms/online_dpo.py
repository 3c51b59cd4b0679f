"""Online DPO (Guo et al. 2024, arXiv:2402.04792): DPO on the policy's own pairs, judged by the reward as they come.

Against PPO it drops the critic, the ratio and the KL penalty in the reward: the coefficient of the KL is DPO's beta.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.errors import UserError
from lit_rlhf.functional import per_token
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.models.policy import PolicyOutput
from lit_rlhf.rollout.loader import exact_div


class OnlineDPO(OnlineAlgorithm):
    """Online DPO: minimises -q log sigmoid(h) - (1 - q) log sigmoid(-h) over pairs of completions of a prompt.

    ``h = beta (log policy/ref(y_1) - log policy/ref(y_2))`` (arXiv:2305.18290, eq. 7), and ``q = sigmoid(r_1 - r_2)``
    is the probability that Bradley-Terry prefers y_1: the label in expectation, where the paper draws or asks for one.
    Its optimum is that of the reward with the KL penalty. A large ``scores.scale`` makes labels hard, as a judge that
    is always sure gives them.

    Args:
        group_size: completions of each prompt, an even number; neighbours make a pair.
        epochs: passes over the pairs.
        **online: as for ``PPO``; ``kl.coef`` is beta. ``minibatch_size`` counts completions.

    Raises:
        UserError: an odd ``group_size``, a beta that is not positive, a KL in the loss.
    """

    smallest_group = 2
    unit = 2
    loss_over = "completions"
    kl_in_reward = False

    def __init__(self, *, group_size: int = 2, epochs: int = 1, **online: Any) -> None:
        super().__init__(group_size=group_size, epochs=epochs, **online)
        exact_div(group_size, 2, "algorithm.group_size", "the two completions of a pair")
        exact_div(self.minibatch_size, 2, "algorithm.minibatch_size", "the two completions of a pair")
        if self.kl.in_loss or not self.kl.at(0.0) > 0:
            raise UserError(
                f"online DPO takes its beta from kl.coef, so it must be above 0 and kl.place=reward; here it is "
                f"{self.kl.at(0.0):g} and kl.place={'loss' if self.kl.in_loss else 'reward'}"
            )

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: the probability that a completion is preferred to the other one of its pair."""
        pairs = rewards.sum(-1).reshape(-1, 2)
        return per_token((pairs - pairs.flip(1)).sigmoid().flatten(), rollout.response_mask), None

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: cross-entropy of the implicit rewards' difference with the preference."""
        log_ratios = zero_masked(output.logprobs - batch.ref_logprobs, batch.response_mask).sum(-1)
        implicit = self.pending["objective/kl_coef"] * log_ratios
        difference, preferred = implicit[0::2] - implicit[1::2], batch.advantages[0::2, 0]
        loss = F.binary_cross_entropy_with_logits(difference, preferred)
        agrees = torch.sign(difference.detach()) == torch.sign(preferred - 0.5)
        return loss, {"loss/policy": loss.detach(), "online_dpo/accuracy": agrees.float().mean()}
