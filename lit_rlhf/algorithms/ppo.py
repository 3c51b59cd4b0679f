"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) as InstructGPT uses it (arXiv:2203.02155).

Against the online base it adds: a critic with generalised advantage estimation, the clipped objective, a clipped value
loss and an entropy bonus. The KL to the reference is part of the token rewards (stage 4), not of the loss.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.online import CriticFactory, OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_bool, check_number
from lit_rlhf.clip import Clip, SymmetricClip
from lit_rlhf.entropy import EntropyBonus, NoEntropy
from lit_rlhf.functional import clipped_value_loss, gae, masked_mean, masked_var, masked_whiten
from lit_rlhf.models.critic import ValueHead
from lit_rlhf.models.policy import PolicyOutput


class PPO(OnlineAlgorithm):
    """PPO: maximises L_clip - c1 * L_value + c2 * H (arXiv:1707.06347, eq. 9) on token rewards with a KL penalty.

    Args:
        critic: makes the critic from the policy; a value head on the policy's backbone by default.
        clip: bounds of the ratio and of the value, or a penalty on the KL to the rollout policy instead.
        entropy: c2, the weight of the entropy.
        ppo_epochs: passes over the experience of an iteration.
        gamma: discount.
        lam: lambda of generalised advantage estimation.
        critic_lam: lambda of the returns that the critic learns; None takes ``lam``. With 1 they are unbiased, however
            short-sighted the policy's advantages are (decoupled GAE, VC-PPO, arXiv:2503.01491, section 4.2).
        value_coef: c1, the weight of the value loss.
        whiten_advantages: mean 0 and variance 1 over the iteration's response tokens.
        whiten_rewards: variance 1 of the token rewards, keeping their mean, before the advantages.
        bootstrap_truncated: a completion cut by the length limit gets the value of the state after it as a final
            reward (Pardo et al. 2018, arXiv:1712.00378), instead of ending the episode there.
        **online: policy, reward, gold, kl, sampler, scores, rollout_batch_size, group_size, minibatch_size, target_kl,
            optimizer, scheduler, seed; see ``OnlineAlgorithm``.
    """

    epochs_key = "algorithm.ppo_epochs"

    def __init__(
        self,
        *,
        critic: CriticFactory = ValueHead,
        clip: Clip | None = None,
        entropy: EntropyBonus | None = None,
        ppo_epochs: int = 4,
        gamma: float = 1.0,
        lam: float = 0.95,
        critic_lam: float | None = None,
        value_coef: float = 0.1,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        bootstrap_truncated: bool = False,
        **online: Any,
    ) -> None:
        super().__init__(critic=critic, epochs=ppo_epochs, **online)
        unit = {"at_least": 0, "at_most": 1}
        self.gamma = check_number("algorithm.gamma", gamma, **unit)
        self.lam = check_number("algorithm.lam", lam, **unit)
        self.critic_lam = None if critic_lam is None else check_number("algorithm.critic_lam", critic_lam, **unit)
        self.value_coef = check_number("algorithm.value_coef", value_coef, at_least=0)
        self.clip = clip or SymmetricClip()
        self.entropy = entropy or NoEntropy()
        self.whiten_advantages = check_bool("algorithm.whiten_advantages", whiten_advantages)
        self.whiten_rewards = check_bool("algorithm.whiten_rewards", whiten_rewards)
        self.bootstrap_truncated = check_bool("algorithm.bootstrap_truncated", bootstrap_truncated)

    def advantages(self, rewards: Tensor, rollout: Rollout, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 5: generalised advantage estimation, then whitening over the whole iteration."""
        mask = rollout.response_mask
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if self.bootstrap_truncated:
            last = rollout.lengths.unsqueeze(1) - 1
            after = values.gather(1, last + 1) * (~rollout.finished).unsqueeze(1)
            rewards = rewards.scatter_add(1, last, self.gamma * after)
        advantages, returns = gae(rewards, values[:, :-1], mask, self.gamma, self.lam)
        if self.critic_lam is not None:
            _, returns = gae(rewards, values[:, :-1], mask, self.gamma, self.critic_lam)
        self.pending["returns/mean"] = float(masked_mean(returns, mask))
        self.pending["returns/var"] = float(masked_var(returns, mask))
        unexplained = masked_var(returns - values[:, :-1], mask) / masked_var(returns, mask).clamp(min=1e-8)
        self.pending["value/explained_variance"] = float(1 - unexplained)
        if self.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        return advantages, returns

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: -L_clip - c2 H."""
        mask = batch.response_mask
        policy_loss, metrics = self.clipped_loss(output.logprobs, batch.logprobs, batch.advantages, mask)
        entropy = masked_mean(output.entropy, mask)
        loss = policy_loss - self.entropy.at(self.progress) * entropy
        return loss, {**metrics, "loss/entropy": -entropy.detach()}

    def value_loss(self, batch: Experience, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: c1 L_value."""
        bound = self.clip.at(self.progress).value
        loss, metrics = clipped_value_loss(values, batch.values, batch.returns, batch.response_mask, bound)
        return self.value_coef * loss, {"loss/value": loss.detach(), "value/clipfrac": metrics["clipfrac"]}
