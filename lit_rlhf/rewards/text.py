"""Which text a reward looks at."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf.data.tokenize import render_chat
from lit_rlhf.errors import UserError
from lit_rlhf.models.scorer import Scorer

Scope = Literal["text", "completion"]


def texts_to_score(prompts: Sequence[Any], completions: Sequence[str], on: Scope) -> list[str]:
    """The prompt with its completion (``on="text"``), or the completion alone.

    A chat is not part of the text even with ``on="text"``: its roles have no agreed form outside a model's template.

    >>> texts_to_score(["A fine", [{"role": "user", "content": "Hi"}]], [" film.", "Hello."], "text")
    ['A fine film.', 'Hello.']
    """
    if on == "completion":
        return list(completions)
    return [p + c if isinstance(p, str) else c for p, c in zip(prompts, completions, strict=True)]


def tokens_to_score(scorer: Scorer, prompts: Sequence[Any], completions: Sequence[str], on: Scope) -> list[Tensor]:
    """The token ids of ``texts_to_score``; a chat is rendered with its answer by the scorer's template, if it has one.

    A conversation that is longer than the scorer reads loses its beginning, but for a special token that opens it.

    Raises:
        UserError: the template refuses a conversation.
    """
    rows = scorer.tokenize(texts_to_score(prompts, completions, on))
    if on == "completion" or not scorer.tokenizer.chat_template:
        return rows
    return [
        _conversation(scorer, prompt, completion, row) if _is_chat(prompt) else row
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def _conversation(scorer: Scorer, chat: list[Any], answer: str, alone: Tensor) -> Tensor:
    """``alone``, the answer's own tokens, is what counts if the template renders nothing."""
    tokenizer = scorer.tokenizer
    messages = [*chat, {"role": "assistant", "content": answer}]
    text = render_chat(messages, tokenizer, "reward model")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        return alone
    limit = tokenizer.model_max_length
    if len(ids) > limit > 1 and ids[0] in tokenizer.all_special_ids:  # what a classifier may read its score from
        return torch.tensor([ids[0], *ids[1 - limit :]])
    return torch.tensor(ids[-limit:])


def check_scope(on: str, key: str = "reward.on") -> Scope:
    """``on``, the value of the config key ``key``, if it is a scope.

    Raises:
        UserError: it is not.
    """
    if on not in ("text", "completion"):
        raise UserError(f"{key}={on!r}: choose 'text' (the prompt with its completion) or 'completion'")
    return on
