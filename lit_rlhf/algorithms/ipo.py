"""Identity preference optimisation: DPO with a squared loss, whose optimum stays near the reference.

Azar et al. 2023 (arXiv:2310.12036). DPO drives a preference that is certain in the data to an infinite margin, whatever
beta is; IPO regresses the margin on 1 / (2 beta) instead.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.pairs import PairBatch, anchored_logprobs, collate_pairs, pair_metrics
from lit_rlhf.checks import check_bool, check_number
from lit_rlhf.data.completions import check_max_length
from lit_rlhf.functional import ipo_loss
from lit_rlhf.models.policy import Policy


class IPO(OfflineAlgorithm):
    """IPO (arXiv:2310.12036, eq. 17; its tau is ``beta``); batches and reference as for ``DPO``.

    L = mean (h - 1 / (2 beta))^2 with h = log-ratio of the chosen - log-ratio of the rejected completion, policy to
    reference.

    Args:
        policy: the model that is trained.
        beta: strength of the KL constraint, above 0.
        length_normalize: a completion's log-ratio is its mean over the tokens, so that a long completion's square does
            not dwarf a short one's, as in the authors' experiments and in TRL. Otherwise it is the sum, as in eq. 17.
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
        length_normalize: bool = True,
        max_length: int | None = None,
        **offline: Any,
    ) -> None:
        super().__init__(**offline)
        self.beta = check_number("algorithm.beta", beta, above=0)
        self.length_normalize = check_bool("algorithm.length_normalize", length_normalize)
        self.max_length = check_max_length(max_length, policy)
        self.policy = policy
        self.anchor(policy)

    def collate(self, batch: Any) -> MicroBatch:
        return collate_pairs(batch, self.policy, self.max_length, "IPO")

    def loss(self, inputs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = anchored_logprobs(self.policy, self.reference, inputs)
        loss, stats = ipo_loss(*logprobs, self.beta)
        if self.length_normalize:
            lengths = inputs.sides(inputs.completions.lengths) * 2
            loss, _ = ipo_loss(*(x / n for x, n in zip(logprobs, lengths, strict=True)), self.beta)
        return loss, pair_metrics(stats, *logprobs[:2])
