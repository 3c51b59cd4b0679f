"""Where the metrics of a run go: metrics.csv in the run folder, TensorBoard, and Weights & Biases, one file each.

All take one row per iteration, `log_metrics(row, step=iteration)`, as Lightning's own do. All also have
`resume_from(iteration)`, which the algorithm calls when training starts: the iteration of the checkpoint it continues
from, -1 if none. Those that can draw have `log_samples(rows, step)` and `log_distributions(values, step)`, too.
"""

from lit_rlhf.loggers.csv import CSVLogger
from lit_rlhf.loggers.tensorboard import TensorBoardLogger
from lit_rlhf.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "TensorBoardLogger", "WandbLogger"]
