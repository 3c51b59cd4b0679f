"""Prompts written into a config, and what a prompt must be."""

from typing import Any

from lit_rlhf.data.base import PromptsData
from lit_rlhf.data.text_files import text_problem
from lit_rlhf.errors import UserError

Message = dict[str, str]


class ListPrompts(PromptsData):
    """A list of prompts, as texts or as chats. Batches: `prompt`, a list, and a list for each other column.

    Validation and test serve the same prompts in the order given.

    Args:
        prompts: texts, or chats: lists of messages `{"role": ..., "content": ...}`.
        batch_size: prompts in a batch.
        columns: further columns for the reward, each as long as `prompts`.
        shuffle: in training, a new order in every pass.

    Raises:
        UserError: no prompts, an empty one, texts mixed with chats, a broken message, a column of another length.

    Example:
        >>> data = ListPrompts(prompts=["2 + 2 =", "3 + 4 ="], columns={"answer": [4, 7]}, shuffle=False)
        >>> next(iter(data.train_dataloader()))
        {'prompt': ['2 + 2 =', '3 + 4 ='], 'answer': [4, 7]}
    """

    def __init__(
        self,
        *,
        prompts: list[str] | list[list[Message]],
        batch_size: int = 8,
        columns: dict[str, list[Any]] | None = None,
        shuffle: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle=shuffle)
        if not isinstance(prompts, list) or not prompts:
            raise UserError(f"data.prompts must be a list of at least one prompt, got {prompts!r}")
        kind = type(prompts[0])
        for number, prompt in enumerate(prompts):
            if problem := prompt_problem(prompt):
                raise UserError(f"data.prompts[{number}] {problem}")
            if type(prompt) is not kind:
                other = type(prompt).__name__
                raise UserError(f"data.prompts[{number}] is a {other}, data.prompts[0] a {kind.__name__}")
        for name, column in (columns or {}).items():
            if name == "prompt":
                raise UserError("data.columns.prompt: a column cannot be called 'prompt'")
            if not isinstance(column, list) or len(column) != len(prompts):
                entries = f"{len(column)} entries" if isinstance(column, list) else f"{column!r}, no list,"
                raise UserError(f"data.columns.{name} has {entries} for {len(prompts)} prompts")
        table = {"prompt": prompts, **(columns or {})}
        self.train_rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        self.held_out_rows = self.train_rows


def prompt_problem(prompt: Any) -> str | None:
    """What keeps ``prompt`` from being a text or a chat, as the end of a sentence; None if it is one.

    >>> prompt_problem("2 + 2 ="), prompt_problem(" "), prompt_problem([{"role": "user"}])
    (None, 'is empty', "has a message without role and content: {'role': 'user'}")
    """
    if isinstance(prompt, str):
        return _text_problem(prompt) if prompt.strip() else "is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"is neither a text nor a list of messages: {prompt!r}"
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"has a message without role and content: {message!r}"
    if not any(message["content"].strip() for message in prompt):
        return "is empty"
    return next(filter(None, (_text_problem(message["content"]) for message in prompt)), None)


def _text_problem(text: str) -> str | None:
    problem = text_problem(text)
    return problem and f"has {problem}"
