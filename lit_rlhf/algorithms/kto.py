"""Kahneman-Tversky optimisation: the policy learns from single completions, each labelled good or bad.

Ethayarajh et al. 2024 (arXiv:2402.01306). Against DPO a completion is compared with a reference point, an estimate of
the KL between policy and reference, instead of with another completion.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.pairs import require_different, sequence_logprobs
from lit_rlhf.batch import CompletionBatch
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import bool_column, check_max_length, read_columns, tokenize_completions
from lit_rlhf.distributed import gather
from lit_rlhf.errors import UserError
from lit_rlhf.functional import kto_loss
from lit_rlhf.models.policy import Policy

log = logging.getLogger(__name__)
_ENOUGH = 256  # rows to tell data of one label by


class LabelledBatch(NamedTuple):
    """Completions, their labels (B,) bool, and each prompt with the completion of the row before, for the KL."""

    completions: CompletionBatch
    desirable: Tensor
    mismatched: CompletionBatch


class KTO(OfflineAlgorithm):
    """KTO (arXiv:2402.01306, eq. 7).

    With a completion's log-ratio l of policy to reference: L = mean w (1 - sigmoid(beta (l - z))) for the desirable
    ones, w (1 - sigmoid(beta (z - l))) for the undesirable ones. The reference point z = max(0, mean of the log-ratios
    of each prompt with the completion of the row before it) estimates KL(policy || reference) from the forward pass's
    own batch, a micro-batch, in all processes; no gradient flows into it. A batch of a single row or pair, such as an
    epoch's last, has z = 0.

    Batches are dicts of columns: ``prompt`` (may be missing), ``completion`` and ``label``, true where the completion
    is desirable; or pairs, ``chosen`` and ``rejected``, which are taken apart. The reference is the policy that the run
    starts from; dropout is off.

    Args:
        policy: the model that is trained.
        beta: above 0; small values let the policy move farther.
        desirable_weight: w of the desirable rows, above 0.
        undesirable_weight: w of the undesirable rows, above 0. The paper wants desirable_weight * desirable rows to be
            1 to 4/3 times undesirable_weight * undesirable rows.
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        **offline: log_every_n_steps, optimizer, scheduler, seed; see ``OfflineAlgorithm``.

    Raises:
        UserError: a value out of its range; a batch without these columns, or with a label that is not true or false;
            at ``fit``, a loader whose batches have one row.
    """

    splits = False  # z is that of the batch

    def __init__(
        self,
        *,
        policy: Policy,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        max_length: int | None = None,
        **offline: Any,
    ) -> None:
        super().__init__(**offline)
        self.beta = check_number("algorithm.beta", beta, above=0)
        self.desirable_weight = check_number("algorithm.desirable_weight", desirable_weight, above=0)
        self.undesirable_weight = check_number("algorithm.undesirable_weight", undesirable_weight, above=0)
        self.max_length = check_max_length(max_length, policy)
        self.policy = policy
        self.anchor(policy)
        self._one_label = False  # every row so far had the same; known from the run's start on only

    def collate(self, batch: Any) -> MicroBatch:
        prompts, texts, desirable = _judged(batch)
        parts = [
            tokenize_completions(prompts, column, name, self.policy, self.max_length) for name, column in texts.items()
        ]
        completions = CompletionBatch.cat(parts)
        rows = [text for column in texts.values() for text in column]
        openings = None if prompts is None else prompts * len(texts)
        others = rows[-1:] + rows[:-1]
        if len(rows) == len(texts):  # both completions of a lone pair have the same prompt: a row alone, see below
            openings, others = openings and openings[:1], others[:1]
        mismatched = tokenize_completions(openings, others, "", self.policy, self.max_length)
        inputs = LabelledBatch(completions, desirable, mismatched)
        return MicroBatch(inputs, terms=len(rows), sequences=len(rows), tokens=completions.count)

    def loss(self, inputs: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = sequence_logprobs(self.policy, inputs.completions)
        with torch.no_grad():
            references = sequence_logprobs(self.reference, inputs.completions)
            kl = self._reference_point(inputs.mismatched)
        desirable = inputs.desirable
        weights = self.desirable_weight, self.undesirable_weight
        loss, stats = kto_loss(logprobs, references, desirable, kl, self.beta, *weights)
        share = desirable.float().mean()
        metrics = {
            "kto/kl": kl,
            "kto/desirable": share,
            # Weighted here, for means over rows; `derived` divides by the weights again.
            "rewards/chosen": stats["chosen_reward"] * share,
            "rewards/rejected": stats["rejected_reward"] * (1 - share),
            "logps/chosen": torch.where(desirable, logprobs.detach(), 0.0).mean(),
            "logps/rejected": torch.where(desirable, 0.0, logprobs.detach()).mean(),
        }
        return loss, metrics

    def _reference_point(self, mismatched: CompletionBatch) -> Tensor:
        """z, over the shares of all processes; a row alone, which would be paired with itself, counts as 0."""
        ratios = sequence_logprobs(self.policy, mismatched) - sequence_logprobs(self.reference, mismatched)
        total = float(ratios.sum()) if len(mismatched) > 1 else 0.0
        sums, counts = zip(*gather((total, len(mismatched))), strict=True)
        return ratios.new_tensor(sum(sums) / sum(counts)).clamp(min=0)

    def on_train_start(self) -> None:
        self._one_label = self.sequences == 0
        super().on_train_start()

    def log_row(self, metrics: dict[str, float]) -> None:
        share = metrics.get("kto/desirable")
        self._one_label &= share in (0, 1, None)
        if self._one_label and share is not None and (self.sequences >= _ENOUGH or not self.within_epoch):
            self._one_label = False  # said once
            log.warning(
                "the first %d rows are all %s; KTO learns from both, so put undesirable and desirable rows into the "
                "data and shuffle them", self.sequences, "desirable" if share else "undesirable",
            )  # fmt: skip
        super().log_row(metrics)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        if "kto/desirable" not in means:
            return means
        means = dict(means)
        for side, share in (("chosen", means["kto/desirable"]), ("rejected", 1 - means["kto/desirable"])):
            for name in (f"rewards/{side}", f"logps/{side}"):
                total = means.pop(name)
                if share > 0:
                    means[name] = total / share
        if {"rewards/chosen", "rewards/rejected"} <= set(means):
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def user_loader(self) -> Any:
        loader = super().user_loader()
        if getattr(loader, "batch_size", None) == 1:
            raise UserError(
                "data.batch_size=1: KTO measures the KL by pairing prompts with other rows' completions, so a batch "
                "needs at least 2 rows"
            )
        return loader


def _judged(batch: Any) -> tuple[list[Any] | None, dict[str, list[Any]], Tensor]:
    """Prompts or None, their completions by column, and whether each completion is desirable, column after column."""
    if isinstance(batch, Mapping) and {"chosen", "rejected"} <= set(batch):
        columns = read_columns(batch, ("chosen", "rejected"), "KTO", optional=("prompt",))
        prompts, chosen, rejected = columns.pop("prompt", None), columns["chosen"], columns["rejected"]
        require_different(chosen, rejected)
        return prompts, columns, torch.arange(len(chosen) + len(rejected)) < len(chosen)
    columns = read_columns(batch, ("completion", "label"), "KTO", optional=("prompt",))
    return columns.get("prompt"), {"completion": columns["completion"]}, bool_column(batch, "label")
