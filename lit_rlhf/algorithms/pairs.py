"""What the algorithms of preference pairs share: pairs as tokens, their log-probabilities, their metrics."""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch
from lit_rlhf.batch import CompletionBatch
from lit_rlhf.data.completions import read_columns, tokenize_completions
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference


def collate_pairs(batch: Any, policy: Policy, max_length: int, what: str) -> MicroBatch:
    """A batch of B pairs as 2 B completions, first all chosen ones, then all rejected ones. A term is a pair.

    Columns: ``chosen`` and ``rejected``, texts (or chats' answers, lists of one message), and ``prompt``, texts or
    chats. Without ``prompt`` whole texts are compared.

    Raises:
        UserError: a side is missing or has no text, or both sides are the same text.
    """
    columns = read_columns(batch, ("chosen", "rejected"), what, optional=("prompt",))
    chosen, rejected, prompts = columns["chosen"], columns["rejected"], columns.get("prompt")
    sides = [tokenize_completions(prompts, columns[side], side, policy, max_length) for side in ("chosen", "rejected")]
    require_different(chosen, rejected)
    pairs = CompletionBatch.cat(sides)
    return MicroBatch(pairs, terms=len(chosen), sequences=len(pairs), tokens=pairs.count)


def require_different(chosen: list[Any], rejected: list[Any]) -> None:
    """Raises UserError for a pair of equal texts: nobody can prefer one of them."""
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=True)):
        if one == other:
            raise UserError(f"sample {number} of the batch has the same text in 'chosen' and 'rejected': {one!r:.80}")


def sequence_logprobs(model: Policy | Reference, batch: CompletionBatch) -> Tensor:
    """(B,) log-probabilities of whole completions, sums over their tokens, in nats."""
    return torch.where(batch.response_mask, model(*batch.tokens).logprobs, 0.0).sum(-1)


def anchored_logprobs(policy: Policy, reference: Reference, pairs: CompletionBatch) -> tuple[Tensor, ...]:
    """Log-probabilities (B,) of the chosen and the rejected completions: the policy's two, then the reference's two."""
    with torch.no_grad():
        references = sequence_logprobs(reference, pairs)
    return *sequence_logprobs(policy, pairs).chunk(2), *references.chunk(2)


def pair_metrics(stats: dict[str, Tensor], chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The stats of a preference loss and the log-probabilities (B,) under the names of ``metrics.py``."""
    return {
        "rewards/chosen": stats["chosen_reward"],
        "rewards/rejected": stats["rejected_reward"],
        "rewards/margins": stats["margin"],
        "rewards/accuracies": stats["accuracy"],
        "logps/chosen": chosen.detach().mean(),
        "logps/rejected": rejected.detach().mean(),
    }
