"""What the algorithms of rewarded completions share: the batch, its tokens, where the reward lies."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch
from lit_rlhf.batch import CompletionBatch
from lit_rlhf.data.completions import number_column, read_columns, tokenize_completions
from lit_rlhf.models.policy import Policy


class RewardedBatch(NamedTuple):
    """Completions and their rewards (B,)."""

    completions: CompletionBatch
    rewards: Tensor


def collate_rewarded(batch: Any, policy: Policy, max_length: int, what: str) -> MicroBatch:
    """A batch with the columns ``completion``, ``reward`` and, unless whole texts are rewarded, ``prompt``.

    A term is a completion's token.

    Raises:
        UserError: a column is missing, a completion has no text, or a reward is no finite number.
    """
    columns = read_columns(batch, ("completion", "reward"), what, optional=("prompt",))
    texts = columns["completion"]
    completions = tokenize_completions(columns.get("prompt"), texts, "completion", policy, max_length)
    inputs = RewardedBatch(completions, number_column(batch, "reward", len(texts)))
    terms = int(completions.response_mask.sum())
    return MicroBatch(inputs, terms=terms, sequences=len(texts), tokens=completions.count)


def token_rewards(batch: RewardedBatch) -> Tensor:
    """(B, T) rewards of tokens: a completion's is that of its last token."""
    rewards = torch.zeros_like(batch.completions.response_mask, dtype=torch.float32)
    last = batch.completions.lengths.unsqueeze(1) - 1
    return rewards.scatter(1, last, batch.rewards.unsqueeze(1))
