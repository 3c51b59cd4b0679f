"""DAPO, decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv:2503.14476, section 3).

Against GRPO: a wider upper clip bound (``clip=asymmetric``), a mean over all tokens instead of over completions, and
dynamic sampling: prompts whose completions all have the same reward teach nothing and are left out.
"""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_int
from lit_rlhf.clip import AsymmetricClip, Clip
from lit_rlhf.errors import UserError
from lit_rlhf.functional import group_advantages, per_token
from lit_rlhf.models.policy import PolicyOutput
from lit_rlhf.rollout.loader import exact_div


class DAPO(OnlineAlgorithm):
    """DAPO: maximises the mean over tokens of min(rho A_i, clip(rho) A_i), A_i as in ``GRPO`` (eq. 8).

    The paper samples until a batch of groups that differ is full. Here an iteration samples ``rollout_batch_size``
    completions and learns from ``kept_batch_size`` of them, those of the first groups that differ; where there are too
    few, groups of equal rewards fill up, whose advantages are 0. With a KL penalty in the reward (the paper has none),
    rewards differ wherever the KLs do.

    Args:
        clip: bounds of the ratio rho of a token; 0.2 down and 0.28 up by default.
        group_size: completions of each prompt, at least 2.
        kept_batch_size: completions of one iteration that are learned from; None keeps all.
        epochs: passes over the experience of an iteration.
        **online: as for ``PPO``.

    Raises:
        UserError: groups of one, sizes that do not divide, or more kept than sampled.
    """

    smallest_group = 2
    experience_key = "algorithm.kept_batch_size"

    def __init__(
        self,
        *,
        clip: Clip | None = None,
        group_size: int = 8,
        kept_batch_size: int | None = None,
        epochs: int = 1,
        **online: Any,
    ) -> None:
        kept = None if kept_batch_size is None else check_int(self.experience_key, kept_batch_size, at_least=1)
        self.kept_batch_size = kept
        super().__init__(group_size=group_size, epochs=epochs, **online)
        if kept is not None:
            exact_div(kept, group_size, self.experience_key, "algorithm.group_size")
            if kept > self.rollout_batch_size:
                raise UserError(
                    f"{self.experience_key}={kept} is more than algorithm.rollout_batch_size={self.rollout_batch_size}"
                )
        self.clip = clip or AsymmetricClip()

    @property
    def experience_size(self) -> int:
        return self.rollout_batch_size if self.kept_batch_size is None else self.kept_batch_size

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: standardised within the group, the same for all tokens of a completion."""
        return per_token(group_advantages(rewards.sum(-1), self.group_size), rollout.response_mask), None

    def select(self, experience: Experience) -> Experience:
        """Stage 6: dynamic sampling. The groups that differ come first, each part in the order of sampling."""
        differ = (experience.advantages != 0).any(-1).reshape(-1, self.group_size).any(-1)
        groups = differ.int().argsort(descending=True, stable=True)[: self.experience_size // self.group_size]
        return experience[(groups.unsqueeze(1) * self.group_size + torch.arange(self.group_size)).flatten()]

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the clipped surrogate, a mean over tokens."""
        return self.clipped_loss(output.logprobs, batch.logprobs, batch.advantages, batch.response_mask)
