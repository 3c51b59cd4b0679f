"""Reads the records of a `.wandb` file back.

Format: a 7-byte header, then LevelDB's log format: blocks of 32 KiB, in each of which records stand as
checksum (4 bytes), length (2), type (1), data; type 1 is a whole record, 2, 3, 4 are its first, middle and last part.
A block's last bytes are left empty when no record header fits. The header counts towards the first block.
"""

import json
import struct
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32768, 7


def records(path: Path) -> list[Record]:
    data, position, parts, found = path.read_bytes(), HEAD, b"", []
    while position + HEAD <= len(data):
        if BLOCK - position % BLOCK < HEAD:
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + HEAD + length > len(data):
            break  # a kill cut it short
        parts += data[position + HEAD : position + HEAD + length]
        position += HEAD + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


class WandbFile:
    """What one run wrote: its history rows, config, artifacts, alerts, exit code and run record."""

    def __init__(self, path: Path) -> None:
        self.records = records(path)
        self.run = next(record.run for record in self.records if record.HasField("run"))
        self.history: list[dict[str, Any]] = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in self.records
            if record.HasField("history")
        ]
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        for record in self.records:
            if record.HasField("config"):
                for item in record.config.update:
                    self.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        artifacts = [record.artifact for record in self.records if record.HasField("artifact")]
        self.inputs = [artifact for artifact in artifacts if artifact.use_after_commit]
        self.outputs = [a for a in artifacts if not a.use_after_commit and a.type != "run_table"]
        self.alerts = {record.alert.title: record.alert.text for record in self.records if record.HasField("alert")}
        self.metrics = [record.metric for record in self.records if record.HasField("metric")]
        self.summary = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for record in self.records
            if record.HasField("summary")
            for item in record.summary.update
        }
        self.exit_code = next((r.exit.exit_code for r in self.records if r.HasField("exit")), None)


def runs(save_dir: Path) -> list[WandbFile]:
    """The runs under `<save_dir>/wandb`, oldest first."""
    wandb.teardown()  # finishing an offline run does not wait until the service has written its last records
    found = [WandbFile(path) for path in save_dir.glob("wandb/*run-*/*.wandb")]
    return sorted(found, key=lambda file: file.run.start_time.ToNanoseconds())  # folders' names count seconds only
