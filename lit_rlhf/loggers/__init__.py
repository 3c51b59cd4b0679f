"""Where the metrics of a run go: metrics.csv in the run folder, TensorBoard, and Weights & Biases, one file each.

All take one row per iteration, `log_metrics(row, step=iteration)`, as Lightning's own do. All also have
`resume_from(iteration, step)`, which the algorithm calls when training starts: the iteration of the checkpoint it
continues from, -1 if none, and its optimiser steps. Those that can draw have `log_samples(rows, step)` and
`log_distributions(values, step)`, too.

Each is imported when it is first used: W&B alone takes half a second.
"""

from lit_rlhf.imports import lazily

_HOME = {"CSVLogger": "csv", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}
__all__ = ["CSVLogger", "TensorBoardLogger", "WandbLogger"]


__getattr__ = lazily(__name__, _HOME)
