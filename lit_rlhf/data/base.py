"""What the datamodules share: rows are dicts, batches are dicts of columns."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_rlhf.checks import check_int
from lit_rlhf.data.human_ratings import HumanRatings
from lit_rlhf.errors import UserError

Row = dict[str, Any]


class RatingsData(LightningDataModule):
    """Base of the datamodules on the human ratings: fetches, and serves the rows that `make_rows` returns."""

    rows: dict[str, list[Row]]

    def __init__(self, domain: str, batch_size: int) -> None:
        super().__init__()
        require_positive(batch_size=batch_size)
        self.ratings = HumanRatings(domain)
        self.batch_size = batch_size

    def make_rows(self) -> dict[str, list[Row]]:
        """The rows of `train`, `validation` and `test`."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        self.ratings.prepare()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  (Lightning's signature)
        self.rows = self.make_rows()

    def train_dataloader(self) -> DataLoader:
        return row_loader(self.rows["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return row_loader(self.rows["validation"], self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return row_loader(self.rows["test"], self.batch_size)


class PromptsData(LightningDataModule):
    """Base of the datamodules of prompts: serves the rows that a subclass puts into `train_rows` and `held_out_rows`.

    Validation and test serve the held-out rows in their order; without any there is none.

    Args:
        batch_size: prompts in a batch.
        shuffle: in training, a new order in every pass.

    Raises:
        UserError: a bad argument.
    """

    def __init__(self, *, batch_size: int, shuffle: bool) -> None:
        super().__init__()
        self.batch_size = check_int("data.batch_size", batch_size, at_least=1)
        self.shuffle = shuffle
        self.train_rows: Sequence[Row] = []
        self.held_out_rows: Sequence[Row] = []

    def collate(self, rows: list[Row]) -> dict[str, list[Any]]:
        """A batch. Values stay as they are, so a column may hold anything."""
        return lists(rows)

    def train_dataloader(self) -> DataLoader:
        return row_loader(self.train_rows, self.batch_size, shuffle=self.shuffle, collate=self.collate)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return row_loader(self.held_out_rows, self.batch_size, collate=self.collate) if self.held_out_rows else []

    def test_dataloader(self) -> DataLoader | list[Any]:
        return self.val_dataloader()


def lists(rows: list[Row]) -> dict[str, list[Any]]:
    """A list for each key of the rows.

    >>> lists([{"prompt": "2 + 2 =", "answer": 4}, {"prompt": "3 + 4 =", "answer": 7}])
    {'prompt': ['2 + 2 =', '3 + 4 ='], 'answer': [4, 7]}
    """
    return {key: [row[key] for row in rows] for key in rows[0]}


def columns(rows: list[Row]) -> dict[str, Any]:
    """A column for each key of the rows: a list, or for floats an fp32 tensor (B,).

    >>> columns([{"text": "good", "mean": 2.5}, {"text": "bad", "mean": -2.0}])
    {'text': ['good', 'bad'], 'mean': tensor([ 2.5000, -2.0000])}
    """
    return {
        key: torch.tensor(column) if isinstance(column[0], float) else column for key, column in lists(rows).items()
    }


def row_loader(
    rows: Sequence[Row],
    batch_size: int,
    *,
    shuffle: bool = False,
    collate: Callable[[list[Row]], dict[str, Any]] = columns,
) -> DataLoader:
    """Batches of rows. Shuffles by the global generator, which the trainer seeds for each pass."""
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=collate)


def require_positive(**numbers: int) -> None:
    """Raises UserError unless each is a whole number of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{name}={number!r}: must be a whole number of at least 1")
