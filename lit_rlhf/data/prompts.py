"""Prompts written into a config."""

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_rlhf.data.base import require_positive
from lit_rlhf.errors import UserError

Message = dict[str, str]


class ListPrompts(LightningDataModule):
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
        super().__init__()
        require_positive(batch_size=batch_size)
        if not isinstance(prompts, list) or not prompts:
            raise UserError(f"prompts={prompts!r}: must be a list of at least one prompt")
        kind = type(prompts[0])
        for number, prompt in enumerate(prompts):
            _check_prompt(prompt, number)
            if type(prompt) is not kind:
                raise UserError(f"prompt {number} is a {type(prompt).__name__}, prompt 0 a {kind.__name__}")
        for name, column in (columns or {}).items():
            if name == "prompt":
                raise UserError("a column cannot be called 'prompt'")
            if len(column) != len(prompts):
                raise UserError(f"the column {name!r} has {len(column)} entries for {len(prompts)} prompts")
        self.batch_size = batch_size
        self.shuffle = shuffle
        table = {"prompt": prompts, **(columns or {})}
        self.rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]

    def train_dataloader(self) -> DataLoader:
        return self._loader(shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return self._loader(shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader(shuffle=False)

    def _loader(self, *, shuffle: bool) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=shuffle, collate_fn=_lists)


def _lists(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _check_prompt(prompt: Any, number: int) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty")
    elif not isinstance(prompt, list) or not prompt:
        raise UserError(f"prompt {number} is neither a text nor a list of messages: {prompt!r}")
    else:
        for message in prompt:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UserError(f"prompt {number} has a message without role and content: {message!r}")
