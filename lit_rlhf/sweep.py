"""What a Hydra multirun leaves in its folder: sweep.csv, one row for every job, and one report over all of them.

A job that fails ends none of the others. The command fails at its end instead, and names the jobs that did.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lit_rlhf.errors import UserError
from lit_rlhf.overrides import as_written, split_override
from lit_rlhf.preemption import Preempted, asked_to_stop, listening, passing_on
from lit_rlhf.run_folder import finite, format_rows, read_summary, replace_file

log = logging.getLogger(__name__)

TABLE = "sweep.csv"
JOB = "job.json"  # in a job's folder, so that it does not matter in which process, or on which machine, the job ran
STOPPING = "stopping"  # in a multirun's folder while it stops: for joblib's workers that are still starting


class Stopped:
    """What a job returns, this class itself, that a signal has stopped in one of joblib's workers."""


class Sweep(Callback):
    """Hydra's callback of every command. Hydra copies it into the jobs' processes. Does nothing in a single run."""

    _open: ClassVar["Sweep | None"] = None  # in the process that launches the jobs
    job: ClassVar["Sweep | None"] = None  # in the process of a job
    _signals: ClassVar[ExitStack] = ExitStack()  # open where joblib is told to stop: with its workers, and in each

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._threads: int | None = None
        self.fixed: set[str] = set()  # the keys that have the same value in all jobs

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._threads = threads_per_job(config.hydra.launcher)
        given = OverridesParser.create().parse_overrides(as_written(config.hydra.overrides.task))
        self.fixed = {split_override(o.input_line)[0] for o in given if not o.is_sweep_override()}
        for earlier in _records(self._folder):
            earlier.unlink()
        (self._folder / STOPPING).unlink(missing_ok=True)
        Sweep._open = self
        if _stops_workers(config):
            Sweep._signals.enter_context(listening())
            Sweep._signals.enter_context(passing_on(self._tell_workers))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if self._folder is None:
            return
        if Sweep._open is None and Sweep.job is None and _stops_workers(config):
            Sweep._signals.enter_context(listening())  # also between jobs: a worker that dies takes the others along
        Sweep.job = self
        if Sweep.stopped_worker():
            return
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
        self._note(config.hydra, status="interrupted")  # what stays of a job that is killed
        if Sweep._open is None and (self._folder / STOPPING).exists():  # looked for when the note is there, see below
            (Path(config.hydra.runtime.output_dir) / JOB).unlink()
            signal.raise_signal(signal.SIGTERM)

    def _tell_workers(self, number: int) -> None:
        """Passes a signal on to the workers that have noted a job, for those listen.

        It would end one that is still starting, or has no job, and with that all others. Such a one finds the file.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / STOPPING).touch()
        noted = {json.loads(path.read_text())["pid"] for path in _records(self._folder)}
        for worker in multiprocessing.active_children():
            if worker.pid in noted:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(worker.pid, number)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if self._folder is None:
            return
        if job_return.status == JobStatus.COMPLETED and job_return.return_value is Stopped:
            job_return.return_value = None
            return
        try:
            value = finite(job_return.return_value)
            self._note(config.hydra, status="completed", value=value)
        except Exception as error:
            value = None
            self._note(config.hydra, status="failed", error=str(error).strip())
            expected = isinstance(error, CompactHydraException) and os.environ.get("HYDRA_FULL_ERROR") != "1"
            log.error("job %s failed: %s", config.hydra.job.num, str(error).strip(), exc_info=not expected)
        # Sweepers raise what a job raised. Without a value, Optuna calls the trial failed; a NaN would end its search.
        job_return.status, job_return.return_value = JobStatus.COMPLETED, value

    def _note(self, hydra: DictConfig, status: str, value: float | None = None, error: str = "") -> None:
        given = as_written(hydra.overrides.task)
        overrides = dict(split_override(o) for o in given if not o.startswith("~"))  # it has no value
        job = {"job": hydra.job.num, "overrides": overrides, "status": status, "value": value, "error": error}
        job["pid"] = os.getpid()
        folder = Path(hydra.runtime.output_dir)
        job["folder"] = os.path.relpath(folder, self._folder)
        replace_file(folder / JOB, json.dumps(job, indent=2) + "\n")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if "n_jobs" in config.hydra.launcher:
            end_workers()
        stopped = asked_to_stop()
        failed = self._close(share=not stopped)
        if stopped:
            raise Preempted
        if failed:
            sys.exit(failed)  # of exceptions Hydra makes warnings

    @classmethod
    def cut_short(cls) -> None:
        """Writes what there is of a multirun that ended by an exception, of which Hydra tells no callback."""
        if cls._open is not None:
            stopped = asked_to_stop()
            cls._open._close(share=False)  # whoever interrupts does not want to wait for an upload
            if stopped:  # and a worker that was not listening yet was ended by the signal
                raise Preempted

    @classmethod
    def stopped_worker(cls) -> bool:
        """Whether this is one of joblib's workers and was asked to stop: its job is over, and no further one begins.

        What a job raises would end the other workers in the middle of what they do.
        """
        return cls._open is None and cls.job is not None and asked_to_stop()

    def _close(self, *, share: bool) -> str:
        """Writes sweep.csv and the report; returns a message that names the failed jobs, if any."""
        Sweep._open = None
        Sweep._signals.close()
        (self._folder / STOPPING).unlink(missing_ok=True)
        jobs = read_jobs(self._folder)
        failed = [job for job in jobs if job["status"] == "failed"]
        varied = [k for k in _keys(jobs, "overrides") if len({str(job["overrides"].get(k)) for job in jobs}) > 1]
        lines = [f"\n{len(failed)} of {len(jobs)} jobs failed, see {self._folder / TABLE}:"]
        for job in failed:
            chosen = " ".join(f"{key}={value}" for key, value in job["overrides"].items() if key in varied)
            lines.append(f"  {job['job']} ({chosen}): {job['error'].partition(chr(10))[0]}")
        if jobs:
            write_table(self._folder, jobs)
            write_report(self._folder, share=share)
        return "\n".join(lines) if failed else ""


def _stops_workers(config: DictConfig) -> bool:
    """Whether joblib's workers do what can be continued: only then do they, and who starts them, stop by signals."""
    return "n_jobs" in config.hydra.launcher and config.hydra.job.config_name in ("train", "pipeline")


def end_workers() -> None:
    """Ends joblib's idle worker processes, which else take seconds to free what they hold when the command ends."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def threads_per_job(launcher: DictConfig) -> int | None:
    """torch's threads in each of several jobs that share a machine; None leaves them as they are.

    Joblib's jobs share the threads that a single run would have. Submitit's have what they ask for; on one machine, it
    starts all of them at once. Ray gives every job its ``num_cpus`` itself.
    """
    if "n_jobs" in launcher:
        import joblib

        # As torch counts them, which the process that starts the jobs need not import.
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or joblib.cpu_count(only_physical_cores=True)
        return max(1, int(threads) // joblib.effective_n_jobs(launcher.n_jobs))
    if launcher.get("cpus_per_task"):
        return launcher.cpus_per_task
    return 1 if launcher._target_.endswith("submitit_launcher.LocalLauncher") else None


def in_multirun() -> bool:
    """Whether this is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def stop_between_jobs(value: float | None) -> None:
    """For the end of a job: raises Preempted if a signal came so late that the job is complete, but no other may begin.

    Of an exception Hydra tells no callback, so it is noted here that the job returned ``value``. One of joblib's
    workers returns it, is noted, and then begins no other.
    """
    if in_multirun() and asked_to_stop() and not Sweep.stopped_worker():
        Sweep.job._note(HydraConfig.get(), status="completed", value=finite(value))
        raise Preempted


def label_job(config: DictConfig, stage: str | None = None) -> None:
    """Gives a job of a multirun its W&B group, the multirun's folder, and name, and its lines a label, unless set.

    The name is the overrides in which the jobs differ. The job of a multirun of pipelines has a run for every
    ``stage``, whose name ends with that.
    """
    if not in_multirun():
        return
    hydra = HydraConfig.get()
    progress = (config.get("callbacks") or {}).get("progress")
    if progress is not None:
        progress.label = progress.label or f"[{' '.join(filter(None, [str(hydra.job.num), stage]))}]"
    logger = (config.get("logger") or {}).get("wandb")
    if logger is None:
        return
    given = list(map(split_override, as_written(hydra.overrides.task)))
    varied = [(key, value) for key, value in given if Sweep.job is None or key not in Sweep.job.fixed]
    overrides = ",".join(f"{key}={value}" for key, value in varied or given)
    end = f" {stage}" if stage else ""
    logger.group = logger.group or Path(hydra.sweep.dir).name
    logger.name = logger.name or f"{hydra.job.num} {overrides}"[: 128 - len(end)] + end  # W&B takes no longer ones


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """What the jobs of a multirun noted, in their order, each with its ``folder`` and its run's ``summary``."""
    jobs = [
        json.loads(path.read_text()) | {"folder": path.parent, "summary": read_summary(path.parent)}
        for path in _records(folder)
    ]
    return sorted(jobs, key=lambda job: job["job"])


def _records(folder: Path) -> list[Path]:
    """The files that the multirun's own jobs noted: other multiruns may lie in folders below."""
    return [p for p in folder.rglob(JOB) if json.loads(p.read_text())["folder"] == str(p.parent.relative_to(folder))]


def write_table(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Writes sweep.csv; a job is blank where it lacks a value."""
    rows = [
        {
            **{"job": job["job"], "status": job["status"]},
            **{key: _no_formula(value) for key, value in job["overrides"].items()},
            **{"optimized_value": job["value"]},
            **{name: value for name, value in job["summary"].items() if name != "status"},
            **{"error": _no_formula(job["error"]), "folder": job["folder"].relative_to(folder)},
        }
        for job in jobs
    ]
    overrides, metrics = _keys(jobs, "overrides"), [k for k in _keys(jobs, "summary") if k != "status"]
    columns = ["job", "status", *overrides, "optimized_value", *metrics, "error", "folder"]
    texts = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    replace_file(folder / TABLE, format_rows(columns, texts, header=True))
    log.info("%d jobs: %s", len(jobs), folder / TABLE)


def _no_formula(text: str) -> str:
    """A text as a spreadsheet shows it: one that would be a formula there, and is no number, begins with an apostrophe.

    >>> _no_formula("=1+1"), _no_formula("-0.5"), _no_formula("@me")
    ("'=1+1", '-0.5', "'@me")
    """
    with suppress(ValueError):
        float(text)
        return text
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_report(folder: Path, *, share: bool) -> None:
    """Writes the report over all jobs; with ``share``, W&B gets it, too, if the jobs are there."""
    from lit_rlhf.report import build_report  # here, because its plotting library takes half a second to import

    try:
        log.info("report: %s", build_report(folder))
    except UserError as error:
        log.warning("no report: %s", error)
        return
    try:
        if share and any(folder.rglob("wandb")):
            from lit_rlhf.report_wandb import share_comparison  # imports torch

            share_comparison(folder)
    except Exception as error:  # else the command would not say which jobs failed
        log.warning("no report in W&B: %s: %s", type(error).__name__, error)


def _keys(jobs: list[dict[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(key for job in jobs for key in job[part]))
