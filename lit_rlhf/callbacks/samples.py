"""What the policy wrote: samples.jsonl in the run folder, and the sample tables of loggers that have them."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_rlhf.errors import UserError
from lit_rlhf.run_folder import SAMPLES, append_rows, cut_rows_after


class Samples(Callback):
    """Appends completions to `<trainer.default_root_dir>/samples.jsonl`, one JSON object a line.

    At the end of an iteration the algorithm calls `on_samples` with all its completions, dicts with the keys
    iteration, split ("train" or "validation"), prompt, completion, score, components, gold, kl, length. Of the
    training rows the first `max_samples` are kept, every `every_n_iterations` iterations; validation rows are all
    kept. A score that is not finite becomes null.

    Args:
        every_n_iterations: how often training rows are kept, at least 1.
        max_samples: how many of them; 0 for none.

    Raises:
        UserError: a value is too small.
    """

    def __init__(self, *, every_n_iterations: int = 1, max_samples: int = 8) -> None:
        if every_n_iterations < 1:
            raise UserError(f"Samples: every_n_iterations={every_n_iterations}: give 1 or more.")
        if max_samples < 0:
            raise UserError(f"Samples: max_samples={max_samples}: give 0 or more.")
        self.every_n_iterations = every_n_iterations
        self.max_samples = max_samples
        self._path: Path | None = None
        self._cut_in_setup: int | None = None

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._path = Path(trainer.default_root_dir) / SAMPLES
        if self._cut_in_setup is not None:
            self.resume_from(self._cut_in_setup)
            self._cut_in_setup = None

    @rank_zero_only
    def on_samples(
        self, trainer: Trainer, pl_module: LightningModule, iteration: int, rows: list[dict[str, Any]]
    ) -> None:
        """Called by the algorithm at the end of an iteration with all its completions."""
        del pl_module
        train = [row for row in rows if row["split"] != "validation"]
        kept = [row for row in rows if row["split"] == "validation"]
        if iteration % self.every_n_iterations == 0:
            kept = train[: self.max_samples] + kept
        if not kept:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self._path, kept)
        for logger in trainer.loggers:
            if hasattr(logger, "log_samples"):
                logger.log_samples(kept, step=iteration)

    @rank_zero_only
    def resume_from(self, iteration: int, step: int = 0) -> None:  # noqa: ARG002
        """Keeps the lines up to and including `iteration` and cuts the later ones; -1 cuts all.

        Called as for the loggers. Before there is a trainer, and with it a folder, the cut waits for `setup`.
        """
        if self._path is None:
            self._cut_in_setup = iteration
            return
        cut_rows_after(self._path, "iteration", iteration)
