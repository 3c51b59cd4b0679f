"""Prompts, completions and preferences from files and from Hugging Face datasets."""

import glob
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Subset

from lit_rlhf.checks import check_bool, check_int, check_number, check_text
from lit_rlhf.data.base import PromptsData, Row
from lit_rlhf.data.prompts import prompt_problem
from lit_rlhf.data.text_files import Line, infer, opened, read_csv, read_jsonl
from lit_rlhf.errors import UserError, printable

log = logging.getLogger(__name__)

FORMATS = ("jsonl", "csv", "parquet", "hf")
#: Which arguments only one kind of format reads.
_HF_ONLY, _FILES_ONLY = ("split", "subset", "val_split"), ("val_path",)
_EXAMPLES = 3  # of bad rows that were left out


def _number_problem(value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return None if number else f"must be a finite number, got {value!r:.80}"


def _bool_problem(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, got {value!r:.80}"


#: What `data.types` can ask of a column -> what keeps a value from being that, as the end of a sentence.
TYPES: dict[str, Callable[[Any], str | None]] = {
    "text": prompt_problem,
    "number": _number_problem,
    "bool": _bool_problem,
}


class Table(NamedTuple):
    """The good rows of one file or split.

    Attributes:
        name: the file, or the split of which dataset, for messages.
        rows: a list, or a dataset on disk.
        columns: the names in `rows`.
    """

    name: str
    rows: Sequence[Row]
    columns: list[str]


class BadRows:
    """What to do with rows that cannot be used: the first one ends the run, or all are left out and counted.

    Args:
        strict: whether the first one ends the run.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.count = 0
        self.examples: list[str] = []

    def add(self, message: str) -> None:
        """Raises UserError with the message if they are not to be left out."""
        if self.strict:
            raise UserError(f"{message}. Mend it, or leave bad rows out with data.strict=false")
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(message)

    def warn(self) -> None:
        """Says how many were left out, and which."""
        if self.count:
            more = "; ..." if self.count > len(self.examples) else ""
            log.warning("data.strict=false: left out %d bad rows: %s%s", self.count, "; ".join(self.examples), more)


class DatasetPrompts(PromptsData):
    """Prompts in files or in a Hugging Face dataset. Batches: `prompt`, a list, and a list for each other column.

    A prompt is a text, or a chat: a list of messages `{"role": ..., "content": ...}`. Every row is checked once, at
    `setup`. Where nothing is held out, there is no validation.

    Args:
        format: `jsonl` (an object on every line), `csv` (with a header; a column of numbers or of true and false
            becomes such, a blank None), `parquet`, or `hf`. The last two need the package `datasets`, whose cache they
            share. Files of the first two are read into memory.
        path: a file, a glob pattern (`**` for folders in folders) or a list of those. With `hf` a dataset's name on the
            hub, a folder with such a dataset, or a folder that `save_to_disk` wrote.
        split: of the training prompts. `hf` only.
        subset: which configuration of the dataset; None where it has one. `hf` only.
        prompt_column: the column of the prompts; batches call it `prompt`. None: there are no prompts, as in texts for
            SFT.
        columns: names of the other columns that batches hold; None: all, but for another one called `prompt`.
        batch_size: prompts in a batch.
        shuffle: in training, a new order in every pass.
        types: what the values of other columns must be, by their names: `text` (as a prompt: a chat, too, but never
            empty), `number` or `bool`; None: anything.
        strict: a row that cannot be used, or of the wrong type, ends the run. False: such rows are left out, and one
            warning says how many and which.
        limit: read only the first so many good rows, of training and held-out prompts each, before any fraction is
            taken.
        val_path: files of the held-out prompts. Not with `hf`.
        val_split: the split of the held-out prompts. `hf` only.
        val_fraction: this share of the rows, at least one, is held out; between 0 and 1.
        seed: of the draw of those rows, which depends on nothing else but their number.

    Raises:
        UserError: a bad argument; at `setup`: `datasets` is not installed; a file, split or column that does not exist;
            a file without rows or one that cannot be read; a bad row, or none that is good.
    """

    def __init__(
        self,
        *,
        format: str,
        path: str | list[str],
        split: str | None = None,
        subset: str | None = None,
        prompt_column: str | None = "prompt",
        columns: list[str] | None = None,
        types: dict[str, str] | None = None,
        strict: bool = True,
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
        self.prompt_column = None if prompt_column is None else check_text("data.prompt_column", prompt_column)
        self.columns = columns
        for name, kind in (types or {}).items():
            if kind not in TYPES:
                raise UserError(f"data.types.{name}={kind!r}: there is no such type; choose from {', '.join(TYPES)}")
        self.types = dict(types or {})
        self.strict = check_bool("data.strict", strict)
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
        bad = BadRows(self.strict)
        train, held_out = self._read(bad)
        self._passed_on = self._find_columns([*train, *held_out])
        bad.warn()
        rows = ConcatDataset([table.rows for table in train])
        if self.val_fraction is None:
            self.train_rows = rows
            self.held_out_rows = ConcatDataset([table.rows for table in held_out]) if held_out else []
        else:
            self.train_rows, self.held_out_rows = self._hold_out(rows, self.val_fraction)

    def collate(self, rows: list[Row]) -> dict[str, list[Any]]:
        columns = {name: [row.get(name) for row in rows] for name in self._passed_on}
        if self.prompt_column is None:
            return columns
        return {"prompt": [row[self.prompt_column] for row in rows], **columns}

    def _read(self, bad: BadRows) -> tuple[list[Table], list[Table]]:
        """The tables of the training prompts and of those held out."""
        if self.format == "hf":
            splits = load_splits(self.path, self.subset)
            train = [self._pick_split(splits, "data.split", self.split, bad)]
            if self.val_split is None:
                return train, []
            return train, [self._pick_split(splits, "data.val_split", self.val_split, bad)]
        train = self._read_files("data.path", self.path, bad)
        return train, [] if self.val_path is None else self._read_files("data.val_path", self.val_path, bad)

    def _pick_split(self, splits: Mapping[str, Any], key: str, split: str | None, bad: BadRows) -> Table:
        if split not in splits:
            raise UserError(f"{key}={split}: {self.path} has no such split; choose from {', '.join(splits)}")
        table = self._check_dataset(splits[split], key, f"{self.path}, split {split}", self.limit, bad)
        return require_rows(key, split, [table], bad)[0]

    def _read_files(self, key: str, path: str | list[str], bad: BadRows) -> list[Table]:
        """A table for each file, up to the limit."""
        tables: list[Table] = []
        for file in find_files(key, path):
            left = None if self.limit is None else self.limit - sum(len(table.rows) for table in tables)
            if left == 0:
                break
            tables.append(self._read_file(key, file, left, bad))
        return require_rows(key, path, tables, bad)

    def _read_file(self, key: str, file: Path, limit: int | None, bad: BadRows) -> Table:
        if self.format == "parquet":
            with opened(file, key, self.format):  # refuses what cannot be read
                pass
            # Escaped, for `datasets` would take a name with brackets for a pattern
            rows = _load(f"{key}: {file}", "parquet", data_files=glob.escape(str(file)), split="train")
            return self._check_dataset(rows, key, str(file), limit, bad)
        with opened(file, key, self.format) as stream:
            lines = read_jsonl(stream) if self.format == "jsonl" else read_csv(stream, key, file)
            if (first := next(lines, None)) is None:
                raise UserError(f"{key}: {file} has no rows")
            if self.format == "csv" and first.row is not None:
                self._require_prompts(str(file), list(first.row))
            found = self._good_rows(chain([first], lines), key, str(file), "line", limit, bad)
            rows = [row for _, row in found]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if self.format == "csv":
            texts = {self.prompt_column, *self.types}  # those with a type were converted row by row
            for name in set(columns) - texts:
                for row, value in zip(rows, infer([row[name] for row in rows]), strict=True):
                    row[name] = value
        return Table(str(file), rows, columns)

    def _check_dataset(self, rows: Any, key: str, name: str, limit: int | None, bad: BadRows) -> Table:
        """A table of `datasets`, without its bad rows."""
        if not len(rows):
            raise UserError(f"{key}: {name} has no rows")
        self._require_prompts(name, rows.column_names)
        lines = (Line(number, row) for number, row in enumerate(rows, start=1))
        kept = [number - 1 for number, _ in self._good_rows(lines, key, name, "row", limit, bad)]
        return Table(name, Subset(rows, kept), rows.column_names)

    def _require_prompts(self, name: str, columns: list[str]) -> None:
        if self.prompt_column is not None and self.prompt_column not in columns:
            has = f"it has {names(columns)}"
            raise UserError(f"data.prompt_column={self.prompt_column}: {name} has no such column; {has}")

    def _good_rows(
        self, lines: Iterator[Line], key: str, name: str, unit: str, limit: int | None, bad: BadRows
    ) -> Iterator[tuple[int, Row]]:
        """The rows that can be used, with their numbers, up to the limit."""
        count = 0
        for number, row, problem in lines:
            if problem := problem or self._problem(row):
                bad.add(f"{key}: {name}, {unit} {number}: {problem}")
                continue
            yield number, row
            count += 1
            if count == limit:
                return

    def _problem(self, row: Row) -> str | None:
        """What keeps a row from being used."""
        column = self.prompt_column
        if column is not None and column not in row:
            return f"no column {column!r} (data.prompt_column); it has {names(row) or 'none'}"
        if column is not None and (problem := prompt_problem(row[column])):
            return f"column {column!r} {problem}"
        for name, kind in self.types.items():
            if self.format == "csv" and name in row and kind != "text":
                row[name] = infer([row[name]])[0]
            if problem := TYPES[kind](row.get(name)):
                return f"column {name!r} {problem}"
        return None

    def _find_columns(self, tables: list[Table]) -> list[str]:
        """The names of the columns to pass on, which every table must have."""
        chosen, hint = self.columns, ""
        if chosen is None:
            hint = " (data.columns=null passes on every column; name those that all have)"
            every = dict.fromkeys(name for table in tables for name in table.columns)
            chosen = [name for name in every if name not in (self.prompt_column, "prompt")]
        for table in tables:
            if missing := [name for name in chosen if name not in table.columns]:
                has = f"it has {names(table.columns)}"
                raise UserError(f"data.columns: {table.name} has no column {missing[0]!r}; {has}{hint}")
        return chosen

    def _hold_out(self, rows: Sequence[Row], fraction: float) -> tuple[Sequence[Row], Sequence[Row]]:
        count = max(1, round(fraction * len(rows)))
        if count == len(rows):
            raise UserError(f"data.val_fraction={fraction:g} of {len(rows)} rows leaves none to train on")
        held_out = set(random.Random(self.seed).sample(range(len(rows)), count))
        left = [number for number in range(len(rows)) if number not in held_out]
        return Subset(rows, left), Subset(rows, sorted(held_out))


def names(columns: Iterable[str]) -> str:
    """The columns of a file for a message of one line, whatever they are called.

    >>> names(["prompt", "an\\nswer"])
    'prompt, an swer'
    """
    text = " ".join(printable(", ".join(columns)).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def require_rows(key: str, path: str | list[str] | None, tables: list[Table], bad: BadRows) -> list[Table]:
    """The tables that have rows; raises UserError if there is none."""
    if not (kept := [table for table in tables if len(table.rows)]):
        raise UserError(f"{key}={path}: no row is good: {'; '.join(bad.examples)}")
    return kept


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
