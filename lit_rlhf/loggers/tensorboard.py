"""TensorBoard's event files, without what a resumed run takes back."""

import html
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

_FOLDER = "tensorboard"
_COLUMNS = ("split", "prompt", "completion", "score", "kl", "length")
#: Markdown's marks as characters that stand for themselves.
_PLAIN = str.maketrans({mark: f"&#{ord(mark)};" for mark in "\\`*_{}[]()#+-!|~"})


class TensorBoardLogger(LightningTensorBoardLogger):
    """TensorBoard, in `<save_dir>/tensorboard`: every metric over the iterations, histograms, and samples as text.

    A run that continues from a checkpoint tells TensorBoard to forget what was logged after it, so that no step has
    two values; the event files themselves are only added to.

    Args:
        save_dir: the run folder.

    Raises:
        ModuleNotFoundError: neither tensorboard nor tensorboardX is installed.
    """

    def __init__(self, *, save_dir: str | Path) -> None:
        super().__init__(save_dir=save_dir, name=_FOLDER, version="", default_hp_metric=False)
        self._written = any(Path(save_dir, _FOLDER).glob("*tfevents*"))
        self._params: dict[str, Any] | Namespace | None = None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Notes the resolved configuration."""
        self._params = params
        super().log_hyperparams(params, *args, **kwargs)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs one row. `step` is the iteration."""
        self._written = True
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Shows completions, dicts as in samples.jsonl, as a table of text. `step` is the iteration."""
        lines = [" | ".join(_COLUMNS), "|".join("---" for _ in _COLUMNS)]
        lines += [" | ".join(_cell(row.get(name, "")) for name in _COLUMNS) for row in rows]
        self.experiment.add_text("samples", "\n".join(f"|{line}|" for line in lines), global_step=step)

    @rank_zero_only
    def log_distributions(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Logs each as the histogram `distribution/<name>`; what is not finite is left out. `step` is the iteration."""
        for name, numbers in values.items():
            if kept := [x for x in numbers if math.isfinite(x)]:
                self.experiment.add_histogram(f"distribution/{name}", torch.tensor(kept), global_step=step)

    @rank_zero_only
    def resume_from(self, iteration: int, step: int = 0) -> None:  # noqa: ARG002
        """Takes back what was logged after `iteration`; -1 takes back all."""
        if not self._written:
            return
        writer = self.experiment
        writer.close()
        writer.purge_step = iteration + 1  # the next event begins a new file, with this at its head
        if self._params is not None:
            super().log_hyperparams(self._params)


def _cell(value: Any) -> str:
    """A value for a cell of a Markdown table, whatever is written in it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value).encode("utf-8", "replace").decode()
    return " ".join(html.escape(text, quote=False).translate(_PLAIN).split())
