"""Direct preference optimisation: the policy learns from preference pairs without a reward model and without sampling.

Rafailov et al. 2023 (arXiv:2305.18290). Against the pipeline of InstructGPT it drops the reward model, the rollouts and
the critic: the optimal policy of the KL-regularised goal implies the reward
r(x, y) = beta log(policy(y|x) / reference(y|x)), up to a function of x, and Bradley-Terry on that reward is the loss.
"""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.pairs import PairBatch, anchored_logprobs, collate_pairs, pair_metrics
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import check_max_length
from lit_rlhf.functional import dpo_loss
from lit_rlhf.models.policy import Policy


class DPO(OfflineAlgorithm):
    """DPO (arXiv:2305.18290, eq. 7), with ``label_smoothing`` conservative DPO (Mitchell 2023).

    With d = beta (log-ratio of the chosen - log-ratio of the rejected completion), policy to reference:
    L = - mean [(1 - e) log sigmoid(d) + e log sigmoid(-d)], e = label_smoothing.

    Batches are dicts of columns: ``chosen`` and ``rejected``, texts, and ``prompt``, texts or chats; without prompts
    whole texts are compared. Log-probabilities are sums over a completion's tokens, its end of sequence included. The
    reference is the policy that the run starts from; dropout is off.

    Args:
        policy: the model that is trained.
        beta: strength of the KL constraint, above 0.
        label_smoothing: e, the share of pairs whose label is taken to be wrong, in [0, 0.5).
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        **offline: log_every_n_steps, optimizer, scheduler, seed; see ``OfflineAlgorithm``.

    Raises:
        UserError: a value out of its range; a batch whose pairs lack a side or have equal ones.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
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
        return collate_pairs(batch, self.policy, self.max_length, "DPO")

    def loss(self, inputs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = anchored_logprobs(self.policy, self.reference, inputs)
        loss, stats = dpo_loss(*logprobs, self.beta, self.label_smoothing)
        return loss, pair_metrics(stats, *logprobs[:2])
