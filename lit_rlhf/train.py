"""One training run of any stage, composed by Hydra: ``lit-rlhf train`` or ``python -m lit_rlhf.train``."""

import gc
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from lit_rlhf.algorithms.base import Algorithm, make_optimizer
from lit_rlhf.callbacks.checkpoints import LAST, Checkpoints, written
from lit_rlhf.checkpoint_io import require_undamaged
from lit_rlhf.checks import check_text
from lit_rlhf.config import differences, instantiate, instantiate_all, refuse_unknown, resolved
from lit_rlhf.config_types import check_types
from lit_rlhf.distributed import (
    SHARDED_META,
    FSDP2Strategy,
    agree,
    first_decides,
    processes_to_start,
    require_everywhere,
    run_in_processes,
)
from lit_rlhf.errors import UserError
from lit_rlhf.halving import OutOfMemory
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.machine import best_precision, keep_freed_memory, peak_memory_gb, reset_peak_memory
from lit_rlhf.metrics import lookup
from lit_rlhf.preemption import Preempted, asked_to_stop, listening, not_listening
from lit_rlhf.quiet import quiet
from lit_rlhf.run_folder import CONFIG, SUMMARY, read_summary, replace_file, write_summary, writing
from lit_rlhf.run_lock import alone_in
from lit_rlhf.sweep import in_multirun, label_job, stop_between_jobs
from lit_rlhf.terminal import print_config
from lit_rlhf.train_command import main

log = logging.getLogger(__name__)

#: Config groups whose objects the algorithm's constructor takes, under the same names.
PARTS = ("policy", "critic", "reward", "gold", "kl", "clip", "entropy", "baseline", "sampler", "optimizer", "scheduler")
_OWN = ("algorithm", "data", "trainer", "logger", "callbacks", "paths")
_PLAIN = ("task_name", "tags", "seed", "ckpt_path", "optimized_metric")
#: What may differ between a checkpoint's run and the run that continues it.
_MAY_DIFFER = (
    "task_name", "tags", "ckpt_path", "optimized_metric", "paths", "logger", "callbacks", "trainer.max_epochs",
    "trainer.max_steps", "trainer.max_time", "trainer.default_root_dir", "trainer.check_val_every_n_epoch",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "kl.budget",
)  # fmt: skip
#: What a person may change to save a run: the new value holds from the checkpoint on, and a line of the log says so.
_MAY_CHANGE = (
    "optimizer.lr", "kl.coef", "kl.target", "algorithm.target_kl", "algorithm.max_skipped_steps", "sampler.chunk_size",
    "policy.gradient_checkpointing", "trainer.precision", "precision_used", "trainer.gradient_clip_val",
    *(f"{judge}.{key}" for judge in ("reward", "gold") for key in (
        "url", "base_url", "batch_size", "concurrency", "timeout", "retries", "max_bytes", "token_env", "on_failure")),
)  # fmt: skip
#: What a checkpoint holds besides the algorithm's own state, and what of it a sharded one has in its shards.
_HELD = {
    "state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "config", "epoch", "global_step",
    "pytorch-lightning_version",
}  # fmt: skip
_IN_SHARDS = {"state_dict", "optimizer_states"}


@dataclass
class Run:
    """The live objects of a run."""

    folder: Path
    config: dict[str, Any]  # resolved
    algorithm: Algorithm
    datamodule: Any
    trainer: L.Trainer


def build(config: DictConfig) -> Run:
    """Makes every object of a composed config.

    Raises:
        UserError: a key that nobody reads, or a value that a constructor refuses.
    """
    check_plain(config)
    quiet()
    keep_freed_memory()
    L.seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    folder = Path(config.paths.output_dir).absolute()
    algorithm = make_algorithm(config)
    precision = resolve_precision(config)
    loggers = instantiate_all(config.get("logger"), "logger")
    if not any(isinstance(logger, CSVLogger) for logger in loggers):
        loggers.append(CSVLogger(save_dir=str(folder)))  # summary and report are made from its rows
    trainer = instantiate(
        OmegaConf.merge(config.trainer, {"precision": precision}),
        "trainer",
        default_root_dir=str(folder),
        logger=loggers,
        callbacks=instantiate_all(config.get("callbacks"), "callbacks"),
    )
    datamodule = instantiate(config.data, "data")
    if not isinstance(datamodule, L.LightningDataModule) or not is_overridden("train_dataloader", datamodule):
        raise UserError(
            f"config key 'data' makes a {type(datamodule).__name__}, not a LightningDataModule with train_dataloader()"
        )
    algorithm.config = {**resolved(config), "precision_used": precision}
    return Run(folder, algorithm.config, algorithm, datamodule, trainer)


def make_algorithm(config: DictConfig) -> Algorithm:
    """Makes the algorithm of a composed config with all of its parts.

    Raises:
        UserError: a key that nobody reads, or a value that a constructor refuses.
    """
    parts = {name: instantiate(config[name], name) for name in PARTS if name in config}
    return instantiate(config.algorithm, "algorithm", seed=config.seed, **parts)


def resolve_precision(config: DictConfig) -> str | int:
    """Lightning's ``precision``; ``auto`` is the fastest one here that is safe."""
    return best_precision() if config.trainer.precision == "auto" else config.trainer.precision


def check_plain(config: DictConfig) -> None:
    """Raises UserError for a key that nobody reads, and for a wrong value of one that belongs to no group."""
    refuse_unknown(config, {*PARTS, *_OWN, *_PLAIN})
    refuse_unknown(config, {"output_dir"}, under="paths")
    if not isinstance(config.paths.output_dir, str) or not config.paths.output_dir:
        raise UserError(f"paths.output_dir must be a folder, got {config.paths.output_dir!r}")
    check_text("task_name", config.task_name)
    if not isinstance(config.tags, ListConfig) or not all(isinstance(tag, str) for tag in config.tags):
        raise UserError(f"tags must be a list of texts, got {config.tags}")
    if not isinstance(config.seed, int) or isinstance(config.seed, bool) or not 0 <= config.seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {config.seed}")
    if config.optimized_metric is not None:
        check_text("optimized_metric", config.optimized_metric)


def check(config: DictConfig, unless_from: Path) -> None:
    """Makes the parts of a run that are made quickly, but those that are read from the folder ``unless_from``.

    Raises:
        UserError: as ``build`` does for them, and for a wrong value of any other part.
    """
    check_plain(config)
    probe(config)
    plain = resolved(config)
    plain["trainer"] = {**plain["trainer"], "precision": resolve_precision(config)}
    for name, node in plain.items():
        check_types(node, name)
        if name in {*PARTS, "data"} - {"policy", "critic"} and not _names_a_path_in(unless_from, node):
            made = instantiate(config[name], name)
            if name == "optimizer":
                make_optimizer(made, [nn.Parameter(torch.zeros(1))])


def _names_a_path_in(folder: Path, node: Any) -> bool:
    if isinstance(node, dict | list):
        return any(_names_a_path_in(folder, part) for part in (node.values() if isinstance(node, dict) else node))
    return isinstance(node, str) and Path(node).absolute().is_relative_to(folder)


def train(config: DictConfig) -> float | None:
    """Runs one stage from start, or from ``ckpt_path``, to its end, and leaves the run folder behind.

    Starts the processes that ``trainer.devices`` asks for, unless a launcher did.

    Returns:
        The last value of ``optimized_metric``, for sweepers; None if there is none to optimise.

    Raises:
        UserError: a mistake in the config, the data or the reward. What the run wrote so far stays.
    """
    trainer = probe(config)
    folder = Path(config.paths.output_dir or "").absolute()
    if (count := processes_to_start(trainer)) > 1:
        try:
            with listening():
                run_in_processes(train_here, count, resolved(config))
        finally:
            if (folder / SUMMARY).exists() and read_summary(folder).get("status") == "running":
                write_summary(folder, status="failed")  # all of its processes were ended
    else:
        if trainer.world_size > 1:  # a launcher's processes have each composed their own config, with the time in it
            folder = agree(trainer, folder)
            config.paths.output_dir = str(folder)
        train_here(config)
    gc.collect()
    return optimized_value(read_summary(folder), config.optimized_metric)


def probe(config: DictConfig) -> L.Trainer:
    """A trainer on the config's devices that is good for nothing else."""
    quiet()
    placed = [k for k in ("_target_", "accelerator", "devices", "num_nodes", "strategy") if k in config.trainer]
    without = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return instantiate(OmegaConf.masked_copy(config.trainer, placed), "trainer", **without)


def train_here(config: DictConfig | dict[str, Any]) -> None:
    """Runs one stage in this process, which may be one of several; the first one writes the run folder.

    Raises:
        Preempted: a signal asked the run to stop, which it did with a checkpoint to continue from.
    """
    config = OmegaConf.create(config)
    start = time.perf_counter()
    reset_peak_memory()
    run = build(config)
    # Lightning's own handlers would end the run in the middle of a validation, and with the exit code 0.
    run.trainer._signal_connector.register_signal_handlers = lambda: None
    if run.trainer.world_size == 1:
        # It starts no process, but notes this one's rank in the environment, which the next run would take for its own.
        run.trainer.strategy._launcher = None
    stops = any(isinstance(callback, Checkpoints) for callback in run.trainer.callbacks)
    with listening() if stops else not_listening(), ExitStack() as held:  # without Checkpoints, signals do as always
        first_decides(run.trainer, partial(held.enter_context, alone_in(run.folder)))
        _train(run, config, start)


def _train(run: Run, config: DictConfig, start: float) -> None:
    first = run.trainer.is_global_zero
    if config.optimized_metric is not None:
        try:
            lookup(config.optimized_metric)
        except UserError as error:
            log.warning("optimized_metric: %s", error)  # only a warning: a user's own algorithm may log it
    # Each process would find its own: the folder can change meanwhile, and another node can have another disk.
    checkpoint = first_decides(run.trainer, partial(find_checkpoint, config.ckpt_path, run))
    if checkpoint is not None:
        require_everywhere(checkpoint)
    continued = checkpoint is not None and _lies_in(run.folder, Path(checkpoint))
    before = read_summary(run.folder) if continued else {}
    if first:
        if not continued:
            require_unused(run.folder)
        for left in run.folder.glob("*.tmp"):
            left.unlink()  # what a kill has left of a file that was being written
        replace_file(run.folder / CONFIG, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        write_summary(run.folder, status="running")  # a run that is killed does not look complete
    status = "failed"
    try:
        for logger in run.trainer.loggers:
            logger.log_hyperparams(run.config)
        if checkpoint is None:
            for target in [*run.trainer.loggers, *run.trainer.callbacks]:
                if hasattr(target, "resume_from"):
                    target.resume_from(-1)  # the rows of a run that ended before its first checkpoint go
            if run.trainer.limit_val_batches and is_overridden("val_dataloader", run.datamodule):
                validate(run)
        if asked_to_stop() and run.trainer.world_size == 1:
            raise Preempted  # nothing was learned yet
        run.trainer.fit(run.algorithm, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True)
        if run.trainer.interrupted:
            raise KeyboardInterrupt
        with writing(run.folder / "model"):
            run.algorithm.export(run.folder / "model")
        status = "completed"
    except OutOfMemory as error:
        raise UserError(f"{error}. {newest_of(run)}") from error
    except Preempted:
        status = "preempted"
        raise
    except (KeyboardInterrupt, SystemExit):
        status = "interrupted"
        raise
    finally:
        if first:
            summary = {
                "status": status,
                "wall_seconds": round(before.get("wall_seconds", 0.0) + time.perf_counter() - start, 1),
                "peak_memory_gb": max(before.get("peak_memory_gb", 0.0), peak_memory_gb()),
                **run.algorithm.axes,
                **({"stopped_by": run.algorithm.stopped_by} if run.algorithm.stopped_by else {}),
            }
            try:
                summary = write_summary(run.folder, **summary)
            except UserError as error:
                if status == "completed":
                    raise
                log.error("%s", error)  # what ended the run says more
            close(run.trainer.loggers, summary)
    if first:
        from lit_rlhf.report import build_report  # here, because its plotting library takes half a second to import

        build_report(run.folder)
        log.info("%s: %s", status, run.folder)
    run.trainer.strategy.barrier()  # whoever comes next may read the folder


def newest_of(run: Run) -> str:
    """Where a run that ended can go on from, in words."""
    folders = [callback.folder for callback in run.trainer.callbacks if isinstance(callback, Checkpoints)]
    found = [path for folder in folders if folder for path in written(folder)]
    if not found:
        return "No checkpoint was written yet"
    return f"The newest checkpoint is {found[0]}; ckpt_path={found[0]} goes on from there"


def optimized_value(summary: dict[str, Any], name: str | None) -> float | None:
    """The last value of the metric ``name`` in a run's summary; None without a name, or, with a warning, without it."""
    if name is None:
        return None
    if name not in summary:
        logged = ", ".join(sorted(key for key in summary if "/" in key)) or "none"
        log.warning("optimized_metric=%s was not logged, so a sweeper gets no value; logged were: %s", name, logged)
        return None
    return float(summary[name])


def close(loggers: list[Logger], summary: dict[str, Any]) -> None:
    """Ends the runs of loggers; a run that failed is marked so, and the next one in this process starts its own."""
    completed = summary["status"] == "completed"
    for logger in loggers:
        if hasattr(logger, "log_summary"):
            logger.log_summary(summary)
        logger.finalize("success" if completed else "failed")
        if hasattr(logger, "finish"):
            logger.finish(0 if completed else 1)


def find_checkpoint(ckpt_path: str | None, run: Run) -> str | None:
    """The checkpoint to continue from: a path, ``auto`` (this run folder's last one, if any), or None.

    Raises:
        UserError: no such file, not a checkpoint, or one of another configuration, naming the keys that differ.
    """
    if ckpt_path is None:
        return None
    check_text("ckpt_path", ckpt_path)
    if ckpt_path == "auto":
        path, stored = newest_good(run.folder / "checkpoints")
        if path is None:
            return None
    else:
        path = Path(ckpt_path)
        if not path.exists():
            raise UserError(f"ckpt_path={ckpt_path}: there is no such file")
        stored = read_checkpoint(path)
    if missing := sorted((_HELD - _IN_SHARDS if path.is_dir() else _HELD) - set(stored)):
        raise UserError(f"{path} is no checkpoint that a run can go on from: it holds no {', '.join(missing)}")
    if path.is_dir() != isinstance(run.trainer.strategy, FSDP2Strategy):
        kinds = ("sharded", "another") if path.is_dir() else ("whole", "the sharded")
        raise UserError(
            f"ckpt_path={path} is a {kinds[0]} checkpoint, and this run's trainer.strategy is {kinds[1]} one. Continue "
            f"with {'trainer=fsdp2' if path.is_dir() else 'another trainer than fsdp2'}"
        )
    epochs = stored["loops"]["fit_loop"]["epoch_progress"]["current"]["started"]
    for unit, done, most in (
        ("epochs", epochs, run.trainer.max_epochs), ("steps", stored["global_step"], run.trainer.max_steps),
    ):  # fmt: skip
        if most is not None and -1 < most < done:
            raise UserError(
                f"trainer.max_{unit}={most}: the checkpoint {path} is of {done} {unit} already. Give no fewer, or "
                "start a new run in another folder (paths.output_dir=...)"
            )
    if stored["config"]:  # else it comes from a script's own Trainer
        if changed := differences(stored["config"], run.config, _MAY_DIFFER + _MAY_CHANGE):
            raise UserError(
                f"the checkpoint {path} belongs to another configuration. These keys differ (checkpoint -> now):\n  "
                + "\n  ".join(changed)
                + "\nContinue with the old values, or start a new run in another folder (paths.output_dir=...)."
            )
        if changed := differences(stored["config"], run.config, _MAY_DIFFER):
            log.warning("From the checkpoint %s on, these keys differ (checkpoint -> now):\n  %s",
                        path, "\n  ".join(changed))  # fmt: skip
    return str(path)


def _lies_in(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is of the run in ``folder``, on the way to which, or in which, there may be links."""
    places = [folder.resolve(), (folder / "checkpoints").resolve()]
    return any(checkpoint.resolve().is_relative_to(place) for place in places)


def newest_good(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest checkpoint in ``folder`` that is what was written, and what it holds; None if there are none.

    Warns of every one that is passed over.

    Raises:
        UserError: there are checkpoints, and none of them is good.
    """
    last = folder / LAST  # a link to the newest, unless a callback of the user's wrote it
    bad = []
    for path in [*([last] if last.exists() and not last.is_symlink() else []), *written(folder)]:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log.warning("%s. Looking for the one before it", error)
            bad.append(path)
    if bad:
        raise UserError(
            f"ckpt_path=auto: none of the {len(bad)} checkpoints in {folder} is good. Remove the run folder, or choose "
            "another one with paths.output_dir=..., to start from the beginning"
        )
    return None, None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on disk until they are used. A sharded one's weights are elsewhere.

    Raises:
        UserError: it is not what was written, cannot be read, or no run of lit_rlhf wrote it.
    """
    require_undamaged(path)
    file = path / SHARDED_META if path.is_dir() else path
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint: {(str(error).splitlines() or [repr(error)])[0]}"
        ) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("lit_rlhf"), dict):
        raise UserError(f"{path} was not written by a lit_rlhf run: its training state is missing")
    return stored


def validate(run: Run) -> None:
    """Measures the policy before training; raises UserError if what the datamodule gives for it is no loader."""
    try:
        run.trainer.validate(run.algorithm, datamodule=run.datamodule, verbose=False)
    except TypeError as error:
        if "invalid dataloader" not in str(error):
            raise
        raise UserError(f"config key 'data': {error}") from error


def require_unused(folder: Path) -> None:
    """Raises UserError if a new run in ``folder`` would overwrite what another one has learned."""
    checkpoints = [LAST, *(path.name for path in written(folder / "checkpoints"))]
    for held in (*(f"checkpoints/{name}" for name in checkpoints), "model"):
        if (folder / held).exists():
            raise UserError(
                f"{folder} holds another run's {held}, which a new run would overwrite. Continue that run with "
                "ckpt_path=auto, remove the folder, or choose another one with paths.output_dir=..."
            )


def run_job(config: DictConfig) -> float | None:
    """``train`` as Hydra runs it: alone, after the config was printed, or as a job of a multirun."""
    label_job(config)
    if rank_zero_only.rank == 0 and not in_multirun():  # rank: of a launcher's processes
        print_config(resolved(config))
    with listening():
        value = train(config)
        stop_between_jobs(value)
    return value


if __name__ == "__main__":
    main()
