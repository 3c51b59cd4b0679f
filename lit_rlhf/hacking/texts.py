"""The texts that a reward model was trained on."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import lightning as L

from lit_rlhf.config import instantiate, read_config
from lit_rlhf.errors import UserError
from lit_rlhf.generators import seeded
from lit_rlhf.hacking.statistics import split_words
from lit_rlhf.run_folder import CONFIG

_COLUMNS = ("text", "chosen", "rejected", "prompt", "completion")
_MOST_TEXTS = 200_000


def read_texts(data: L.LightningDataModule | str) -> Iterator[list[str]]:
    """The words of every training text of a datamodule, or of the run in a folder, 200,000 texts at most.

    The global random generators stay as they are.

    Raises:
        UserError: no such run, or batches without a column of texts.
    """
    count = 0
    with seeded(0):
        module = data if isinstance(data, L.LightningDataModule) else _data_of(data)
        module.prepare_data()
        module.setup("fit")
        for batch in module.train_dataloader():
            columns = [batch[name] for name in _COLUMNS if name in batch] if isinstance(batch, Mapping) else []
            texts = [text for column in columns for text in column if isinstance(text, str)]
            if not texts:
                raise UserError(f"data={data!r}: its batches have no texts under {', '.join(_COLUMNS)}")
            count += len(texts)
            yield from map(split_words, texts)
            if count >= _MOST_TEXTS:
                return


def _data_of(folder: str) -> L.LightningDataModule:
    """The datamodule that a run's config.yaml describes."""
    return instantiate(read_config(config_of(folder).parent, needs=("data",)).data, "data")


def config_of(folder: str) -> Path:
    """The config.yaml of a run's folder, or of that whose ``model/`` it is.

    Raises:
        UserError: there is none.
    """
    path = Path(folder) / CONFIG
    path = path if path.is_file() else Path(folder).parent / CONFIG
    if not path.is_file():
        raise UserError(f"data={folder!r} is neither a datamodule nor a run folder with {CONFIG}, nor its model/")
    return path
