"""GSPO, group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071, section 4.1).

Against GRPO the ratio is that of the whole completion, length-normalised, and whole completions are clipped: the
reward is one of completions, so its importance weight is too.
"""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.clip import AsymmetricClip, Clip
from lit_rlhf.functional import group_advantages, masked_mean, per_token
from lit_rlhf.models.policy import PolicyOutput


class GSPO(OnlineAlgorithm):
    """GSPO: maximises the mean over completions of min(s_i A_i, clip(s_i) A_i) (eq. 5), A_i as in ``GRPO``.

    ``s_i = (policy(y_i | x) / old(y_i | x))^(1 / |y_i|)`` (eq. 7) moves far less than the ratio of a token, so its
    bounds are a thousand times closer.

    Args:
        clip: bounds of the ratio s; 3e-4 down and 4e-4 up by default, as in section 5.1.
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
        self.clip = clip or AsymmetricClip(low=3e-4, high=4e-4)

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: standardised within the group, the same for all tokens of a completion."""
        return per_token(group_advantages(rewards.sum(-1), self.group_size), rollout.response_mask), None

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Over completions, of the means over their tokens."""
        return masked_mean(x, mask, dim=1).mean()

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the clipped surrogate of whole completions."""
        mask = batch.response_mask
        new, old = (masked_mean(x, mask, dim=1).unsqueeze(1) for x in (output.logprobs, batch.logprobs))
        counts = torch.ones_like(new, dtype=torch.bool)
        return self.clipped_loss(new, old, batch.advantages[:, :1], counts)
