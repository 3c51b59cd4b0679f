"""JSON Lines and CSV, row by row: what is wrong with a file or a row is said with its line.

Not by the library `datasets`, which turns a text such as "2024-01-01" into a date and "NA" into nothing, gives nested
objects each other's keys, and does not tell the line of a mistake.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from lit_rlhf.errors import UserError

Row = dict[str, Any]

#: A line of more bytes (a quoted value of more characters) is a mistake: a quote left open, or no text at all.
LONGEST = 2**24
_OTHER_KINDS = {
    b"\x1f\x8b": "is compressed by gzip; decompress it first",
    b"PK\x03\x04": "is a zip archive, or a spreadsheet; extract it, or export it, first",
    b"PAR1": "is a Parquet file; read it with data=parquet",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
}
_LONG = f"longer than {LONGEST // 2**20} MB"


class Line(NamedTuple):
    """A row of a file, and the number of the line in which it begins.

    Attributes:
        number: counted from 1.
        row: None where the row is bad.
        problem: what is wrong with it.
    """

    number: int
    row: Row | None
    problem: str = ""


@contextmanager
def opened(file: Path, key: str, format: str) -> Iterator[BinaryIO]:
    """A file of a ``format`` to read, past the byte order mark.

    Raises:
        UserError: it cannot be read, is empty, or is of another kind; names the config ``key``.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(4)
            if not start:
                raise UserError(f"{key}: {file} is empty")
            for magic, problem in _OTHER_KINDS.items():
                if start.startswith(magic) and not (format == "parquet" and magic == b"PAR1"):
                    raise UserError(f"{key}: {file} {problem}")
            stream.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
            yield stream
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error.strerror}") from error


def read_jsonl(stream: BinaryIO) -> Iterator[Line]:
    """The objects of a JSON Lines file; blank lines are skipped."""
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST)
            yield Line(number, None, _LONG)
        elif line.strip():
            yield _object(number, line)


def _object(number: int, line: bytes) -> Line:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        return Line(number, None, f"not UTF-8: byte {line[error.start]:#04x} at position {error.start + 1}")
    except RecursionError:
        return Line(number, None, "nested too deeply")
    except ValueError as error:
        return Line(number, None, f"not JSON: {error}")
    if not isinstance(row, dict):
        return Line(number, None, f"not a JSON object: {str(row)[:60]}")
    if b"\\u" in line:
        for name, value in row.items():
            if problem := text_problem(json.dumps([name, value], ensure_ascii=False)):
                return Line(number, None, f"column {name!a} has {problem}")
    return Line(number, row)


def _without_repetition(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return row


def text_problem(text: str) -> str | None:
    """What keeps a text from being written as UTF-8; None if nothing does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character, {text[error.start]!r}, which no tokenizer reads"
    return None


def read_csv(stream: BinaryIO, key: str, file: Path) -> Iterator[Line]:
    """The rows of a CSV file by its header, all values as texts; blank lines, and columns without a name, are skipped.

    Raises:
        UserError: the header is bad; names ``key`` and ``file``.
    """
    lines = _Lines(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=""))
    records = _records(lines)
    first = next(records, None)
    if first is None:
        raise UserError(f"{key}: {file} has no rows")
    _, header, problem = first
    if header is not None and not problem:
        named = [name.strip() for name in header if name.strip()]
        twice = next((name for name in named if named.count(name) > 1), None)
        problem = "no names of columns" if not named else f"two columns are called {twice!r}" if twice else ""
    if problem:
        raise UserError(f"{key}: {file}, line {first[0]}, the header: {problem}")
    columns = [name.strip() for name in header]
    for number, record, problem in records:
        if not problem and len(record) != len(columns):
            problem = f"{len(record)} fields, and {len(columns)} in the header; a text with commas needs quotes"
        yield Line(number, None if problem else {n: v for n, v in zip(columns, record, strict=True) if n}, problem)


class _Lines:
    """The lines of a text file, none longer than ``LONGEST``, and how many were read."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.number = 0
        self.cut = False  # whether the last one was too long, and its end skipped

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.stream.readline(LONGEST + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.cut = rest = len(line) > LONGEST
        while rest and not line.endswith(("\n", "\r")):
            rest = line = self.stream.readline(LONGEST)
        return "" if self.cut else line


def _records(lines: _Lines) -> Iterator[tuple[int, list[str] | None, str]]:
    """(the first line's number, the fields, what is wrong with them) of every record that is not blank."""
    limit = csv.field_size_limit(LONGEST)
    try:
        reader = csv.reader(lines, strict=True)
        while True:
            start = lines.number + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                never_closed = "unexpected end" in str(error) or "field larger" in str(error)
                after = f"a quote that is not closed in the {lines.number - start} lines after it"
                yield start, None, after if never_closed else f"not CSV: {error}"
                continue
            if lines.cut:
                yield start, None, _LONG
            elif record:
                yield start, record, _fields_problem(record)
    finally:
        csv.field_size_limit(limit)


def _fields_problem(record: list[str]) -> str:
    text = "".join(record)
    if "\0" in text:
        return "a NUL byte"
    if escaped := re.search("[\udc80-\udcff]", text):
        return f"not UTF-8: byte {ord(escaped[0]) - 0xDC00:#04x}"
    return ""


def infer(values: list[str]) -> list[Any]:
    """The texts of a column as whole numbers, numbers or booleans, if all of them are; a blank one is None.

    >>> infer(["1", "", "-2"]), infer(["1", "0.5"]), infer(["true", "False"]), infer(["1", "x", ""])
    ([1, None, -2], [1.0, 0.5], [True, False], ['1', 'x', None])
    """
    given = [value for value in values if value != ""]
    for pattern, read in _READ:
        if given and all(pattern.fullmatch(value) for value in given):
            return [None if value == "" else read(value) for value in values]
    return [None if value == "" else value for value in values]


_READ = (
    (re.compile(r"[-+]?[0-9]{1,18}"), int),
    (re.compile(r"[-+]?([0-9]{1,300}\.?[0-9]{0,300}|\.[0-9]{1,300})([eE][-+]?[0-9]{1,2})?"), float),
    (re.compile(r"[Tt]rue|TRUE|[Ff]alse|FALSE"), lambda text: text.lower() == "true"),
)
