"""Which text a reward looks at."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

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

    A conversation that is longer than the scorer reads loses its beginning, not its answer.

    Raises:
        UserError: the template refuses a conversation.
    """
    rows = scorer.tokenize(texts_to_score(prompts, completions, on))
    if on == "completion" or scorer.tokenizer.chat_template is None:
        return rows
    return [
        row if isinstance(prompt, str) else _conversation(scorer, prompt, completion)
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


def _conversation(scorer: Scorer, chat: Any, answer: str) -> Tensor:
    messages = [*chat, {"role": "assistant", "content": answer}]
    try:
        text = scorer.tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # of the template, which is code of the model's, in a sandbox
        raise UserError(
            f"the reward model's chat template fails on {messages!r:.80}: {type(error).__name__}: {error}"
        ) from error
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[-scorer.tokenizer.model_max_length :])


def check_scope(on: str, key: str = "reward.on") -> Scope:
    """``on``, the value of the config key ``key``, if it is a scope.

    Raises:
        UserError: it is not.
    """
    if on not in ("text", "completion"):
        raise UserError(f"{key}={on!r}: choose 'text' (the prompt with its completion) or 'completion'")
    return on
