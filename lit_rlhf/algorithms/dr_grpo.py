"""Dr. GRPO, "GRPO done right" (Liu et al. 2025, arXiv:2503.20783, section 3).

Against GRPO it drops two divisions that bias the gradient: by a completion's length, which favours long wrong answers,
and by the group's standard deviation, which favours prompts that are nearly always, or never, solved.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.clip import Clip, SymmetricClip
from lit_rlhf.functional import group_advantages, per_token
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.models.policy import PolicyOutput


class DrGRPO(OnlineAlgorithm):
    """Dr. GRPO: maximises the mean over completions of (1 / L) sum_t min(rho A_i, clip(rho) A_i), A_i = R_i - mean(R).

    L is the constant ``sampler.max_new_tokens``. In the first pass the gradient is the policy gradient times
    (group_size - 1) / (group_size L).

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
        """Stage 5: less the group's mean, the same for all tokens of a completion."""
        advantages = group_advantages(rewards.sum(-1), self.group_size, normalize=False)
        return per_token(advantages, rollout.response_mask), None

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Over completions, of their sums divided by the longest possible length."""
        return zero_masked(x, mask).sum(-1).mean() / self.sampler.max_new_tokens

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the clipped surrogate of tokens."""
        return self.clipped_loss(output.logprobs, batch.logprobs, batch.advantages, batch.response_mask)
