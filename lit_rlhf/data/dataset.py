"""Prompts from files and from Hugging Face datasets."""

import glob
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Subset

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.data.base import PromptsData, Row
from lit_rlhf.data.prompts import prompt_problem
from lit_rlhf.errors import UserError

FORMATS = ("jsonl", "csv", "parquet", "hf")
#: Which arguments only one kind of format reads.
_HF_ONLY, _FILES_ONLY = ("split", "subset", "val_split"), ("val_path",)


class Table(NamedTuple):
    """The rows of one file or split.

    Attributes:
        name: the file, or the split of which dataset, for messages.
        rows: a list, or a dataset on disk.
        columns: the names in `rows`.
    """

    name: str
    rows: Sequence[Row]
    columns: list[str]


class DatasetPrompts(PromptsData):
    """Prompts in files or in a Hugging Face dataset. Batches: `prompt`, a list, and a list for each other column.

    A prompt is a text, or a chat: a list of messages `{"role": ..., "content": ...}`. Every prompt is checked once, at
    `setup`. Where nothing is held out, there is no validation.

    Args:
        format: `jsonl` (an object on every line), `csv` (with a header), `parquet`, or `hf`. All but `jsonl` need the
            package `datasets`, whose cache they share.
        path: a file, a glob pattern (`**` for folders in folders) or a list of those. With `hf` a dataset's name on the
            hub, a folder with such a dataset, or a folder that `save_to_disk` wrote.
        split: of the training prompts. `hf` only.
        subset: which configuration of the dataset; None where it has one. `hf` only.
        prompt_column: the column of the prompts; batches call it `prompt`.
        columns: names of the other columns that batches hold; None: all, but for another one called `prompt`.
        batch_size: prompts in a batch.
        shuffle: in training, a new order in every pass.
        limit: read only the first so many rows, of training and held-out prompts each, before any fraction is taken.
        val_path: files of the held-out prompts. Not with `hf`.
        val_split: the split of the held-out prompts. `hf` only.
        val_fraction: this share of the rows, at least one, is held out; between 0 and 1.
        seed: of the draw of those rows, which depends on nothing else but their number.

    Raises:
        UserError: a bad argument; at `setup`: `datasets` is not installed; a file, split or column that does not exist;
            a file without rows or one that cannot be read; a prompt that is empty or neither text nor chat.
    """

    def __init__(
        self,
        *,
        format: str,
        path: str | list[str],
        split: str | None = None,
        subset: str | None = None,
        prompt_column: str = "prompt",
        columns: list[str] | None = None,
        batch_size: int = 8,
        shuffle: bool = True,
        limit: int | None = None,
        val_path: str | list[str] | None = None,
        val_split: str | None = None,
        val_fraction: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle=shuffle)
        if format not in FORMATS:
            raise UserError(f"data.format={format!r}: there is no such format; choose from {', '.join(FORMATS)}")
        if format == "hf" and not isinstance(path, str):
            raise UserError(f"data.path={path!r}: must be the name or the folder of one dataset")
        given = {"split": split, "subset": subset, "val_split": val_split, "val_path": val_path}
        for name in _FILES_ONLY if format == "hf" else _HF_ONLY:
            if given[name] is not None:
                raise UserError(f"data.{name}={given[name]!r} is not read with data.format={format}; leave it null")
        held_out = {"val_path": val_path, "val_split": val_split, "val_fraction": val_fraction}
        if len(chosen := [f"data.{name}" for name, value in held_out.items() if value is not None]) > 1:
            raise UserError(f"{' and '.join(chosen)} both say what is held out; choose one")
        if columns is not None and (not isinstance(columns, list) or "prompt" in columns):
            raise UserError(f"data.columns={columns!r}: must be null or a list of names without 'prompt'")
        self.format = format
        self.path = path
        self.split = split
        self.subset = subset
        self.prompt_column = prompt_column
        self.columns = columns
        self.limit = None if limit is None else check_int("data.limit", limit, at_least=1)
        self.val_path = val_path
        self.val_split = val_split
        self.val_fraction = (
            None if val_fraction is None else check_number("data.val_fraction", val_fraction, above=0, below=1)
        )
        self.seed = check_int("data.seed", seed, at_least=0)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  (Lightning's signature)
        if self.train_rows:  # Lightning calls this for the first validation and again for the fit
            return
        train, held_out = self._read()
        self._passed_on = self._find_columns([*train, *held_out])
        rows = self._checked_rows(train)
        if self.val_fraction is None:
            self.train_rows, self.held_out_rows = rows, self._checked_rows(held_out)
        else:
            self.train_rows, self.held_out_rows = self._hold_out(rows, self.val_fraction)

    def collate(self, rows: list[Row]) -> dict[str, list[Any]]:
        columns = {name: [row.get(name) for row in rows] for name in self._passed_on}
        return {"prompt": [row[self.prompt_column] for row in rows], **columns}

    def _read(self) -> tuple[list[Table], list[Table]]:
        """The tables of the training prompts and of those held out."""
        if self.format == "hf":
            splits = load_splits(self.path, self.subset)
            train = pick_split(splits, "data.split", self.split, self.path)
            if self.val_split is None:
                return [train], []
            return [train], [pick_split(splits, "data.val_split", self.val_split, self.path)]
        train = read_files(self.format, "data.path", self.path)
        return train, [] if self.val_path is None else read_files(self.format, "data.val_path", self.val_path)

    def _find_columns(self, tables: list[Table]) -> list[str]:
        """The names of the columns to pass on, which every table must have."""
        names, hint = self.columns, ""
        if names is None:
            hint = " (data.columns=null passes on every column; name those that all have)"
            every = dict.fromkeys(name for table in tables for name in table.columns)
            names = [name for name in every if name not in (self.prompt_column, "prompt")]
        for table in tables:
            has = f"it has {', '.join(table.columns)}"
            if self.prompt_column not in table.columns:
                raise UserError(f"data.prompt_column={self.prompt_column}: {table.name} has no such column; {has}")
            if missing := [name for name in names if name not in table.columns]:
                raise UserError(f"data.columns: {table.name} has no column {missing[0]!r}; {has}{hint}")
        return names

    def _checked_rows(self, tables: list[Table]) -> Sequence[Row]:
        """The rows of all tables up to the limit."""
        parts = []
        for table in tables:
            left = len(table.rows) if self.limit is None else self.limit - sum(map(len, parts))
            parts.append(Subset(table.rows, range(min(left, len(table.rows)))))
            for number, row in enumerate(islice(table.rows, len(parts[-1])), start=1):
                if problem := prompt_problem(row.get(self.prompt_column)):
                    raise UserError(
                        f"data.prompt_column={self.prompt_column}: the prompt in row {number} of {table.name} {problem}"
                    )
        return ConcatDataset(parts) if parts else []

    def _hold_out(self, rows: Sequence[Row], fraction: float) -> tuple[Sequence[Row], Sequence[Row]]:
        count = max(1, round(fraction * len(rows)))
        if count == len(rows):
            raise UserError(f"data.val_fraction={fraction:g} of {len(rows)} rows leaves none to train on")
        held_out = set(random.Random(self.seed).sample(range(len(rows)), count))
        left = [number for number in range(len(rows)) if number not in held_out]
        return Subset(rows, left), Subset(rows, sorted(held_out))


def find_files(key: str, path: str | list[str]) -> list[Path]:
    """The files that ``path`` names; those of a pattern in the order of their names.

    Raises:
        UserError: there is none.
    """
    if not path or not isinstance(path, str | list) or not all(isinstance(pattern, str) for pattern in path):
        raise UserError(f"{key}={path!r}: must be a path or a list of paths")
    found: dict[Path, None] = {}
    for pattern in [path] if isinstance(path, str) else path:
        plain = Path(pattern).expanduser()
        if plain.is_dir():
            raise UserError(f"{key}={pattern} is a folder; name its files, for example {plain / '*'}")
        matches = [plain] if plain.is_file() else map(Path, sorted(glob.glob(str(plain), recursive=True)))
        if not (files := [match for match in matches if match.is_file()]):
            raise UserError(f"{key}={pattern}: there is no such file")
        found |= dict.fromkeys(files)
    return list(found)


def read_files(format: str, key: str, path: str | list[str]) -> list[Table]:
    """A table for each file.

    Raises:
        UserError: there is no file, or one has no rows or cannot be read.
    """
    tables = []
    for file in find_files(key, path):
        if not file.stat().st_size:
            raise UserError(f"{key}: {file} is empty")
        if format == "jsonl":
            rows = read_jsonl(file, key)
            columns = list(dict.fromkeys(name for row in rows for name in row))
        else:
            # Escaped, for `datasets` would take a name with brackets for a pattern
            rows = _load(f"{key}: {file}", format, data_files=glob.escape(str(file)), split="train")
            columns = rows.column_names
            if "__index_level_0__" in columns:  # to pandas, a field before the header's first is the row's name
                raise UserError(
                    f"{key}: the rows of {file} have more fields than its header; a text with a comma needs quotes"
                )
        if not len(rows):
            raise UserError(f"{key}: {file} has no rows")
        tables.append(Table(str(file), rows, columns))
    return tables


def read_jsonl(file: Path, key: str) -> list[Row]:
    """The objects of a JSON Lines file; blank lines are skipped.

    Not by `datasets`, which turns a text such as "2024-01-01" into a date, gives nested objects each other's keys, and
    does not tell the line of a mistake.

    Raises:
        UserError: a line is no JSON object; names it and the config ``key``.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{key}: {file}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{key}: {file}, line {number} is not a JSON object: {str(row)[:60]}")
        rows.append(row)
    return rows


def load_splits(path: str, subset: str | None) -> dict[str, Any]:
    """The splits of a dataset on the hub, of a folder with one, or of a folder that `save_to_disk` wrote.

    A dataset saved without splits is its own `train`.

    Raises:
        UserError: it cannot be loaded.
    """
    saved = [name for name in ("dataset_dict.json", "state.json") if (Path(path) / name).is_file()]
    if not saved:
        return _load(f"data.path={path}" + (f", data.subset={subset}" if subset else ""), path, subset)
    if subset is not None:
        raise UserError(f"data.subset={subset}: the folder {path} was written by save_to_disk, so it has no subsets")
    stored = _load(f"data.path={path}", path, from_disk=True)
    return stored if saved[0] == "dataset_dict.json" else {"train": stored}


def pick_split(splits: dict[str, Any], key: str, split: str | None, path: str) -> Table:
    """One of the splits.

    Raises:
        UserError: there is no such split.
    """
    if split not in splits:
        raise UserError(f"{key}={split}: {path} has no such split; choose from {', '.join(splits)}")
    return Table(f"{path}, split {split}", splits[split], splits[split].column_names)


def _load(what: str, *arguments: Any, from_disk: bool = False, **options: Any) -> Any:
    """Calls `datasets`; ``what`` was to be loaded, for messages."""
    try:
        import datasets  # here, because it takes a second and not everybody has it
    except ImportError as error:
        raise UserError(
            f"{what} needs the package `datasets`, which is not installed: pip install 'lit-rlhf[data]'"
        ) from error
    load = datasets.load_from_disk if from_disk else datasets.load_dataset
    try:
        with _silent(datasets):
            return load(*arguments, **options)
    except Exception as error:
        # The outer error then says no more than that there is one.
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        if "corresponds to no data" in str(reason):  # what it says of a header without rows
            raise UserError(f"{what} has no rows") from error
        raise UserError(f"{what} cannot be loaded: {' '.join(str(reason or error).split())}") from error


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """No progress bars, and errors once, as exceptions."""
    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()
