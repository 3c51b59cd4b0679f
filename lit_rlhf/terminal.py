"""What a command prints besides progress: the config as a tree, the result of a pipeline as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.tree import Tree

from lit_rlhf.run_folder import SUMMARY, read_metrics

#: Validation metrics worth a line in the final table, in this order; ``gold/`` and ``reward/`` stand for any component.
_SHOWN = (
    "sft/perplexity", "sft/token_accuracy", "reward_model/accuracy", "reward_model/loss", "objective/scores", "gold/",
    "objective/kl", "rollout/response_length", "rollout/eos_rate",
)  # fmt: skip


def print_config(config: dict[str, Any], console: Console | None = None) -> None:
    """Prints a resolved config, one branch per group."""
    tree = Tree("config", guide_style="dim")
    for key, value in config.items():
        nested = isinstance(value, dict) and bool(value)
        branch = tree.add(key if nested else f"{key}: {json.dumps(value, default=str)}")
        if nested:
            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip()
            branch.add(Syntax(text, "yaml", background_color="default", word_wrap=True))
    (console or Console()).print(tree)


def print_result(folder: Path, stages: Sequence[str], console: Console | None = None) -> None:
    """Prints a pipeline's held-out metrics, first and last measured, with each stage's time and memory."""
    table = Table("stage", "on held-out data", "first", "last", title=str(folder))
    for column in (2, 3):
        table.columns[column].justify = "right"
    for stage in stages:
        summary = json.loads((folder / stage / SUMMARY).read_text())
        rows = [row for row in read_metrics(folder / stage) if any(name.startswith("val/") for name in row)]
        names = [name for shown in _SHOWN for name in rows[-1] if name.startswith(f"val/{shown}")] if rows else []
        for number, name in enumerate(names):
            first = f"{rows[0][name]:.3f}" if len(rows) > 1 and name in rows[0] else ""
            label = stage if number == 0 else ""
            table.add_row(label, name.removeprefix("val/"), first, f"{rows[-1][name]:.3f}")
        table.add_row("", "seconds", "", f"{summary['wall_seconds']:.0f}")
        table.add_row("", "peak memory, GB", "", f"{summary['peak_memory_gb']:.2f}", end_section=True)
    (console or Console()).print(table)
