"""What a run left in its `.wandb` file, for tests."""

from pathlib import Path
from typing import Any

import wandb

from lit_rlhf.loggers.wandb_file import items, records


class WandbFile:
    """What one run wrote: its history rows, config, artifacts, alerts, exit code and run record."""

    def __init__(self, path: Path) -> None:
        self.records = records(path)
        self.run = next(record.run for record in self.records if record.HasField("run"))
        self.history: list[dict[str, Any]] = [
            items(record.history.item) for record in self.records if record.HasField("history")
        ]
        self.config = items(self.run.config.update)
        for record in self.records:
            if record.HasField("config"):
                self.config |= items(record.config.update)
        artifacts = [record.artifact for record in self.records if record.HasField("artifact")]
        self.inputs = [artifact for artifact in artifacts if artifact.use_after_commit]
        self.outputs = [a for a in artifacts if not a.use_after_commit and a.type != "run_table"]
        self.alerts = {record.alert.title: record.alert.text for record in self.records if record.HasField("alert")}
        self.metrics = [record.metric for record in self.records if record.HasField("metric")]
        self.summary = {}
        for record in self.records:
            if record.HasField("summary"):
                self.summary |= items(record.summary.update)
        self.exit_code = next((r.exit.exit_code for r in self.records if r.HasField("exit")), None)


def runs(save_dir: Path) -> list[WandbFile]:
    """The runs under `<save_dir>/wandb`, oldest first."""
    wandb.teardown()  # finishing an offline run does not wait until the service has written its last records
    found = [WandbFile(path) for path in save_dir.glob("wandb/*run-*/*.wandb")]
    return sorted(found, key=lambda file: file.run.start_time.ToNanoseconds())  # folders' names count seconds only
