"""Reward model: one number for a text, learned from what people preferred.

The second stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, section 3.1, eq. 1).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.algorithms.base import OptimizerFactory, SchedulerFactory
from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.pairs import require_different
from lit_rlhf.batch import PreferenceBatch
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import answer_text, number_column
from lit_rlhf.errors import UserError
from lit_rlhf.functional import preference_loss
from lit_rlhf.models.policy import disable_dropout
from lit_rlhf.models.scorer import Scorer
from lit_rlhf.rewards.text import Scope, check_scope, tokens_to_score
from lit_rlhf.rollout.philox import derive_seed

_ROWS = 32  # texts in one forward pass


class RatedBatch(NamedTuple):
    """Tokenised texts (B, T), padded on the right, with the score (B,) that each should get."""

    ids: Tensor
    mask: Tensor
    score: Tensor


class JudgedPairs(NamedTuple):
    """Pairs, and the share (B,) of their judges who preferred the chosen text."""

    pairs: PreferenceBatch
    agreement: Tensor


class RewardModel(OfflineAlgorithm):
    """Fine-tunes a sequence classifier with one output, all of its weights. The columns of a batch choose the loss:

    - ``chosen`` and ``rejected``, lists of str, and optionally ``margin`` (B,), by how much the chosen text was rated
      better, and ``agreement`` (B,), the share of judges who preferred it, 1 by default. Bradley-Terry, in expectation
      over the judges:  d = r_chosen - r_rejected - margin_coef * margin,
      L = - mean (agreement * log sigmoid(d) + (1 - agreement) * log sigmoid(-d)).
    - ``text``, a list of str, and ``score`` (B,). Regression:  L = mean (r - score)^2.

    Where the batch has a column ``prompt``, a text is scored behind it, as ``ModelReward`` does in PPO. Validation may
    use the other kind, so that regression is measured by its accuracy on pairs.

    Args:
        model_path: an encoder such as ``minilm``, a causal language model, or an earlier reward model; hub name, folder
            or short name. Without a head of one output it gets a new one, drawn from ``seed``.
        max_length: longer texts lose their end, in tokens.
        on: ``text`` scores a prompt together with what follows it, a chat only where the model's tokenizer has a chat
            template; ``completion`` what follows alone. As ``reward.on`` of the reward that this model becomes.
        margin_coef: weight of ``margin`` (Touvron et al. 2023, arXiv:2307.09288, eq. 2); 0 ignores it.
        center_coef: adds ``center_coef * mean (r_chosen + r_rejected)^2``, which keeps scores around 0 (Eisenstein et
            al. 2023, arXiv:2312.09244, eq. 2); Bradley-Terry leaves their mean free.
        dropout: whether the model's own dropout is active in training. Without it a step of MiniLM takes a sixth less,
            and one epoch, which hardly overfits, ends no worse.
        trust_remote_code: run the Python code that comes with the model, which can do anything.
        log_every_n_steps: see ``OfflineAlgorithm``.
        optimizer, scheduler, seed, max_skipped_steps: see ``Algorithm``.

    Raises:
        UserError: a value out of range, nothing to load, a batch with other columns, or an empty text.
    """

    def __init__(
        self,
        *,
        model_path: str = "minilm",
        max_length: int = 128,
        on: Scope = "text",
        margin_coef: float = 0.0,
        center_coef: float = 0.0,
        dropout: bool = False,
        trust_remote_code: bool = False,
        log_every_n_steps: int = 10,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        max_skipped_steps: int = 10,
    ) -> None:
        common = {"optimizer": optimizer, "scheduler": scheduler, "seed": seed, "max_skipped_steps": max_skipped_steps}
        super().__init__(log_every_n_steps=log_every_n_steps, **common)
        self.on = check_scope(on, "algorithm.on")
        self.margin_coef = check_number("algorithm.margin_coef", margin_coef, at_least=0)
        self.center_coef = check_number("algorithm.center_coef", center_coef, at_least=0)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed))
            self.scorer = Scorer.from_pretrained(
                path=model_path, labels=1, max_length=max_length, trust_remote_code=trust_remote_code
            )
        if not dropout:
            disable_dropout(self.scorer)

    def collate(self, batch: Any) -> MicroBatch:
        columns = set(batch) if isinstance(batch, Mapping) else set()
        if {"chosen", "rejected"} <= columns:
            return self._pairs(batch)
        if {"text", "score"} <= columns:
            return self._ratings(batch)
        raise UserError(
            "a batch for the reward model needs 'chosen' and 'rejected', or 'text' and 'score'; this one is a "
            f"{type(batch).__name__} with {sorted(map(str, columns))}"
        )

    def _pairs(self, batch: Mapping[str, Any]) -> MicroBatch:
        chosen, rejected = self._tokenize(batch, "chosen"), self._tokenize(batch, "rejected")
        if len(chosen) != len(rejected):
            raise UserError(f"a batch of pairs has {len(chosen)} chosen and {len(rejected)} rejected texts")
        require_different(list(batch["chosen"]), list(batch["rejected"]))
        chosen_ids, chosen_mask = self.scorer.pad(chosen)
        rejected_ids, rejected_mask = self.scorer.pad(rejected)
        margin = number_column(batch, "margin", len(chosen)) if "margin" in batch else torch.zeros(len(chosen))
        agreement = number_column(batch, "agreement", len(chosen)) if "agreement" in batch else torch.ones(len(chosen))
        if ((agreement < 0) | (agreement > 1)).any():
            raise UserError(
                f"column 'agreement' of the batch must be shares from 0 to 1, got {agreement.tolist()!r:.80}"
            )
        pairs = PreferenceBatch(
            chosen_ids=chosen_ids,
            chosen_mask=chosen_mask,
            rejected_ids=rejected_ids,
            rejected_mask=rejected_mask,
            margin=margin,
        )
        rows = chosen + rejected
        return MicroBatch(JudgedPairs(pairs, agreement), len(chosen), len(rows), sum(map(len, rows)))

    def _ratings(self, batch: Mapping[str, Any]) -> MicroBatch:
        rows = self._tokenize(batch, "text")
        inputs = RatedBatch(*self.scorer.pad(rows), number_column(batch, "score", len(rows)))
        return MicroBatch(inputs, len(rows), len(rows), sum(map(len, rows)))

    def _tokenize(self, batch: Mapping[str, Any], column: str) -> list[Tensor]:
        texts = batch[column]
        if isinstance(texts, str) or len(texts) == 0:
            raise UserError(f"column '{column}' of the batch must be a list of texts, got {texts!r:.80}")
        texts = [answer_text(text) for text in texts]
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"sample {number} of the batch has no text in '{column}': {text!r}")
        prompts = batch.get("prompt")
        if prompts is None:
            return self.scorer.tokenize(texts)
        if len(prompts) != len(texts):
            raise UserError(f"a batch has {len(prompts)} prompts for {len(texts)} texts in '{column}'")
        return tokens_to_score(self.scorer, prompts, texts, self.on)

    def loss(self, inputs: JudgedPairs | RatedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._regression(inputs) if isinstance(inputs, RatedBatch) else self._bradley_terry(inputs)

    def _bradley_terry(self, judged: JudgedPairs) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = judged.pairs
        width = max(pairs.chosen_ids.shape[1], pairs.rejected_ids.shape[1])
        pad = self.scorer.tokenizer.pad_token_id
        ids = torch.cat([_widen(x, width, pad) for x in (pairs.chosen_ids, pairs.rejected_ids)])
        mask = torch.cat([_widen(x, width, False) for x in (pairs.chosen_mask, pairs.rejected_mask)])
        chosen, rejected = self.score(ids, mask).chunk(2)
        margin = self.margin_coef * pairs.margin
        _, stats = preference_loss(chosen, rejected, margin)
        loss = F.binary_cross_entropy_with_logits(chosen - rejected - margin, judged.agreement)
        metrics = {"loss": loss.detach(), "mean_score": (chosen + rejected).detach().mean() / 2, **stats}
        return loss + self.center_coef * (chosen + rejected).square().mean(), _named(metrics)

    def _regression(self, rated: RatedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.score(rated.ids, rated.mask)
        loss = F.mse_loss(scores, rated.score)
        return loss, _named({"loss": loss.detach(), "mean_score": scores.detach().mean()})

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> (B,) scores. Texts of similar length share a forward pass, for less padding."""
        lengths = mask.sum(-1)
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.split(_ROWS):
            longest = int(lengths[rows[-1]])
            parts.append(self.scorer(ids[rows, :longest], mask[rows, :longest])[:, 0])
        return torch.cat(parts)[order.argsort()]

    def export(self, folder: Path) -> None:
        """Writes the reward model in Hugging Face's format: ``AutoModelForSequenceClassification`` loads it.

        Every process must call it.
        """
        self.scorer.save(folder)


def _named(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"reward_model/{name}": value for name, value in metrics.items()}


def _widen(x: Tensor, width: int, value: float) -> Tensor:
    return F.pad(x, (0, width - x.shape[1]), value=value)
