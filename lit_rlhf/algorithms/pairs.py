"""What the algorithms of preference pairs share: pairs as tokens, their log-probabilities, their metrics."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch
from lit_rlhf.batch import CompletionBatch
from lit_rlhf.data.completions import read_columns, tokenize_completions
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference


class PairBatch(NamedTuple):
    """B pairs of completions, each completion once however many pairs it is in.

    Attributes:
        completions: the different ones, (C,).
        chosen, rejected: (B,) which of them.
    """

    completions: CompletionBatch
    chosen: Tensor
    rejected: Tensor

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(C,) values of completions -> (B,) of the chosen and (B,) of the rejected ones."""
        return values[self.chosen], values[self.rejected]


def collate_pairs(batch: Any, policy: Policy, max_length: int, what: str) -> MicroBatch:
    """A batch of pairs as a PairBatch. A term is a pair.

    Columns: ``chosen`` and ``rejected``, texts (or chats' answers, lists of one message), and ``prompt``, texts or
    chats. Without ``prompt`` whole texts are compared.

    Raises:
        UserError: a side is missing or has no text, or both sides are the same text.
    """
    columns = read_columns(batch, ("chosen", "rejected"), what, optional=("prompt",))
    prompts = columns.get("prompt")
    places: dict[str, int] = {}  # of a prompt with a completion among the different ones
    parts, chosen_rejected = [], []
    for side in ("chosen", "rejected"):
        new, rows = [], []
        for number, text in enumerate(columns[side]):
            key = repr((prompts and prompts[number], text))
            if key not in places:
                places[key] = len(places)
                new.append(number)
            rows.append(places[key])
        if new:
            parts.append(tokenize_completions(prompts, columns[side], side, policy, max_length, new))
        chosen_rejected.append(torch.tensor(rows))
    require_different(columns["chosen"], columns["rejected"])
    pairs, count = PairBatch(CompletionBatch.cat(parts), *chosen_rejected), len(columns["chosen"])
    each = pairs.completions.prompt_mask.sum(-1) + pairs.completions.response_mask.sum(-1)
    tokens = int(sum(side.sum() for side in pairs.sides(each)))  # as read, however often a completion occurs
    return MicroBatch(pairs, terms=count, sequences=2 * count, tokens=tokens)


def require_different(chosen: list[Any], rejected: list[Any]) -> None:
    """Raises UserError for a pair of equal texts: nobody can prefer one of them."""
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=True)):
        if one == other:
            raise UserError(f"sample {number} of the batch has the same text in 'chosen' and 'rejected': {one!r:.80}")


def sequence_logprobs(model: Policy | Reference, batch: CompletionBatch) -> Tensor:
    """(B,) log-probabilities of whole completions, sums over their tokens, in nats."""
    return torch.where(batch.response_mask, model(*batch.tokens).logprobs, 0.0).sum(-1)


def anchored_logprobs(policy: Policy, reference: Reference, pairs: PairBatch) -> tuple[Tensor, ...]:
    """Log-probabilities (B,) of the chosen and the rejected completions: the policy's two, then the reference's two."""
    with torch.no_grad():
        references = sequence_logprobs(reference, pairs.completions)
    return *pairs.sides(sequence_logprobs(policy, pairs.completions)), *pairs.sides(references)


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
