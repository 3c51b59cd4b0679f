"""How well a policy predicts texts that others wrote."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_rlhf.data.completions import answer_text, encode
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.statistics import Interval, KeepingMetric, bootstrap
from lit_rlhf.models.policy import Policy

#: Tokens of one forward pass at most, unless a single text has more: each needs logits over the whole vocabulary.
TOKENS_AT_ONCE = 1024


class TextNats(NamedTuple):
    """What B documents cost a policy.

    Attributes:
        nats: (B,) minus the log-probability of a document's tokens, in double precision.
        tokens: (B,) how many those are.
        sizes: (B,) bytes of a document in UTF-8.
    """

    nats: Tensor
    tokens: Tensor
    sizes: Tensor


class Perplexities(NamedTuple):
    """How well texts are predicted, with 95 % intervals over documents.

    Attributes:
        perplexity: exp(nats / tokens) over all tokens of all documents.
        bits_per_byte: nats / ln 2 / bytes, which policies with other tokenizers can be compared by.
        documents: how many there were.
        tokens: how many were predicted.
    """

    perplexity: Interval
    bits_per_byte: Interval
    documents: int
    tokens: int


class Perplexity(KeepingMetric):
    """The perplexity of texts: every token counts alike, however long its document is.

    Intervals are bootstrapped over documents. ``text_nats`` measures what goes in.

    >>> metric = Perplexity()
    >>> metric.update(torch.tensor([6.0, 2.0]), torch.tensor([3, 1]), torch.tensor([10, 4]))
    >>> round(metric.compute().perplexity.value, 3)  # exp(8 / 4)
    7.389
    """

    higher_is_better = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for state in TextNats._fields:
            self.add_rows(state, torch.double)

    def update(self, nats: Tensor, tokens: Tensor, sizes: Tensor) -> None:
        """See ``TextNats``.

        Raises:
            UserError: the shapes differ, or a document has no token.
        """
        if not nats.shape == tokens.shape == sizes.shape or nats.ndim != 1:
            shapes = [tuple(x.shape) for x in (nats, tokens, sizes)]
            raise UserError(f"a perplexity is of nats, tokens and sizes (B,), all of the same B, got {shapes}")
        if (tokens < 1).any():
            raise UserError("a perplexity is of documents with at least one token each")
        for state, values in zip(TextNats._fields, (nats, tokens, sizes), strict=True):
            self.keep(state, values)

    def compute(self) -> Perplexities:
        rows = torch.stack([self.kept(state) for state in TextNats._fields], dim=1)
        return Perplexities(
            bootstrap(rows, lambda rows, weights: ((weights @ rows[:, 0]) / (weights @ rows[:, 1])).exp()),
            bootstrap(rows, lambda rows, weights: (weights @ rows[:, 0]) / (weights @ rows[:, 2]) / math.log(2)),
            len(rows),
            int(rows[:, 1].sum()),
        )


def text_rows(batch: Any) -> list[tuple[Any, str]]:
    """(prompt or None, text) of every row of a batch with ``text``, or with ``prompt`` and ``completion``.

    Raises:
        UserError: it has neither, or its columns differ in length.
    """
    names = batch.keys() if hasattr(batch, "keys") else set()
    if "text" not in names and not {"prompt", "completion"} <= names:
        raise UserError(
            f"a batch of texts needs 'text', or 'prompt' and 'completion'; this one has {sorted(map(str, names))}"
        )
    texts = [answer_text(text) for text in batch["text" if "text" in names else "completion"]]
    prompts = [None] * len(texts) if "text" in names else list(batch["prompt"])
    if len(prompts) != len(texts):
        raise UserError(f"a batch of texts has {len(prompts)} prompts for {len(texts)} completions")
    return list(zip(prompts, texts, strict=True))


@torch.no_grad()
def text_nats(policy: Policy, rows: Sequence[tuple[Any, str]]) -> TextNats:
    """What (prompt or None, text) rows cost a policy: minus the log-probability of the texts, end of sequence included.

    As in SFT, a text's first token is no target unless a prompt precedes it. What is longer than the policy's context
    is read in pieces that overlap by half, and each token counts once.

    Raises:
        UserError: an empty text, or a prompt that fills the context.
    """
    context = policy.context_length or sys.maxsize
    pieces: list[tuple[int, Tensor, int]] = []  # document, tokens, how many of them only precede
    for number, (prompt, text) in enumerate(rows):
        ids, before = encode(number, prompt, text, "text", policy.tokenizer, sys.maxsize)
        if before >= context:
            raise UserError(f"text {number}: its prompt has {before} tokens, and the policy's context is {context}")
        pieces += [(number, piece, first) for piece, first in _pieces(torch.tensor(ids), max(before, 1), context)]
    nats, tokens = torch.zeros(len(rows), dtype=torch.double), torch.zeros(len(rows), dtype=torch.long)
    training = policy.training
    policy.eval()
    for part in _batches(pieces):
        before = [ids[:first] for _, ids, first in part]
        after = [ids[first:] for _, ids, first in part]
        pad, device = policy.tokenizer.pad_token_id, next(policy.parameters()).device
        prompt_ids = pad_sequence(before, batch_first=True, padding_value=pad, padding_side="left")
        prompt_mask = pad_sequence([torch.ones_like(x).bool() for x in before], batch_first=True, padding_side="left")
        response_ids = pad_sequence(after, batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones_like(x).bool() for x in after], batch_first=True)
        inputs = (x.to(device) for x in (prompt_ids, prompt_mask, response_ids, mask))
        logprobs = policy(*inputs).logprobs.double().cpu()
        documents = torch.tensor([number for number, _, _ in part])
        nats.index_add_(0, documents, -torch.where(mask, logprobs, 0.0).sum(1))
        tokens.index_add_(0, documents, mask.sum(1))
    policy.train(training)
    return TextNats(nats, tokens, torch.tensor([len(text.encode("utf-8", errors="replace")) for _, text in rows]))


def _pieces(ids: Tensor, first: int, context: int) -> Iterator[tuple[Tensor, int]]:
    """Pieces of at most ``context`` tokens, and from which place on their tokens count; before ``first`` none does."""
    start = 0
    while first < len(ids):
        end = min(start + context, len(ids))
        yield ids[start:end], first - start
        first, start = end, end - context // 2


def _batches(pieces: list[tuple[int, Tensor, int]]) -> Iterator[list[tuple[int, Tensor, int]]]:
    """Pieces of similar length together."""
    part: list[tuple[int, Tensor, int]] = []
    for piece in sorted(pieces, key=lambda piece: len(piece[1])):
        if part and (len(part) + 1) * len(piece[1]) > TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(piece)
    if part:
        yield part
