"""GRPO, group relative policy optimisation (DeepSeekMath, Shao et al. 2024, arXiv:2402.03300, section 4.1).

Against PPO it drops the critic: a completion's advantage is its reward relative to the others of its prompt, in
standard deviations. The paper charges the KL to the reference in the loss (``kl=loss_k3``); k1 in the reward works too.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.clip import Clip, SymmetricClip
from lit_rlhf.functional import group_advantages, masked_mean, per_token
from lit_rlhf.models.policy import PolicyOutput


class GRPO(OnlineAlgorithm):
    """GRPO: maximises the mean over completions of (1 / |y_i|) sum_t min(rho A_i, clip(rho) A_i) (eq. 3).

    ``A_i = (R_i - mean(R)) / std(R)`` over the completions of a prompt. Dividing by the length and by the standard
    deviation are what Dr. GRPO drops, see ``DrGRPO``.

    Args:
        clip: bounds of the ratio rho of a token.
        group_size: completions of each prompt, at least 2.
        epochs: passes over the experience of an iteration.
        **online: as for ``PPO``.

    Raises:
        UserError: groups of one, or sizes that do not divide.
    """

    smallest_group = 2
    loss_over = "completions"

    def __init__(self, *, clip: Clip | None = None, group_size: int = 8, epochs: int = 1, **online: Any) -> None:
        super().__init__(group_size=group_size, epochs=epochs, **online)
        self.clip = clip or SymmetricClip()

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: standardised within the group, the same for all tokens of a completion."""
        return per_token(group_advantages(rewards.sum(-1), self.group_size), rollout.response_mask), None

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Over completions, of the means over their tokens."""
        return masked_mean(x, mask, dim=1).mean()

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the clipped surrogate of tokens."""
        return self.clipped_loss(output.logprobs, batch.logprobs, batch.advantages, batch.response_mask)
