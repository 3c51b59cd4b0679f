"""A run that is ended and continued, wherever that is, ends with the same checkpoints, the best one too, to the bit."""

import contextlib
import os
import signal

import lightning as L
import pytest
import torch
from algorithms.test_resume import make, written
from tiny import Prompts, tiny_policy
from torch.utils.data import DataLoader

from lit_rlhf import SFT
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.callbacks import Checkpoints, KLGuard, Samples
from lit_rlhf.callbacks.checkpoints import written as checkpoints_in
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.preemption import Preempted, listening


class Strike(L.Callback):
    """A signal before the optimiser step after ``step``; or after the first batch of the validation that follows it."""

    def __init__(self, step, *, validation=False):
        self.step, self.validation = step, validation

    def strike(self):
        os.kill(os.getpid(), signal.SIGTERM)
        self.step = None

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and not self.validation:
            self.strike()

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.validation and trainer.state.fn == "fit":
            self.strike()


class Texts(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"text": f"text {n}"} for n in range(12)], batch_size=2, shuffle=True)

    def val_dataloader(self):
        return DataLoader([{"text": f"held out {n}"} for n in range(4)], batch_size=2, shuffle=True)


def sft():
    return SFT(policy=tiny_policy(), log_every_n_steps=1, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), seed=4)


@pytest.fixture
def values(monkeypatch):
    """What the metric is after which optimiser step; only where a validation was."""
    log_row, values = Algorithm.log_row, {}

    def patched(self, metrics):
        step = self.trainer.global_step if self.online else self.steps
        validated = any(name.startswith("val/") for name in metrics)
        log_row(self, {**metrics, **({"reward_model/loss": values.get(step, 9.0)} if validated else {})})

    monkeypatch.setattr(Algorithm, "log_row", patched)
    return values


def fit(
    folder, *, online=True, strike=None, guard=(), every_n_epochs=1, every_n_steps=None, module=None, **settings
):
    """Three epochs of six steps, from where the folder's last checkpoint is; whether a signal ended the run."""
    last = folder / "checkpoints" / "last.ckpt"
    checkpoints = Checkpoints(
        dirpath=last.parent, every_n_epochs=every_n_epochs, every_n_steps=every_n_steps, keep_last=1,
        best_by="reward_model/loss",
    )  # fmt: skip
    each = {"check_val_every_n_epoch": 1} if online else {"val_check_interval": 2}
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=CSVLogger(save_dir=folder), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[checkpoints, Samples(), *([strike] if strike else []), *guard],
        **{"max_epochs": 3, **each, **settings},
    )  # fmt: skip
    trainer._signal_connector.register_signal_handlers = lambda: None
    data = Prompts(validation=True) if online else Texts()
    algorithm = make(**(module or {})) if online else sft()
    with listening():
        try:
            trainer.fit(algorithm, datamodule=data, ckpt_path=last if last.exists() else None)
        except Preempted:
            return True
    return False


#: Times; and how many validation batches Lightning has counted in an epoch, which nothing depends on.
VOLATILE = ("time/", "rollout/tokens_per_second", "epoch_loop.val_loop.batch_progress")


def same(one, two, place=""):
    """Every place in which two checkpoints differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        names = {name for name in (*one, *two) if not str(name).startswith(VOLATILE)}
        return [x for n in sorted(names, key=str) for x in same(one.get(n, "-"), two.get(n, "-"), f"{place}/{n}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return [x for n, (a, b) in enumerate(zip(one, two, strict=True)) for x in same(a, b, f"{place}/{n}")]
    equal = torch.equal(one, two) if isinstance(one, torch.Tensor) else repr(one) == repr(two)
    return [] if equal else [f"{place}: {one} / {two}"]


def assert_same_best(whole, split):
    best, other = ((folder / "checkpoints" / "best.ckpt").resolve() for folder in (whole, split))
    assert best.name == other.name
    assert [path.name for path in checkpoints_in(whole / "checkpoints")] == [
        path.name for path in checkpoints_in(split / "checkpoints")
    ]
    for path in checkpoints_in(whole / "checkpoints"):
        stored = [torch.load(f, weights_only=True) for f in (path, split / "checkpoints" / path.name)]
        assert same(*stored) == []
    with contextlib.suppress(FileNotFoundError):  # texts have no samples
        assert written(whole) == written(split)
    assert (whole / "metrics.csv").read_text().count("\n") == (split / "metrics.csv").read_text().count("\n")


ONLINE = {
    "in an iteration": [Strike(8)],
    "in the last step of the best one": [Strike(11)],
    "in its validation": [Strike(12, validation=True)],
    "in two validations, and after them": [Strike(6, validation=True), Strike(12, validation=True), Strike(15)],
    "in the last validation": [Strike(18, validation=True)],
    "right after its validation, and again": [Strike(12, validation=True), Strike(12), Strike(14)],
}  # fmt: skip


STEPS = {"every_n_epochs": None, "every_n_steps": 3}


@pytest.mark.parametrize(
    ("name", "often"), [*((name, {}) for name in ONLINE), ("in its validation", STEPS), ("in an iteration", STEPS)]
)
def test_online(tmp_path, values, name, often):
    values |= {6: 3.0, 12: 1.0, 18: 2.0}
    assert not fit(tmp_path / "whole", **often)
    assert (tmp_path / "whole/checkpoints/best.ckpt").resolve().name.startswith("step=00000012")
    for strike in ONLINE[name]:
        assert fit(tmp_path / "split", strike=Strike(strike.step, validation=strike.validation), **often)
    assert not fit(tmp_path / "split", **often)
    assert_same_best(tmp_path / "whole", tmp_path / "split")


OFFLINE = {
    "in an epoch": [Strike(9)],
    "in validations within an epoch": [Strike(8, validation=True), Strike(10, validation=True)],
    "at an epoch's end": [Strike(12, validation=True), Strike(13)],
    "in the last validation": [Strike(18, validation=True)],
}


@pytest.mark.parametrize(
    ("name", "often"), [*((name, {"every_n_steps": 2}) for name in OFFLINE), ("at an epoch's end", {})]
)
def test_offline_with_validations_within_an_epoch(tmp_path, values, name, often):
    """Also a checkpoint that is written before the validation of its step, as every second one, may be the best."""
    values |= {2: 4.0, 6: 3.0, 8: 1.0, 12: 2.0}
    assert not fit(tmp_path / "whole", online=False, **often)
    best = (tmp_path / "whole/checkpoints/best.ckpt").resolve()
    assert best.name == ("step=00000008-epoch=0001.ckpt" if often else "step=00000012-epoch=0002.ckpt")
    for strike in OFFLINE[name]:
        assert fit(tmp_path / "split", online=False, strike=Strike(strike.step, validation=strike.validation), **often)
    assert not fit(tmp_path / "split", online=False, **often)
    assert_same_best(tmp_path / "whole", tmp_path / "split")


def burst(optimizer):
    """In the third iteration the rate is too high."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 24 if 12 <= step < 18 else 1)


class Worse(L.Callback):
    """The third iteration's value is the best while its updates go too far, and none when they are done again."""

    def __init__(self, values, guard):
        self.values, self.guard = values, guard

    def on_train_batch_start(self, *_):
        self.values[18] = 5.0 if self.guard.rollback.count else 1.0


@pytest.mark.parametrize("strikes", [[], [Strike(12, validation=True), Strike(18, validation=True), Strike(20)]])
def test_a_rollback_brings_back_what_was_the_best_one_then(tmp_path, values, strikes):
    values |= {6: 3.0, 12: 4.0, 24: 6.0}
    for strike in [*strikes, None]:
        guard = KLGuard(max_kl=8.0, max_rollbacks=9)
        settings = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.004), "scheduler": burst}
        assert fit(tmp_path, strike=strike, guard=[guard, Worse(values, guard)], module=settings, max_epochs=4) == (
            strike is not None
        )
    assert guard.rollback.count >= 1
    assert (tmp_path / "checkpoints/best.ckpt").resolve().name == "step=00000006-epoch=0001.ckpt"
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["callbacks"]["Checkpoints"]["best"] == ("step=00000006-epoch=0001.ckpt", 3.0)
