"""Prompts written into a config, and what a prompt must be."""

from typing import Any

from lit_rlhf.checks import check_int
from lit_rlhf.data.base import PromptsData
from lit_rlhf.data.text_files import text_problem
from lit_rlhf.errors import UserError

Message = dict[str, str]


class ListPrompts(PromptsData):
    """A list of prompts, as texts or as chats. Batches: `prompt`, a list, and a list for each other column.

    Validation and test serve the last `val_count` prompts, in the order given, or without any all of them.

    Args:
        prompts: texts, or chats: lists of messages `{"role": ..., "content": ...}`.
        batch_size: prompts in a batch.
        columns: further columns for the reward, each as long as `prompts`.
        val_count: prompts for validation and test, which are then no training prompts; fewer than there are.
        shuffle: in training, a new order in every pass.

    Raises:
        UserError: no prompts, an empty one, texts mixed with chats, a broken message, a column of another length, no
            prompt left for training.

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
        val_count: int = 0,
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
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        if check_int("data.val_count", val_count, at_least=0) >= len(rows):
            raise UserError(f"data.val_count={val_count} leaves none of the {len(rows)} prompts for training")
        self.train_rows = rows[: len(rows) - val_count]
        self.held_out_rows = rows[-val_count:]  # of 0, all


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


def as_lines(prompt: Any) -> str:
    """A prompt for people: of a chat a line for each message.

    >>> as_lines([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    'user: Hi\\nassistant: Yes?'
    """
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _text_problem(text: str) -> str | None:
    problem = text_problem(text)
    return problem and f"has {problem}"
