"""How far a run is: live bars on a terminal, plain lines anywhere else."""

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

#: what is shown of a row, in this order: label and metrics, of which the first present one counts
_SHOWN = (
    ("reward", ("objective/scores",)),
    ("kl", ("objective/kl",)),
    ("length", ("rollout/response_length",)),
    ("loss", ("loss/total", "reward_model/loss")),
    ("perplexity", ("sft/perplexity",)),
    ("accuracy", ("reward_model/accuracy", "sft/token_accuracy")),
    ("val reward", ("val/objective/scores",)),
    ("val kl", ("val/objective/kl",)),
    ("val perplexity", ("val/sft/perplexity",)),
    ("val accuracy", ("val/reward_model/accuracy", "val/sft/token_accuracy")),
)
_ONLY_OFFLINE = ("loss", "perplexity", "accuracy")

#: between two plain lines of an offline stage: at least this share of all steps, or this many seconds
_LINE_SHARE, _LINE_SECONDS = 0.05, 10.0


class Progress(ProgressBar):
    """Shows iterations with their reward and KL, and within an iteration its phase.

    On a terminal two live bars: iterations (of offline stages: optimiser steps), and the phase that runs now
    (rollout, score, anchor, update, validation). Elsewhere one plain line per iteration; offline stages, which
    log rows more often, get about twenty lines in all, more only when steps are slow.

    The algorithm calls `on_phase` during stages 1 to 5 and `on_row` with each row of metrics it logs; its
    attribute `online` says which kind it is.

    Args:
        label: what every line begins with, where several runs share a terminal; then there are lines alone.
    """

    def __init__(self, *, label: str | None = None) -> None:
        super().__init__()
        self.label = label
        self.console: Console | None = None  # made in setup; a test puts its own here
        self.is_enabled = True  # the name Lightning reads
        self._bars: Bars | None = None
        self._phase_name = ""
        self._first: tuple[float, float] | None = None  # time and count when training started
        self._last_line: tuple[float, float] = (-math.inf, -math.inf)  # time and count of the last plain line
        self._held: Mapping[str, float] | None = None  # the newest row, if it got no line

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`LightningModule.print`: above the bars."""
        self.console.print(*args, **kwargs)

    # --- what the algorithm and the trainer report ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.console = self.console or Console()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch if pl_module.online else trainer.global_step
        self._first = (time.monotonic(), done)
        self._start_bars(trainer)
        if self._bars:
            name = "iteration" if pl_module.online else "step"
            self._bars.update(self._main, description=name, total=_total(trainer, pl_module), completed=done)

    def on_row(self, trainer: Trainer, pl_module: LightningModule, row: Mapping[str, float]) -> None:
        """Called by the algorithm with each row that it logs."""
        if self._bars:
            left = self._remaining(time.monotonic(), row["iteration"], _total(trainer, pl_module))
            text = "  ".join(filter(None, [_row_text(row, pl_module.online), left]))
            self._bars.update(self._main, completed=row["iteration"], row=text)
        elif self.is_enabled:
            self._print_line(trainer, pl_module, row)

    def on_phase(self, trainer: Trainer, pl_module: LightningModule, phase: str, done: int, total: int | None) -> None:
        """Called by the algorithm: `done` of `total` parts of `phase` are complete."""
        del trainer, pl_module
        if not self._bars:
            return
        if phase != self._phase_name:
            self._phase_name = phase
            self._bars.reset(self._phase, description=phase, completed=done, total=total, visible=True)
        else:
            self._bars.update(self._phase, completed=done, total=total)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, _batch: Any, batch_idx: int) -> None:
        if pl_module.online:
            self.on_phase(trainer, pl_module, "update", batch_idx, _count(trainer.num_training_batches))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        _outputs: Any,
        _batch: Any,
        batch_idx: int,
    ) -> None:
        if pl_module.online:
            self.on_phase(trainer, pl_module, "update", batch_idx + 1, _count(trainer.num_training_batches))
        elif self._bars:
            self._bars.update(self._main, completed=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._held and self.is_enabled:
            self._print_line(trainer, pl_module, self._held, last=True)

    def on_validation_start(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        self._start_bars(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        _outputs: Any,
        _batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)
        total = _count(self.total_val_batches_current_dataloader)
        self.on_phase(trainer, pl_module, "validation", batch_idx + 1, total)

    def on_exception(self, *_: Any) -> None:
        self._stop_bars()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._stop_bars()

    # --- showing it ---

    def _start_bars(self, trainer: Trainer) -> None:
        if self._bars or not self.is_enabled or not self.console.is_terminal or self.label:
            return
        self._bars = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=5)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[row]}", table_column=Column(no_wrap=True)),
            console=self.console,
            refresh_per_second=4,
        )
        self._main = self._bars.add_task("", total=None, row="", visible=trainer.state.fn == TrainerFn.FITTING)
        self._phase = self._bars.add_task("", total=None, row="", visible=False)
        self._phase_name = ""
        self._bars.start()

    def _stop_bars(self) -> None:
        if self._bars:
            self._bars.update(self._phase, visible=False)
            self._bars.stop()
            self._bars = None

    def _print_line(
        self, trainer: Trainer, pl_module: LightningModule, row: Mapping[str, float], last: bool = False
    ) -> None:
        total, now, count = _total(trainer, pl_module), time.monotonic(), row["iteration"]
        then, shown = self._last_line
        enough = now - then >= _LINE_SECONDS or count - shown >= (total or math.inf) * _LINE_SHARE
        if not (pl_module.online or enough or last):
            self._held = row
            return
        self._held, self._last_line = None, (now, count)
        name = f"{'iteration' if pl_module.online else 'step'} {count:.0f}{f'/{total}' if total else ''}"
        seconds = f"{row['time/iteration']:.1f} s" if "time/iteration" in row else ""
        line = "  ".join(filter(None, [self.label, name, _row_text(row, pl_module.online), seconds]))
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _remaining(self, now: float, count: float, total: int | None) -> str:
        started, first = self._first or (now, count)
        if not total or count <= first:
            return ""
        minutes, seconds = divmod(round((now - started) / (count - first) * max(total - count, 0)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


def _row_text(row: Mapping[str, float], online: bool) -> str:
    parts = []
    for label, names in _SHOWN:
        value = next((row[name] for name in names if name in row), None)
        if value is not None and not (online and label in _ONLY_OFFLINE):
            parts.append(f"{label} {_three_digits(value)}")
    return "  ".join(parts)


def _three_digits(value: float) -> str:
    size = abs(value)
    digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.000"


def _count(batches: float) -> int | None:
    return None if math.isinf(batches) else int(batches)


def _total(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Iterations, or optimiser steps of an offline stage; None if it has no bound known beforehand."""
    epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
    if pl_module.online:
        return epochs
    if trainer.max_steps > 0:
        return trainer.max_steps
    if math.isinf(trainer.num_training_batches) or epochs is None:
        return None
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * epochs
