"""Weights & Biases, unable to stop or hold up a run."""

import contextlib
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.loggers.numbering import numbered
from lit_rlhf.loggers.wandb_objects import distributions, input_artifacts, output_artifact, samples_table
from lit_rlhf.metrics import AXES
from lit_rlhf.preemption import Preempted
from lit_rlhf.redact import redact
from lit_rlhf.run_folder import METRICS, read_metrics, replace_file


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

    Every row carries `iteration`, `episode` and `tokens`; `step_metric` says which one W&B plots everything against,
    and any panel can be switched to another.

    Artifacts show where a policy came from: the data of a run and the models of other runs that it reads are its
    inputs, its exported `model/` is its output. Their versions follow the contents; they refer to the files on disk
    unless `log_model` uploads the model's.

    A run that continues from a checkpoint in its folder goes on in the same W&B run if that one was online. Offline it
    is a new run of the same group, with the id of the run before it as `resumed_from` in its config: two offline runs
    of one id would overwrite each other when synced. It begins with the rows so far, from metrics.csv: what wandb has
    not written to the disk when a run is killed is lost.

    W&B cannot take a row back. So every row carries in `attempt` how often the run was resumed or rolled back before:
    of two rows of one iteration, in one run or in a group, the one with the larger `attempt` counts.

    An alert is sent when the KL passes `alert_kl`, when a metric is NaN and when a run fails, each once a run.

    Args:
        save_dir: the run folder; W&B's files land in `<save_dir>/wandb`.
        project: W&B project.
        entity: W&B user or team; None: the account's default.
        name: display name of the run; None: `WANDB_NAME` if set, else the job type and the name of the run folder.
        group: sweep or experiment that the run belongs to; None: the W&B sweep, in one.
        job_type: stage: sft, reward_model, ppo, …
        tags: free labels.
        mode: online, offline or disabled. None: `WANDB_MODE` if set, else online if there is a key, else offline.
        step_metric: x axis of every metric: iteration, episode or tokens.
        log_model: upload the files of `<save_dir>/model` at the end, instead of referring to the folder.
        alert_kl: > 0, the `objective/kl`, in nats, above which an alert is sent; None: never.

    Raises:
        UserError: a mode or axis that there is not, a threshold that is not positive, a project that W&B cannot have.
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
        step_metric: Literal["iteration", "episode", "tokens"] = "iteration",
        log_model: bool = False,
        alert_kl: float | None = None,
    ) -> None:
        if mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"logger.wandb.mode={mode!r}: choose online, offline, disabled or null.")
        if step_metric not in AXES:
            raise UserError(f"logger.wandb.step_metric={step_metric!r}: choose {', '.join(AXES)}.")
        if not project or not isinstance(project, str) or set(project) & set(_NOT_IN_PROJECTS):
            raise UserError(f"logger.wandb.project={project!r} must be a name without {_NOT_IN_PROJECTS}")
        name = name or os.environ.get("WANDB_NAME") or f"{job_type or project} {Path(save_dir).absolute().name}"[:128]
        group = group or os.environ.get("WANDB_SWEEP_ID")
        # wandb takes a relative folder for the name of a git repository
        super().__init__(save_dir=Path(save_dir).absolute(), project=project, name=name)
        self._mode = mode
        self._labels = {"entity": entity, "group": group, "job_type": job_type, "tags": list(tags)}
        self._step_metric = step_metric
        self._log_files = log_model
        self._alert_kl = None if alert_kl is None else check_number("logger.wandb.alert_kl", alert_kl, above=0)
        self._alerted: set[str] = set()
        self._started_here = False  # also False for a run that the user opened before
        self._previous_id: str | None = None  # of the run before this one in the folder
        self._same_run: dict[str, str] = {}  # how wandb is told to go on in it
        self._attempts = 0  # resumes and rollbacks of the run so far
        self._last: int | None = None  # the newest iteration logged here; None: nothing was, and nothing cut
        self._begun = False  # whether an algorithm has begun

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
            self._previous_id, online = latest_run(Path(self._save_dir))
            # Only a run that continues is let into a folder that holds a checkpoint.
            if online and Path(self._save_dir, "checkpoints", "last.ckpt").exists():
                self._same_run = {"id": self._previous_id, "resume": "allow"}
            Path(self._save_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = self._open()
            self._started_here = True
            _OPENED.add(self._experiment.id)
            if self._experiment.url:
                rank_zero_info(f"W&B: {self._experiment.url}")
        for axis in AXES:
            self._experiment.define_metric(axis)
        self._experiment.define_metric("*", step_metric=self._step_metric)

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
            **(self._same_run if mode == "online" else {}),
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
        """Puts the parameters, say the resolved configuration, into the run's config, and notes what they read."""
        log = super().log_hyperparams
        self._attempt("log the configuration", lambda: log(params))
        self._attempt("note the run's inputs", lambda: self._log_inputs(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs one row. `step` is the iteration, unless the row names it itself; see also `numbered`."""
        row = numbered(metrics, step, max(self._last or 0, 0) if self._begun else None)
        self._last = max(self._last or 0, int(row.get("iteration", 0)))
        self._attempt("log a row", lambda: self._log_row({**row, "attempt": self._attempts}))

    def _log_row(self, row: dict[str, Any]) -> None:
        self.experiment.log(row)
        when = f"iteration {row.get('iteration')}"
        if self._alert_kl is not None and (kl := float(row.get("objective/kl", 0.0))) > self._alert_kl:
            self._alert("KL blow-up", f"{when}: objective/kl is {kl:.4g} nats, over {self._alert_kl:g}")
        if nans := [name for name, value in row.items() if isinstance(value, float) and math.isnan(value)]:
            self._alert("NaN", f"{when}: {', '.join(nans)}")

    def _alert(self, title: str, text: str) -> None:
        if title not in self._alerted:
            self._alerted.add(title)
            self.experiment.alert(title=title, text=text, level="ERROR")

    @rank_zero_only
    def log_alert(self, title: str, text: str) -> None:
        """Sends an alert, once a run for each title."""
        self._attempt("send an alert", lambda: self._alert(title, text))

    @rank_zero_only
    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Logs completions, dicts as in samples.jsonl, as the table `samples`. `step` is the iteration."""
        self._attempt("log samples", lambda: self._log_at(step, {"samples": samples_table(rows)}))

    def _log_at(self, step: int, objects: Mapping[str, Any]) -> None:
        self.experiment.log({**objects, "iteration": step, "attempt": self._attempts})

    @rank_zero_only
    def log_distributions(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Logs each as the histogram `distribution/<name>`, and `scores` against `kl` as the scatter plot `kl_reward`.

        What is not finite is left out. `step` is the iteration.
        """
        self._attempt("log distributions", lambda: self._log_at(step, distributions(values)))

    @rank_zero_only
    def log_objects(self, what: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Logs the tables, plots and pictures that `make` returns; `what` names them if W&B fails."""
        self._attempt(f"log {what}", lambda: self.experiment.log(make()))

    @rank_zero_only
    def log_summary(self, summary: Mapping[str, float | str]) -> None:
        """Sets values that W&B's list of runs shows."""
        self._attempt("log the summary", lambda: self.experiment.summary.update(dict(summary)))

    @rank_zero_only
    def resume_from(self, iteration: int, step: int = 0) -> None:  # noqa: ARG002
        """Notes in the config which earlier run of this folder a new one continues; nothing for a fresh run (-1).

        Rows of iterations after `iteration`, logged here or before, get successors with a larger `attempt`.
        """
        config = self.experiment.config
        self._begun = True
        self._attempt("count its attempts", lambda: self._count_attempts(iteration))
        if iteration < 0:
            self._previous_id = None  # whoever used the folder before
        elif self._previous_id not in (None, self.experiment.id):
            self._attempt("log the configuration", lambda: config.update({"resumed_from": self._previous_id}))

    def _count_attempts(self, iteration: int) -> None:
        file = Path(self._save_dir, "wandb", _ATTEMPTS)
        if iteration < 0:
            self._attempts = 0
        elif self._last is None:  # the first word of a run that continues
            self._attempts = int(file.read_text()) + 1 if file.exists() else 0
        elif self._last > iteration:
            self._attempts += 1
        began, self._last = self._last is None, iteration
        if not self.experiment.disabled:
            if began and self._attempts and not self._same_run:
                for row in read_metrics(Path(self._save_dir)):
                    if row["iteration"] <= iteration:
                        self.experiment.log({**row, "attempt": self._attempts})
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, str(self._attempts))

    def _log_inputs(self, params: dict[str, Any] | Namespace) -> None:
        if self.experiment.disabled:  # a _NoRun is, too
            return
        config = dict(params) if isinstance(params, Mapping) else vars(params)
        for artifact in input_artifacts(config):
            # The public `use_artifact` refuses to work offline, and online it waits for the server.
            self.experiment._log_artifact(artifact, use_after_commit=True)

    def _log_output(self) -> None:
        folder = Path(self._save_dir, "model")
        if folder.is_dir() and not self._experiment.disabled:
            artifact = output_artifact(folder, f"model-{self._experiment.id}", files=self._log_files)
            self._experiment.log_artifact(artifact)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Closes the run, as failed unless `exit_code` is 0. Nothing is logged after it. Safe to call twice.

        Its summary says in `status` how it ended. A run that ends well leaves its model as an artifact, one that fails
        an alert; one that is interrupted neither. One that a signal asked to stop is marked as preempting.
        """
        if self._experiment is not None:
            error = sys.exc_info()[1]  # what ended the run, on its way through the caller's `except` or `finally`
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "completed" if exit_code == 0 else "interrupted" if stopped else "failed"
            if isinstance(error, Preempted):
                status = "preempted"
                self._attempt("mark the run preempting", lambda: self._experiment.mark_preempting())
            self.log_summary({"status": status})  # before train.py can, if Lightning ends the run
            if status == "completed":
                self._attempt("log the model", self._log_output)
            elif status == "failed":
                text = f"{type(error).__name__}: {error}" if error else f"exit code {exit_code}"
                self._attempt("send an alert", lambda: self._alert("Run failed", redact(text)))
        if self._started_here:
            self._attempt("finish", lambda: self._experiment.finish(exit_code=exit_code))
        self._experiment, self._started_here = _NoRun(), False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning calls this when a fit ends. Only a failure closes the run: after a success more may come."""
        if status == "failed":
            self.finish(exit_code=1)


_ATTEMPTS = "attempts.txt"
_NOT_IN_PROJECTS = "/\\#?%:"

#: ids of the runs that loggers of this process opened
_OPENED: set[str] = set()


def latest_run(save_dir: Path) -> tuple[str | None, bool]:
    """The id of the newest W&B run of a run folder, and whether it was online."""
    # The folders are named [offline-]run-<time>-<id>.
    names = {path.name.removeprefix("offline-"): path.name for path in save_dir.glob("wandb/*run-*-*")}
    newest = max(names, default=None)
    return (newest and newest.rsplit("-", 1)[1], newest is not None and names[newest] == newest)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
