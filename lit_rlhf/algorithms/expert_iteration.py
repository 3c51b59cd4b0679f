"""Expert iteration with a verifier (Anthony et al. 2017, arXiv:1705.08439; for language models ReST-EM, Singh et al.
2023, arXiv:2312.06585, section 3).

Against RAFT it keeps every completion that is right, and none of a prompt that was never solved: the verifier says what
is right, not what is best. Made for ``reward=verifier data=arithmetic``.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_number
from lit_rlhf.functional import per_token
from lit_rlhf.models.policy import PolicyOutput


class ExpertIteration(OnlineAlgorithm):
    """Expert iteration: maximises the log-likelihood of the completions whose reward is at least ``threshold``.

    That is the M-step of ReST-EM with the reward 1[r >= threshold], from the policy of the last iteration
    instead of the first one. On the first pass it is REINFORCE with that reward and no baseline.

    Args:
        threshold: the smallest reward, after shaping and the KL penalty, of a completion that is learned from.
        group_size: completions of each prompt.
        epochs: passes over the right completions.
        **online: as for ``PPO``.

    Raises:
        UserError: ``threshold`` is no finite number.
    """

    def __init__(self, *, threshold: float = 0.5, group_size: int = 4, epochs: int = 1, **online: Any) -> None:
        super().__init__(group_size=group_size, epochs=epochs, **online)
        self.threshold = check_number("algorithm.threshold", threshold)

    def advantages(self, rewards: Tensor, rollout: Rollout, values: None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Stage 5: 0 for what is wrong; 1 / (share of right tokens) for what is right, so that the mean is theirs."""
        mask = rollout.response_mask
        right = rewards.sum(-1) >= self.threshold
        self.pending["rollout/kept_rate"] = float(right.float().mean())
        kept = (mask & right.unsqueeze(1)).sum()
        return per_token(right * (mask.sum() / kept.clamp(min=1)), mask), None

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the negative log-likelihood of a token of the right completions."""
        loss = -self.mean(batch.advantages * output.logprobs, batch.response_mask)
        return loss, {"loss/policy": loss.detach()}
