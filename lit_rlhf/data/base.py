"""What the datamodules share: rows are dicts, batches are dicts of columns."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

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


def row_loader(rows: list[Row], batch_size: int, *, shuffle: bool = False) -> DataLoader:
    """Batches of rows as columns. Shuffles by the global generator, which the trainer seeds for each pass."""
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=columns)


def columns(rows: list[Row]) -> dict[str, Any]:
    """A column for each key of the rows: a list, or for floats an fp32 tensor (B,).

    >>> columns([{"text": "good", "mean": 2.5}, {"text": "bad", "mean": -2.0}])
    {'text': ['good', 'bad'], 'mean': tensor([ 2.5000, -2.0000])}
    """
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: torch.tensor(column) if isinstance(column[0], float) else column for key, column in batch.items()}


def require_positive(**numbers: int) -> None:
    """Raises UserError unless each is a whole number of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{name}={number!r}: must be a whole number of at least 1")
