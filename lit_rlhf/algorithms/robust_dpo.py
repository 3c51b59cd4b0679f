"""Robust DPO: an unbiased estimate of DPO's loss where a known share of the preference labels is flipped at random.

Chowdhury et al. 2024 (arXiv:2403.00409). Against conservative DPO, which averages over both labels, it subtracts what
the flipped labels add.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.pairs import PairBatch, anchored_logprobs, collate_pairs, pair_metrics
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import check_max_length
from lit_rlhf.functional import robust_dpo_loss
from lit_rlhf.models.policy import Policy


class RobustDPO(OfflineAlgorithm):
    """Robust DPO (arXiv:2403.00409, section 3); d, batches and reference as for ``DPO``.

    L = mean [- (1 - e) log sigmoid(d) + e log sigmoid(-d)] / (1 - 2 e), e = label_smoothing.

    Args:
        policy: the model that is trained.
        beta: strength of the KL constraint, above 0.
        label_smoothing: e, the share of labels that are flipped, in [0, 0.5).
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        **offline: log_every_n_steps, optimizer, scheduler, seed; see ``OfflineAlgorithm``.

    Raises:
        UserError: as ``DPO``.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        beta: float = 0.1,
        label_smoothing: float = 0.1,
        max_length: int | None = None,
        **offline: Any,
    ) -> None:
        super().__init__(**offline)
        self.beta = check_number("algorithm.beta", beta, above=0)
        self.label_smoothing = check_number("algorithm.label_smoothing", label_smoothing, at_least=0, below=0.5)
        self.max_length = check_max_length(max_length, policy)
        self.policy = policy
        self.anchor(policy)

    def collate(self, batch: Any) -> MicroBatch:
        return collate_pairs(batch, self.policy, self.max_length, "robust DPO")

    def loss(self, inputs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = anchored_logprobs(self.policy, self.reference, inputs)
        loss, stats = robust_dpo_loss(*logprobs, self.beta, self.label_smoothing)
        return loss, pair_metrics(stats, *logprobs[:2])
