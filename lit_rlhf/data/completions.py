"""From a datamodule's batch to completions as tokens, for the algorithms that learn from what others wrote."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lit_rlhf.batch import CompletionBatch
from lit_rlhf.data.tokenize import is_transposed, prompt_ids
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy


def read_columns(batch: Any, needed: Sequence[str], what: str, optional: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The columns of a batch that are ``needed``, and those that are ``optional`` and there, as lists of one length.

    Raises:
        UserError: it is no dict, lacks a column, or its columns differ in length. ``what`` names who asks.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"the dataloader yields {type(batch).__name__}; a batch for {what} is a dict of columns")
    if missing := [name for name in needed if name not in batch]:
        names = " and ".join(f"'{name}'" for name in missing)
        raise UserError(f"a batch for {what} needs the column {names}; this one has {sorted(map(str, batch))}")
    found = {}
    for name in (*needed, *(name for name in optional if name in batch)):
        column = batch[name]
        if is_transposed(column):
            raise UserError(
                f"column '{name}' of the batch holds chats that the default collate function of a DataLoader has "
                "turned inside out; give it collate_fn=lambda rows: {k: [row[k] for row in rows] for k in rows[0]}"
            )
        if isinstance(column, str) or not hasattr(column, "__len__") or len(column) == 0:
            raise UserError(f"column '{name}' of the batch must be a list, a value a row, got {column!r:.80}")
        found[name] = column.tolist() if isinstance(column, Tensor) else list(column)
    sizes = {name: len(column) for name, column in found.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"the columns of a batch for {what} differ in length: {sizes}")
    return found


def number_column(batch: Mapping[str, Any], column: str, count: int) -> Tensor:
    """A column of the batch as fp32 (B,).

    Raises:
        UserError: it is no column of ``count`` finite numbers.
    """
    if isinstance(batch[column], list | tuple) and None in batch[column]:
        raise UserError(f"sample {list(batch[column]).index(None)} of the batch has no '{column}'")
    try:
        values = torch.as_tensor(batch[column], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"column '{column}' of the batch is not numbers: {error}") from error
    if values.shape != (count,):
        raise UserError(f"column '{column}' of the batch has the shape {tuple(values.shape)} for {count} rows")
    if not values.isfinite().all():
        number = int((~values.isfinite()).nonzero()[0])
        raise UserError(f"column '{column}' of the batch is {values[number]} at sample {number}")
    return values


def bool_column(batch: Mapping[str, Any], column: str) -> Tensor:
    """A column of the batch as bool (B,).

    Raises:
        UserError: a value is neither true nor false; a number is neither, for 0 and 1 may be the ends of a scale.
    """
    values = batch[column].tolist() if isinstance(batch[column], Tensor) else list(batch[column])
    for number, value in enumerate(values):
        if not isinstance(value, bool):
            raise UserError(f"column '{column}' of the batch must be true or false, got {value!r} at sample {number}")
    return torch.tensor(values, dtype=torch.bool)


def check_max_length(max_length: int | None, policy: Policy) -> int:
    """``algorithm.max_length``, or the policy's context in its place.

    Raises:
        UserError: it is not within the context, or the tokenizer has no end of sequence to append.
    """
    context = policy.context_length or sys.maxsize
    if max_length is not None and not 2 <= max_length <= context:
        raise UserError(
            f"algorithm.max_length={max_length} must be at least 2 and at most the policy's context of {context}"
        )
    if policy.tokenizer.eos_token_id is None:
        raise UserError("every text is ended with the tokenizer's end of sequence, but this tokenizer has none")
    return max_length or context


def encode(
    number: int, prompt: Any, text: Any, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], int]:
    """Token ids of a prompt with its completion and the end of sequence, and how many of them are prompt.

    The two are tokenised apart, as in a rollout. What is longer than ``max_length`` loses its end, the end of sequence
    included. ``number`` and ``column`` are named in messages.

    Raises:
        UserError: no text, or a prompt that leaves no room for one.
    """
    text = answer_text(text)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"sample {number} of the batch has no text in '{column}': {text!r:.80}")
    opening = [] if prompt is None else prompt_ids(prompt, tokenizer)
    ids = opening + tokenizer(text, add_special_tokens=prompt is None)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    if len(opening) >= max_length:
        raise UserError(
            f"sample {number} of the batch: its prompt has {len(opening)} tokens, which leaves none of "
            f"algorithm.max_length={max_length} for the completion: {str(prompt)[:80]!r}"
        )
    return ids[:max_length], len(opening)


def answer_text(completion: Any) -> Any:
    """A completion as text: of a chat's answer, a list of one message, its content; anything else as it is.

    >>> answer_text("Yes."), answer_text([{"role": "assistant", "content": "Yes."}])
    ('Yes.', 'Yes.')
    """
    one = isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], Mapping)
    return completion[0].get("content") if one else completion


def tokenize_completions(
    prompts: Sequence[Any] | None,
    texts: Sequence[Any],
    column: str,
    policy: Policy,
    max_length: int,
    rows: Sequence[int] | None = None,
) -> CompletionBatch:
    """Completions of prompts as tokens. Without prompts, a text's first token takes its place: nothing precedes it.

    ``rows`` chooses some of the samples; None takes all.

    Raises:
        UserError: see ``encode``.
    """
    tokenizer = policy.tokenizer
    before, after = [], []
    for number in range(len(texts)) if rows is None else rows:
        prompt = None if prompts is None else prompts[number]
        ids, count = encode(number, prompt, texts[number], column, tokenizer, max_length)
        tokens, start = torch.tensor(ids), max(count, 1)
        before.append(tokens[:start])
        after.append(tokens[start:])
    return CompletionBatch(
        prompt_ids=pad_sequence(before, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left"),
        prompt_mask=_mask(before, "left"),
        response_ids=pad_sequence(after, batch_first=True, padding_value=tokenizer.pad_token_id),
        response_mask=_mask(after, "right"),
    )


def _mask(rows: Sequence[Tensor], side: str) -> Tensor:
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return pad_sequence(ones, batch_first=True, padding_value=False, padding_side=side)
