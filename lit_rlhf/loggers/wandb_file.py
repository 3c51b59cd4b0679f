"""Reads back what W&B recorded offline: the `.wandb` file of a run, for which wandb itself has no public reader.

Format: a 7-byte header, then LevelDB's log format: blocks of 32 KiB, in each of which records stand as
checksum (4 bytes), length (2), type (1), data; type 1 is a whole record, 2, 3, 4 are its first, middle and last part.
A block's last bytes are left empty when no record header fits. The header counts towards the first block.
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEAD = 32768, 7


def records(path: Path) -> list[Record]:
    """All whole records of a file, in order; a kill may have cut the last one short."""
    data, position, parts, found = path.read_bytes(), _HEAD, b"", []
    while position + _HEAD <= len(data):
        if _BLOCK - position % _BLOCK < _HEAD:
            position += _BLOCK - position % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + _HEAD + length > len(data):
            break
        parts += data[position + _HEAD : position + _HEAD + length]
        position += _HEAD + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def items(found: Iterable[Any]) -> dict[str, Any]:
    """The values of a record's items by name; those of nested keys are joined by a slash."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found}


@dataclass(frozen=True, kw_only=True)
class OfflineRun:
    """A run that was recorded offline.

    Attributes:
        folder: the run folder, above ``wandb/``.
        started: when, in nanoseconds since 1970; the names of W&B's folders count seconds only.
        id, name, group, job_type: as W&B would show them; "" where there is none.
        config: the resolved config.
        rows: what was logged, one row for every iteration, in order.
    """

    folder: Path
    started: int
    id: str
    name: str
    group: str
    job_type: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]


def read_offline_runs(folder: str | Path) -> list[OfflineRun]:
    """The runs recorded offline anywhere below a folder, the oldest first.

    A resumed run is the newest of its records, which holds the rows so far as well. Of rows of one iteration those of
    the last attempt count.
    """
    found = [run for path in Path(folder).rglob("wandb/offline-run-*/*.wandb") if (run := _read(path)) is not None]
    continued = {run.config.get("resumed_from") for run in found}
    return sorted((run for run in found if run.id not in continued), key=lambda run: run.started)


def _read(path: Path) -> OfflineRun | None:
    """The run of a file; None where it was killed before it had a name."""
    kept = records(path)
    run = next((record.run for record in kept if record.HasField("run")), None)
    if run is None:
        return None
    config = items(run.config.update)
    for record in kept:
        if record.HasField("config"):
            config |= items(record.config.update)
    logged = [items(record.history.item) for record in kept if record.HasField("history")]
    return OfflineRun(
        folder=path.parents[2], started=run.start_time.ToNanoseconds(), id=run.run_id, name=run.display_name,
        group=run.run_group, job_type=run.job_type, config=config, rows=by_iteration(logged),
    )  # fmt: skip


def by_iteration(logged: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged for each iteration as one row; of the attempts at an iteration only the last counts.

    >>> by_iteration([{"iteration": 1, "a": 1, "attempt": 1}, {"iteration": 1, "b": 2, "attempt": 1},
    ...               {"iteration": 1, "a": 9, "c": 9, "attempt": 0}, {"a": 9}])
    [{'iteration': 1, 'a': 1, 'attempt': 1, 'b': 2}]
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in sorted((row for row in logged if "iteration" in row), key=lambda row: row.get("attempt", 0)):
        before = rows.get(row["iteration"], {})
        later = row.get("attempt", 0) > before.get("attempt", 0)
        rows[row["iteration"]] = row if later else before | row
    return [rows[iteration] for iteration in sorted(rows)]
