"""Where the metrics of a run go: metrics.csv in the run folder, and Weights & Biases.

Both loggers take one row per iteration, `log_metrics(row, step=iteration)`. Both have `resume_from(iteration)`,
which the algorithm calls when training starts: the iteration of the checkpoint it continues from, -1 if none.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_rlhf.errors import UserError
from lit_rlhf.metrics import AXES
from lit_rlhf.run_folder import METRICS, finite, format_rows, read_rows, replace_file


class CSVLogger(Logger):
    """Writes `<save_dir>/metrics.csv`: a header, then one row per iteration, on disk as soon as it is logged.

    Columns are `iteration, episode, tokens`, then metrics in the order they first appeared; a metric that a row
    lacks is blank. Floats are written with `repr`, so they read back to the bit.

    Args:
        save_dir: the run folder; made when missing.
    """

    # With both empty, a ModelCheckpoint without dirpath writes to <save_dir>/checkpoints.
    name = ""
    version = ""

    def __init__(self, *, save_dir: str | Path) -> None:
        super().__init__()
        self._path = Path(save_dir) / METRICS
        self._columns: list[str] | None = None  # those of the file; None: not looked at yet

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: config.yaml holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends one row. `step` is the iteration, unless the row names it itself.

        Raises:
            UserError: neither names the iteration.
        """
        named = {"iteration": step, **metrics}
        row = {name: _text(value) for name, value in named.items() if value is not None}
        if "iteration" not in row:
            raise UserError("A row of metrics.csv needs its iteration: log_metrics(row, step=iteration).")
        if self._columns is None:
            self._cut(None)
        columns = self._columns or list(AXES)
        new = [name for name in row if name not in columns]
        if new or not self._columns:
            self._write([*columns, *new], [*read_rows(self._path)[1], row])
        else:
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(format_rows(columns, [row], header=False))

    @rank_zero_only
    def resume_from(self, iteration: int) -> None:
        """Keeps the rows up to and including `iteration` and cuts the later ones; -1 cuts all."""
        self._cut(iteration)

    def _cut(self, last: int | None) -> None:
        columns, rows = read_rows(self._path)
        kept = [row for row in rows if last is None or int(row["iteration"]) <= last]
        if kept:
            self._write(columns, kept)  # without the line that a kill may have cut short
        else:
            self._path.unlink(missing_ok=True)
            self._columns = []

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, format_rows(columns, rows, header=True))
        self._columns = columns


def _text(value: Any) -> str:
    number = value.item() if hasattr(value, "item") else value
    return repr(int(number) if isinstance(number, int) else float(number))


class _NoRun:
    """Stands in for a W&B run that could not be had: reading, calling and setting anything is void."""

    id = name = url = None

    def __getattr__(self, name: str) -> "_NoRun":
        return self

    def __call__(self, *_: Any, **__: Any) -> "_NoRun":
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        pass


class WandbLogger(LightningWandbLogger):
    """Weights & Biases, unable to stop a run.

    Whatever fails in W&B (no network, a bad key or project name, a full disk, a dead service process) costs one
    warning, and training goes on without it. A run that cannot go online is recorded offline. Nothing ever asks
    at the terminal.

    All metrics have `iteration` as their step; every row also carries `episode` and `tokens` to plot against. A
    run that continues from a checkpoint is a new W&B run of the same group, with the id of the run before it as
    `resumed_from` in its config: two offline runs of one id would overwrite each other when synced.

    Args:
        save_dir: the run folder; W&B's files land in `<save_dir>/wandb`.
        project: W&B project.
        entity: W&B user or team; None: the account's default.
        name: display name of the run; None: W&B invents one.
        group: sweep or experiment that the run belongs to.
        job_type: stage: sft, reward_model, ppo, …
        tags: free labels.
        mode: online, offline or disabled. None: `WANDB_MODE` if set, else online if there is a key, else offline.

    Raises:
        UserError: `mode` is none of these.
    """

    def __init__(
        self,
        *,
        save_dir: str | Path,
        project: str = "lit_rlhf",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        if mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"WandbLogger: mode={mode!r}: choose online, offline, disabled or null.")
        # wandb takes a relative folder for the name of a git repository
        super().__init__(save_dir=Path(save_dir).absolute(), project=project, name=name)
        self._mode = mode
        self._labels = {"entity": entity, "group": group, "job_type": job_type, "tags": list(tags)}
        self._started_here = False  # also False for a run that the user opened before
        self._previous_id: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process cannot use this one's connection.
        return self.__dict__ | {"_experiment": None}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, opened at the first use; once W&B has failed, an object on which every call is void."""
        if self._experiment is None:
            self._attempt("start", self._start)
        return self._experiment

    def _start(self) -> None:
        if wandb.run is not None and wandb.run.id not in _OPENED:
            self._experiment = wandb.run  # the user's own, say that of `wandb.agent(function=…)`
        else:
            self._previous_id = _latest_run_id(Path(self._save_dir))
            Path(self._save_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = self._open()
            self._started_here = True
            _OPENED.add(self._experiment.id)
            if self._experiment.url:
                rank_zero_info(f"W&B: {self._experiment.url}")
        for axis in AXES:
            self._experiment.define_metric(axis)
        self._experiment.define_metric("*", step_metric="iteration")

    def _open(self) -> Any:
        mode = self._mode or os.environ.get("WANDB_MODE") or None
        wandb.setup(settings=wandb.Settings(silent=True))
        if mode not in (None, "online"):
            return self._init(mode)
        reason = "there is no API key" if mode else None
        try:
            if wandb.login(prompt=False, verify=False):
                return self._init("online")
        except Exception as error:
            reason = _first_line(error)
        if reason:
            rank_zero_warn(
                f"W&B cannot go online ({reason}). Recording offline in {self._save_dir}/wandb; "
                "`wandb sync` uploads that folder later."
            )
        return self._init("offline")

    def _init(self, mode: str) -> Any:
        seconds = {"init_timeout": 30.0, "finish_timeout": 300.0}  # wandb's own: 90 and for ever
        return wandb.init(
            project=self._project,
            name=self._name,
            dir=self._save_dir,
            mode=mode,
            # Without this, a job of a multirun would go on in the run that an earlier job left open.
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",  # else output.log fills with the frames of the progress bars
                **{name: s for name, s in seconds.items() if f"WANDB_{name.upper()}" not in os.environ},
            ),
            **self._labels,
        )

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Runs `action`; if W&B fails in it, says so and goes without W&B from then on."""
        try:
            action()
        except Exception as error:
            rank_zero_warn(
                f"W&B failed to {what} ({type(error).__name__}: {_first_line(error)}). Training goes on without "
                f"it; {METRICS} and the other files of the run stay complete."
            )
            run, self._experiment = self._experiment, _NoRun()
            # Both raise at once when the service is dead, and yet forget it: a later job starts a new service,
            # and Python's exit prints no traceback.
            for close in (lambda: run.finish(exit_code=1), wandb.teardown):
                with contextlib.suppress(Exception):
                    close()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Puts the parameters, say the resolved configuration, into the run's config."""
        log = super().log_hyperparams
        self._attempt("log the configuration", lambda: log(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs one row. `step` is the iteration, unless the row names it itself."""
        row = dict(metrics) if step is None else {"iteration": step, **metrics}
        self._attempt("log a row", lambda: self.experiment.log(row))

    @rank_zero_only
    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Logs completions, dicts as in samples.jsonl, as the table `samples`. `step` is the iteration."""
        self._attempt(
            "log samples", lambda: self.experiment.log({"samples": _samples_table(rows), "iteration": step})
        )

    @rank_zero_only
    def log_summary(self, summary: Mapping[str, float | str]) -> None:
        """Sets values that W&B's list of runs shows."""
        self._attempt("log the summary", lambda: self.experiment.summary.update(dict(summary)))

    @rank_zero_only
    def resume_from(self, iteration: int) -> None:
        """Notes in the config which earlier run of this folder is continued; nothing for a fresh run (-1)."""
        config = self.experiment.config
        if iteration < 0:
            self._previous_id = None  # whoever used the folder before
        elif self._previous_id:
            self._attempt("log the configuration", lambda: config.update({"resumed_from": self._previous_id}))

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Closes the run, as failed unless `exit_code` is 0. Nothing is logged after it. Safe to call twice."""
        if self._started_here:
            self._attempt("finish", lambda: self._experiment.finish(exit_code=exit_code))
        self._experiment, self._started_here = _NoRun(), False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning calls this when a fit ends. Only a failure closes the run: after a success more may come."""
        if status == "failed":
            self.finish(exit_code=1)


#: ids of the runs that loggers of this process opened
_OPENED: set[str] = set()


def _latest_run_id(save_dir: Path) -> str | None:
    # The folders are named [offline-]run-<time>-<id>.
    names = [path.name.removeprefix("offline-") for path in save_dir.glob("wandb/*run-*-*")]
    return max(names).rsplit("-", 1)[1] if names else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _samples_table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    plain = ["iteration", "split", "prompt", "completion", "score", "kl", "length"]
    nested = [(kind, name) for kind in ("components", "gold") for name in rows[0].get(kind, {})]
    return wandb.Table(
        columns=[*plain, *(f"{kind}/{name}" for kind, name in nested)],
        data=[
            [
                *(finite(row.get(name)) for name in plain),
                *(finite(row.get(kind, {}).get(name)) for kind, name in nested),
            ]
            for row in rows
        ],
    )
