"""Where the metrics of a run go: metrics.csv in the run folder, TensorBoard, and Weights & Biases, one file each.

All take one row per iteration, `log_metrics(row, step=iteration)`, as Lightning's own do. All also have
`resume_from(iteration)`, which the algorithm calls when training starts: the iteration of the checkpoint it continues
from, -1 if none. Those that can draw have `log_samples(rows, step)` and `log_distributions(values, step)`, too.

Each is imported when it is first used: W&B alone takes half a second.
"""

from importlib import import_module
from typing import Any

_HOME = {"CSVLogger": "csv", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}
__all__ = ["CSVLogger", "TensorBoardLogger", "WandbLogger"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lit_rlhf.loggers' has no attribute {name!r}")
    return getattr(import_module(f"lit_rlhf.loggers.{_HOME[name]}"), name)
