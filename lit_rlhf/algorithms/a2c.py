"""A2C, the synchronous advantage actor-critic (Mnih et al. 2016, arXiv:1602.01783, section 4).

Against PPO it drops the ratio, the clipping and the passes: PPO with one pass, one minibatch and no clipping has the
same gradient (Huang et al. 2022, arXiv:2205.09123).
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.online import CriticFactory, OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_bool, check_number
from lit_rlhf.entropy import EntropyBonus, NoEntropy
from lit_rlhf.functional import clipped_value_loss, gae, masked_mean, masked_var, masked_whiten
from lit_rlhf.models.critic import ValueHead
from lit_rlhf.models.policy import PolicyOutput


class A2C(OnlineAlgorithm):
    """A2C: the gradient is that of A_t log policy(a_t | s_t) - c1 (R_t - V_t)^2 / 2 + c2 H_t, a mean over tokens.

    Args:
        critic: makes the critic from the policy; a value head on the policy's backbone by default.
        entropy: c2, the weight of the entropy.
        gamma: discount.
        lam: lambda of generalised advantage estimation; 1, the paper's return to the end of the episode minus V.
        value_coef: c1, the weight of the value loss.
        whiten_advantages: mean 0 and variance 1 over the iteration's response tokens.
        **online: as for ``PPO``.

    Raises:
        UserError: a number is out of its range.
    """

    def __init__(
        self,
        *,
        critic: CriticFactory = ValueHead,
        entropy: EntropyBonus | None = None,
        gamma: float = 1.0,
        lam: float = 1.0,
        value_coef: float = 0.5,
        whiten_advantages: bool = False,
        **online: Any,
    ) -> None:
        super().__init__(critic=critic, **online)
        self.gamma = check_number("algorithm.gamma", gamma, at_least=0, at_most=1)
        self.lam = check_number("algorithm.lam", lam, at_least=0, at_most=1)
        self.value_coef = check_number("algorithm.value_coef", value_coef, at_least=0)
        self.whiten_advantages = check_bool("algorithm.whiten_advantages", whiten_advantages)
        self.entropy = entropy or NoEntropy()

    def advantages(self, rewards: Tensor, rollout: Rollout, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 5: generalised advantage estimation."""
        mask = rollout.response_mask
        advantages, returns = gae(rewards, values[:, :-1], mask, self.gamma, self.lam)
        self.pending["returns/mean"] = float(masked_mean(returns, mask))
        self.pending["returns/var"] = float(masked_var(returns, mask))
        return masked_whiten(advantages, mask) if self.whiten_advantages else advantages, returns

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: actor and entropy."""
        mask = batch.response_mask
        policy_loss = -self.mean(batch.advantages * output.logprobs, mask)
        entropy = self.mean(output.entropy, mask)
        loss = policy_loss - self.entropy.at(self.progress) * entropy
        return loss, {"loss/policy": policy_loss.detach(), "loss/entropy": -entropy.detach()}

    def value_loss(self, batch: Experience, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the critic."""
        loss, _ = clipped_value_loss(values, batch.values, batch.returns, batch.response_mask, None)
        return self.value_coef * loss, {"loss/value": loss.detach()}
