"""ORPO: supervised fine-tuning on the chosen completions with a penalty on the odds of the rejected ones, in one stage.

Hong et al. 2024 (arXiv:2403.07691). Against DPO it drops the reference and the SFT stage before.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.pairs import PairBatch, collate_pairs, pair_metrics, sequence_logprobs
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import check_max_length
from lit_rlhf.functional import odds_ratio_loss
from lit_rlhf.models.policy import Policy


class ORPO(OfflineAlgorithm):
    """ORPO (arXiv:2403.07691, eqs. 6 and 7); batches as for ``DPO``.

    L = mean [- log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))], odds = p / (1 - p), where p is
    the geometric mean of a completion's token probabilities. ``rewards/*`` are beta log p, as in TRL.

    Args:
        policy: the model that is trained.
        beta: weight of the odds ratio, the paper's lambda, above 0.
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        **offline: log_every_n_steps, optimizer, scheduler, seed; see ``OfflineAlgorithm``.

    Raises:
        UserError: as ``DPO``.
    """

    def __init__(self, *, policy: Policy, beta: float = 0.1, max_length: int | None = None, **offline: Any) -> None:
        super().__init__(**offline)
        self.beta = check_number("algorithm.beta", beta, above=0)
        self.max_length = check_max_length(max_length, policy)
        self.policy = policy

    def collate(self, batch: Any) -> MicroBatch:
        return collate_pairs(batch, self.policy, self.max_length, "ORPO")

    def loss(self, inputs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = sequence_logprobs(self.policy, inputs.completions)
        chosen, rejected = inputs.sides(logprobs / inputs.completions.lengths)
        odds_ratio, stats = odds_ratio_loss(chosen, rejected)
        nll = -chosen.mean()
        margins = self.beta * (chosen - rejected).detach()
        stats = {
            "chosen_reward": self.beta * chosen.detach().mean(),
            "rejected_reward": self.beta * rejected.detach().mean(),
            "margin": margins.mean(),
            "accuracy": (margins > 0).float().mean(),
            **stats,
        }
        metrics = {
            "loss/nll": nll.detach(),
            "loss/odds_ratio": odds_ratio.detach(),
            "orpo/log_odds_ratio": stats["log_odds_ratio"],
            **pair_metrics(stats, *inputs.sides(logprobs)),
        }
        return nll + self.beta * odds_ratio, metrics
