"""The files of a run folder that hold numbers and text: how they are read, cut and replaced.

A reader never sees half a file: what is rewritten goes to a temporary file first, which is then renamed. A last
line without a newline, which a kill cut short, does not count.
"""

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.metrics import lookup

METRICS, SAMPLES, SUMMARY, CONFIG = "metrics.csv", "samples.jsonl", "summary.json", "config.yaml"
EVALUATION = "evaluation.json"  # of `lit-rlhf eval`
ALARMS = "alarms.jsonl"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, the file or folder ``path`` is written.

    Raises:
        UserError: the system refuses, say because the disk is full; the path is named.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise UserError(f"{path} cannot be written: {os.strerror(number)}") from error


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of what went wrong; libraries wrap it in errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # those in Rust, such as safetensors
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


def sync(path: Path) -> None:
    """Brings a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_rows(folders: Iterable[str | Path | None]) -> None:
    """Brings the rows, samples and alarms in run folders to the disk.

    Raises:
        UserError: the system refuses.
    """
    for path in (Path(folder) / name for folder in folders if folder for name in (METRICS, SAMPLES, ALARMS)):
        if path.exists():
            with writing(path):
                sync(path)
                sync(path.parent)


def replace_file(path: Path, text: str) -> None:
    """Replaces a file atomically. A lone surrogate, which UTF-8 cannot hold, becomes '?'.

    Raises:
        UserError: it cannot be written, say because the disk is full; the old one stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8", errors="replace", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _text(path: Path, *, lines: bool = False) -> str:
    try:
        content = path.read_bytes()
        # A kill can cut the last line within a character.
        return (content[: content.rfind(b"\n") + 1] if lines else content).decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a text file, without their newlines; none if there is no such file."""
    # Not splitlines(): a completion may hold U+2028, which JSON leaves as it is.
    return _text(path, lines=True).split("\n")[:-1]


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a metrics.csv and its rows as text, blanks left out."""
    lines = whole_lines(path)
    if not lines:
        return [], []
    try:
        columns, *records = csv.reader(lines)
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: {error}") from None
    rows = []
    for number, record in enumerate(records, start=2):
        if len(record) != len(columns):
            raise UserError(f"{path}, line {number}: {len(record)} fields, but {len(columns)} in the header.")
        rows.append({name: value for name, value in zip(columns, record, strict=True) if value != ""})
    return columns, rows


def format_rows(columns: list[str], rows: list[dict[str, str]], *, header: bool) -> str:
    """Rows as CSV, blank where a row lacks a column."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if header:
        writer.writerow(columns)
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return buffer.getvalue()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv by iteration, each with the metrics it has.

    Several rows of one iteration become one; a later value of a metric replaces an earlier one.

    Raises:
        UserError: the file cannot be read or holds something that is not a number.
    """
    path = run_dir / METRICS
    joined: dict[float, dict[str, float]] = {}
    for number, row in enumerate(read_rows(path)[1], start=2):
        try:
            values = {name: _number(value) for name, value in row.items()}
            joined.setdefault(values["iteration"], {}).update(values)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}, line {number}: not a row of numbers with its iteration: {error}") from None
    return [joined[iteration] for iteration in sorted(joined)]


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's samples.jsonl in order.

    Raises:
        UserError: a line is not a JSON object with its iteration.
    """
    return _objects(run_dir / SAMPLES)


def read_alarms(run_dir: Path) -> list[dict[str, Any]]:
    """The alarms of a run's reward-hacking monitor in order, as ``read_samples``."""
    return _objects(run_dir / ALARMS)


def _objects(path: Path, key: str = "iteration") -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(key), int):
            raise UserError(f"{path}, line {number} is not an object with an integer '{key}'.")
        rows.append(row)
    return rows


def read_summary(run_dir: Path) -> dict[str, Any]:
    """A run's summary.json; empty while it has none.

    Raises:
        UserError: it is not a JSON object.
    """
    path = run_dir / SUMMARY
    try:
        summary = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path} is not a JSON object.")
    return summary


def json_lines(rows: Iterable[Any]) -> str:
    """Rows as JSON Lines; what is not finite becomes null."""
    return "".join(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Appends rows to a file of JSON Lines. A lone surrogate, which UTF-8 cannot hold, becomes '?'.

    Raises:
        UserError: it cannot be written, say because the disk is full.
    """
    with writing(path), open(path, "a", encoding="utf-8", errors="replace", newline="") as file:
        for row in rows:
            file.write(json_lines([row]))


def cut_rows_after(path: Path, key: str, iteration: int) -> None:
    """Keeps the rows of a file of JSON Lines whose ``key`` is at most ``iteration``; without any, there is no file.

    Raises:
        UserError: a line is not a JSON object with an integer ``key``, or the file cannot be written.
    """
    rows = zip(whole_lines(path), _objects(path, key), strict=True)
    kept = [line for line, row in rows if row[key] <= iteration]
    if kept:
        replace_file(path, "".join(line + "\n" for line in kept))
    else:
        path.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_summary(run_dir: Path, **extra: float | str) -> dict[str, float | str]:
    """Writes and returns summary.json: the last value of every metric, its best value, and `extra`.

    `best/<metric>` exists where metrics.py names a better direction; it ignores values that are not finite. A
    last value that is not finite is written as the string "nan", "inf" or "-inf".
    """
    summary: dict[str, float | str] = {}
    for row in read_metrics(run_dir):
        summary |= row
        for name, value in row.items():
            better = better_direction(name) if math.isfinite(value) else None
            if better:
                pick = max if better == "higher" else min
                summary[f"best/{name}"] = pick(value, summary.get(f"best/{name}", value))
    summary |= extra
    for name, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            summary[name] = str(value)
    replace_file(run_dir / SUMMARY, json.dumps(summary, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return summary


def better_direction(name: str) -> str | None:
    """ "higher" or "lower" for a metric of which metrics.py says so."""
    try:
        return lookup(name).better
    except UserError:  # a metric of the user's own
        return None
