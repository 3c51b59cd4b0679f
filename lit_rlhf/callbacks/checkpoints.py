"""Checkpoints of a run: when they are written, which are kept, which is the newest that is good."""

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.checkpoint_io import UNFINISHED, remove
from lit_rlhf.checks import check_int
from lit_rlhf.errors import UserError
from lit_rlhf.preemption import Preempted, asked_to_stop
from lit_rlhf.run_folder import better_direction

LAST, BEST = "last.ckpt", "best.ckpt"
_NAME = re.compile(r"step=(\d+)-epoch=(\d+)\.ckpt")
Best = tuple[str, float] | None  # the best checkpoint's name and value


class Checkpoints(Checkpoint):
    """Writes `<dirpath>/step=<optimiser steps>-epoch=<complete epochs>.ckpt`, each from a state that resumes exactly.

    An epoch of an online algorithm is an iteration. The links `last.ckpt` and `best.ckpt` lead to the newest one and to
    the one with the best value of `best_by`. Where a signal asks the run to stop, one is written after the optimiser
    step or between two batches of a validation, and the run ends with `Preempted`; in a rollout, which would be drawn
    again, it ends at once if it can.
    Callbacks that may take a run back (`callbacks/rollback.py`) pin the one to go back to, which then stays as well.

    Args:
        dirpath: the folder, `<trainer.default_root_dir>/checkpoints` by default.
        every_n_epochs: how often at the end of an epoch; None for never.
        every_n_steps: how often within one, in optimiser steps; None for never.
        keep_last: how many of the newest stay, at least 1.
        best_by: a metric; the checkpoint with its best value stays as well. None for no best one, and there is none if
            `metrics.py` does not say which direction is better.

    Raises:
        UserError: a value is too small; at the start, a new run finds another one's checkpoints; when one is written,
            the disk is full: older checkpoints stay as they are.
    """

    def __init__(
        self,
        *,
        dirpath: str | Path | None = None,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        keep_last: int = 2,
        best_by: str | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None:
                check_int(f"Checkpoints: {name}", value, at_least=1)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.keep_last = check_int("Checkpoints: keep_last", keep_last, at_least=1)
        self.best_by = best_by
        self._better = None if best_by is None else better_direction(best_by)
        self.folder = None if dirpath is None else Path(dirpath)
        self._value: tuple[int, float] | None = None  # the optimiser step of the newest row with `best_by`, and that
        self._best: Best = None
        self._due: str | None = None  # the newest that was due: one that a signal or an error brings is never the best
        self._owners: set[str] = set()  # who may pin
        self._pins: dict[str, tuple[str, Best]] = {}  # by owner: a checkpoint's name, and which was the best one then
        self._saved: str | None = None  # the newest one's name

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "due": self._due, "pins": dict(self._pins)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._due = _pair(state_dict["best"]), state_dict.get("due")
        self._pins = {owner: (name, _pair(best)) for owner, (name, best) in state_dict.get("pins", {}).items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module, stage
        folder = self.folder or Path(trainer.default_root_dir) / "checkpoints"
        self.folder = Path(trainer.strategy.broadcast(str(folder)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes what was written after the checkpoint that the run begins from: its end will be written again."""
        del pl_module
        here = written(self.folder)
        if trainer.ckpt_path and Path(trainer.ckpt_path).resolve() in here:
            self._saved = Path(trainer.ckpt_path).resolve().name
        if here and not trainer.ckpt_path and self._saved is None:
            raise UserError(f"{self.folder} holds another run's checkpoints: continue from one, or choose another one")
        trainer.strategy.barrier()  # every process has looked
        if trainer.is_global_zero and self.folder.is_dir():
            _remove_after(max(_number(name) for name in (self._name(trainer), self._saved) if name), here)
            for path in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self._best is not None and not (self.folder / self._best[0]).exists():
            self._best = None  # the run continues in another folder than it began in
        # One of a callback that the run no longer has would stay for good.
        owned = {owner: pin for owner, pin in self._pins.items() if owner in self._owners}
        pins = {owner: pin for owner, pin in owned.items() if (self.folder / pin[0]).exists()}
        self._best, self._pins = trainer.strategy.broadcast((self._best, pins))
        if trainer.is_global_zero and self.folder.is_dir():
            self._link(self._saved)

    def expect(self, owner: str) -> None:
        """For an owner's ``setup``: its pin is kept when a run continues."""
        self._owners.add(owner)

    def pin(self, trainer: Trainer, owner: str) -> None:
        """Keeps the checkpoint of now, which must be written, for as long as its owner pins no other one."""
        self._pins[owner] = (self._name(trainer), self._best)

    def pinned(self, owner: str) -> Path | None:
        """The checkpoint that an owner has pinned; None if there is none."""
        return self.folder / self._pins[owner][0] if owner in self._pins else None

    def on_rollback(self, trainer: Trainer) -> None:
        """Writes a checkpoint of now, a pinned one's moment, then removes those of later steps; for every process.

        A kill between the two leaves a later one, which is then rolled back once more.

        Raises:
            UserError: it cannot be written; those before stay as they are.
        """
        name, self._value, self._due = self._name(trainer), None, None
        now = next(pin for pin in self._pins.values() if pin[0] == name)
        self._best = now[1]
        # What others have pinned later is gone, and what came before it was good for them, too.
        self._pins = {owner: pin if _number(pin[0]) < _number(name) else now for owner, pin in self._pins.items()}
        self._write(trainer, name)
        if trainer.is_global_zero:
            _remove_after(_number(name), written(self.folder))
        trainer.strategy.barrier()

    def on_row(self, trainer: Trainer, pl_module: LightningModule, row: Mapping[str, float]) -> None:
        """Called by the algorithm with each row that it logs; it may follow the checkpoint of the same weights."""
        if self._better and self.best_by in row and math.isfinite(row[self.best_by]):
            # An offline algorithm's row may come before Lightning has counted the step.
            step = trainer.global_step if pl_module.online else row["iteration"]
            self._value = (step, float(row[self.best_by]))
            if self._compare() and trainer.is_global_zero:
                self._link(self._saved)

    def _compare(self) -> bool:
        """Whether the newest due checkpoint is the best one, if the newest value is that of its weights."""
        if self._value is None or self._due is None or _number(self._due)[0] != self._value[0]:
            return False
        step, value = self._value
        name, best = self._best or (None, math.nan)
        better = value > best if self._better == "higher" else value < best
        if name is None or better or _number(name)[0] == step:  # the same weights, further on
            self._best = (self._due, value)
            return True
        return False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # the step is not done
        stop = self._asked_to_stop(trainer)
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last and self._due_after(trainer.current_epoch + 1):
            return  # that of the epoch's end follows
        if stop or due:
            self.save(trainer, pl_module, due=due)
        if stop:
            raise Preempted

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A validation that a signal ends is done again from its beginning."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and 0 < trainer.max_steps <= trainer.global_step:
            return  # a resumed run would be over before it
        if self._asked_to_stop(trainer):
            if fitting:
                self.save(trainer, pl_module)
            raise Preempted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the algorithm's own hook, as Lightning does for callbacks of this kind."""
        stop, due = self._asked_to_stop(trainer), self._due_after(trainer.current_epoch + 1)
        if stop or due:
            self.save(trainer, pl_module, due=due)  # Lightning's row of the epoch follows, and then the run ends

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        if self._asked_to_stop(trainer) and self._saved == self._name(trainer):
            raise Preempted

    def on_caught_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the algorithm when a resumed run has ended an epoch whose last step was in its checkpoint."""
        if self._due_after(trainer.current_epoch):
            self.save(trainer, pl_module, due=True)

    @staticmethod
    def _asked_to_stop(trainer: Trainer) -> bool:
        """Whether any process was, for a signal may reach only one of them."""
        return trainer.strategy.reduce_boolean_decision(asked_to_stop(), all=False)

    def _due_after(self, epochs: int) -> bool:
        return self.every_n_epochs is not None and epochs % self.every_n_epochs == 0

    def on_phase(self, trainer: Trainer, _module: LightningModule, phase: str, *_: Any) -> None:
        """Called by the algorithm during its rollout phase.

        Several processes can only end together. They ask each other in the phases that each begins once in an
        iteration, after its rollout and after stage 3: within a rollout they take other numbers of steps.
        """
        if trainer.world_size > 1:
            stop = phase in ("score", "gather") and self._asked_to_stop(trainer)
        else:
            stop = asked_to_stop()
        before_updates = trainer.training and (trainer.global_step == 0 or self._saved == self._name(trainer))
        if stop and (before_updates or trainer.state.fn != TrainerFn.FITTING):
            raise Preempted

    def save(self, trainer: Trainer, pl_module: LightningModule, *, due: bool = False) -> Path:
        """Writes a checkpoint of now, unless there is one, and says where it is; every process must call it.

        Args:
            due: whether it is one of those that come every so often, the best of which stays.
        """
        del pl_module
        name = self._name(trainer)
        path = self.folder / name
        if trainer.fast_dev_run or name == self._saved:
            return path
        if due:
            self._due = name
            self._compare()
        self._write(trainer, name)
        if trainer.is_global_zero:
            pins = self._pins.values()
            kept = {pin[0] for pin in pins} | {best[0] for best in (self._best, *(pin[1] for pin in pins)) if best}
            for older in written(self.folder)[self.keep_last :]:
                if older.name not in kept:
                    remove(older)
        return path

    def _write(self, trainer: Trainer, name: str) -> None:
        try:
            trainer.save_checkpoint(self.folder / name, weights_only=False)
        except UserError as error:
            kept = written(self.folder)
            left = f"those before it are as they were, the newest is {kept[0].name}" if kept else "there is no other"
            raise UserError(f"{error}; {left}. The same command with ckpt_path=auto goes on from there") from error
        self._saved = name
        if trainer.is_global_zero:
            self._link(name)

    def _name(self, trainer: Trainer) -> str:
        """No two states of a run have the same but for one that is rolled back: that file alone is written over."""
        epochs = trainer.fit_loop.epoch_progress.current
        # A validation is part of its epoch, also where it follows the last step.
        complete = epochs.started - 1 if trainer.validating else epochs.processed
        return f"step={trainer.global_step:08d}-epoch={complete:04d}.ckpt"

    def _link(self, last: str | None) -> None:
        best = self._best and self._best[0]
        for link, name in ((LAST, last), (BEST, best)):
            place = self.folder / link
            if name is None:
                if place.is_symlink():
                    place.unlink()
                continue
            if place.is_dir() and not place.is_symlink():
                remove(place)  # another callback's sharded checkpoint
            unfinished = self.folder / (link + UNFINISHED)
            unfinished.unlink(missing_ok=True)
            unfinished.symlink_to(name)
            os.replace(unfinished, place)


def written(folder: Path) -> list[Path]:
    """The checkpoints of `Checkpoints` in a folder, the newest first."""
    # Not the paths themselves are resolved: one may be a link that leads elsewhere, or nowhere.
    found = [path for path in folder.resolve().glob("step=*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: _number(path.name), reverse=True)


def _pair(stored: Any) -> Best:
    return None if stored is None else (stored[0], stored[1])


def _remove_after(now: tuple[int, int], paths: list[Path]) -> None:
    for path in paths:
        if _number(path.name) > now:
            remove(path)


def _number(name: str) -> tuple[int, int]:
    step, epoch = _NAME.fullmatch(name).groups()
    return int(step), int(epoch)
