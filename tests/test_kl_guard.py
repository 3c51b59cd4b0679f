"""A KL that explodes ends the run, or is taken back as if the learning rate had been smaller from there on."""

from functools import partial

import lightning as L
import pytest
import torch
from algorithms.test_resume import Killed, assert_same, make, written
from tiny import Prompts, tiny_policy
from transformers import get_scheduler

from lit_rlhf import SFT
from lit_rlhf.algorithms import PPO
from lit_rlhf.callbacks import Checkpoints, KLGuard, Samples
from lit_rlhf.callbacks.checkpoints import written as written_checkpoints
from lit_rlhf.checkpoint_io import damage
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger


def guarded(
    folder, *, lr, guard, until=4, scheduler=None, ckpt_path=None, extra=(), algorithm=PPO, checkpoints=Checkpoints,
    validate=False,
):  # fmt: skip
    """6 optimiser steps an iteration, with Adam, whose steps are as large as the rate whatever the gradient."""
    ppo = make(ppo_epochs=2, optimizer=lambda p: torch.optim.Adam(p, lr=lr), scheduler=scheduler, algorithm=algorithm)
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=CSVLogger(save_dir=folder), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1.0 if validate else 0, max_epochs=until,
        check_val_every_n_epoch=5,
        callbacks=[checkpoints(dirpath=folder / "checkpoints"),
                   Samples(), *([guard] if guard else []), *extra],
    )  # fmt: skip
    try:
        trainer.fit(ppo, datamodule=Prompts(validation=validate), ckpt_path=ckpt_path)
    except Killed:
        pass
    return ppo


def column(folder, name):
    return [float(row[name]) for row in written(folder)[0]]


def without_guard(folder):
    """Rows and samples, without the column that only the guard writes."""
    rows, samples = written(folder)
    return [{name: value for name, value in row.items() if not name.startswith("kl_guard/")} for row in rows], samples


def linear(optimizer, num_training_steps):
    return get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=num_training_steps)


@pytest.mark.parametrize("scheduler", [None, linear])
def test_after_rollbacks_the_run_is_one_with_a_smaller_learning_rate(tmp_path, scheduler):
    """To the bit: halving a rate is exact. Nothing of what was taken back is left in rows and samples."""
    guard = KLGuard(max_kl=8.5, max_rollbacks=10)
    one = guarded(tmp_path / "one", lr=0.16, guard=guard, until=2, scheduler=scheduler)
    assert max(column(tmp_path / "one", "objective/kl")) <= 8.5
    assert guard.rollback.count >= 3
    assert column(tmp_path / "one", "kl_guard/rollbacks") == [guard.rollback.count] * 2
    two = guarded(tmp_path / "two", lr=0.16 * 0.5**guard.rollback.count, guard=None, until=2, scheduler=scheduler)
    assert one.trainer.global_step == two.trainer.global_step == 12
    assert without_guard(tmp_path / "one") == without_guard(tmp_path / "two")
    states = one.state_dict(), two.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # One halving less is too much.
    three = guarded(tmp_path / "three", lr=0.32 * 0.5**guard.rollback.count, guard=None, until=2, scheduler=scheduler)
    assert three.last_kl > 8.5


def burst(optimizer):
    """From the second iteration on the rate is 32 times as high."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 if step < 6 else 32)


class KillAt(L.Callback):
    """As a kill would, before an optimiser step once the guard has rolled back."""

    def __init__(self, step, guard):
        self.step, self.guard = step, guard

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and self.guard.rollback.count:
            raise Killed


@pytest.mark.parametrize(("step", "keep_last"), [(6, 2), (9, 1), (14, 2)])
def test_later_rows_alone_are_taken_back_and_a_kill_changes_nothing(tmp_path, step, keep_last):
    """The updates of iteration 2 are at fault. Killed in that iteration, done again, or in the next one."""
    settings = {"lr": 0.004, "scheduler": burst, "checkpoints": partial(Checkpoints, keep_last=keep_last)}
    whole = guarded(tmp_path / "whole", guard=KLGuard(max_kl=8.0, max_rollbacks=9), **settings)
    first, second, *later = column(tmp_path / "whole", "kl_guard/rollbacks")
    assert first == 0 < second <= later[-1]
    assert max(column(tmp_path / "whole", "objective/kl")) <= 8.0
    assert column(tmp_path / "whole", "iteration") == [1, 2, 3, 4]
    guard = KLGuard(max_kl=8.0, max_rollbacks=9)
    kill = KillAt(step, guard)
    guarded(tmp_path / "split", guard=guard, extra=[kill], **settings)
    path = tmp_path / "split/checkpoints/last.ckpt"
    # None of what was taken back is left, which ckpt_path=auto would find.
    assert path.resolve() == written_checkpoints(tmp_path / "split/checkpoints")[0]
    guard = KLGuard(max_kl=8.0, max_rollbacks=9)
    resumed = guarded(tmp_path / "split", guard=guard, ckpt_path=path, **settings)
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


def test_it_stops_and_names_the_last_good_checkpoint(tmp_path):
    good = tmp_path / "checkpoints/step=00000000-epoch=0000.ckpt"
    message = r"iteration 2: the KL is .* over callbacks\.kl_guard\.max_kl=3: the updates of iteration 1 went too far"
    with pytest.raises(UserError, match=rf"{message}\. {good} is the checkpoint from before"):
        guarded(tmp_path, lr=0.16, guard=KLGuard(max_kl=3, action="stop"))
    assert column(tmp_path, "iteration") == [1]
    assert damage(good) is None
    assert torch.load(good, weights_only=True)["lit_rlhf"]["iteration"] == 0


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_the_last_updates_are_judged_by_the_validation_and_the_run_goes_on_from_before_them(tmp_path, action):
    settings = {"until": 2, "scheduler": burst, "validate": True}
    good = tmp_path / "checkpoints/step=00000006-epoch=0001.ckpt"
    with pytest.raises(UserError, match=rf"iteration 2: the validation's KL is .*max_kl=8: .* {good} is the"):
        guarded(tmp_path, lr=0.004, guard=KLGuard(max_kl=8, action=action), **settings)
    # What ckpt_path=auto would go on from is not of what went too far.
    assert written_checkpoints(tmp_path / "checkpoints")[0] == good
    guarded(tmp_path, lr=0.004, guard=KLGuard(max_kl=1e9, action=action), **settings, ckpt_path=good)
    assert column(tmp_path, "iteration") == [1, 2]


def test_it_goes_back_only_so_often(tmp_path):
    with pytest.raises(UserError, match="the updates of iteration 1 went too far after 2 rollbacks"):
        guarded(tmp_path, lr=0.16, guard=KLGuard(max_kl=3, max_rollbacks=2))


def test_a_kl_that_is_not_finite_is_too_high(tmp_path):
    class Broken(PPO):
        def anchor(self, rollout):
            anchors = super().anchor(rollout)
            return anchors._replace(kl=anchors.kl * float("nan")) if self.iteration == 1 else anchors

    with pytest.raises(UserError, match="iteration 2: the KL is nan nats"):
        guarded(tmp_path, lr=0.001, guard=KLGuard(max_kl=1e9, action="stop"), algorithm=Broken)


def test_without_anything_to_go_back_to_it_stops(tmp_path):
    guarded(tmp_path, lr=0.16, guard=None, until=1)
    with pytest.raises(UserError, match="there is no checkpoint from before the updates that led there"):
        guarded(tmp_path, lr=0.16, guard=KLGuard(max_kl=3), ckpt_path=tmp_path / "checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": 0}, r"callbacks\.kl_guard\.max_kl must be a finite number above 0, got 0"),
        ({"max_kl": 1, "action": "ignore"}, r"callbacks\.kl_guard\.action must be one of stop, rollback, got 'ignore'"),
        ({"max_kl": 1, "lr_factor": 1}, r"callbacks\.kl_guard\.lr_factor must be .* below 1, got 1"),
        ({"max_kl": 1, "max_rollbacks": 0}, r"callbacks\.kl_guard\.max_rollbacks must be"),
    ],
)
def test_wrong_values_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        KLGuard(**settings)


def test_without_checkpoints_to_go_back_to_it_is_refused(trainer):
    with pytest.raises(UserError, match=r"callbacks\.kl_guard needs lit_rlhf\.callbacks\.Checkpoints"):
        trainer(callbacks=[KLGuard(max_kl=1)], max_epochs=1).fit(make(), datamodule=Prompts())


def test_the_checkpoint_that_it_kept_goes_when_a_resumed_run_no_longer_has_it(tmp_path):
    guarded(tmp_path, lr=0.004, guard=KLGuard(max_kl=1000), until=3)
    last = tmp_path / "checkpoints/last.ckpt"
    guarded(tmp_path, lr=0.004, guard=None, until=5, ckpt_path=last)
    names = [path.name for path in written_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step=00000030-epoch=0005.ckpt", "step=00000024-epoch=0004.ckpt"]


def test_it_writes_one_checkpoint_an_iteration_and_one_before_the_first(tmp_path, monkeypatch):
    saved, save = [], L.Trainer.save_checkpoint
    monkeypatch.setattr(L.Trainer, "save_checkpoint", lambda *a, **k: saved.append(save(*a, **k)))
    guarded(tmp_path, lr=0.001, guard=KLGuard(max_kl=50), until=3)
    assert len(saved) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.csv", "samples.jsonl"]


def test_an_algorithm_without_rollouts_has_no_use_for_it(trainer):
    with pytest.raises(UserError, match=r"callbacks\.kl_guard is for algorithms that complete prompts"):
        trainer(callbacks=[KLGuard(max_kl=1)], max_epochs=1).fit(SFT(policy=tiny_policy()), [{"text": ["a b"]}])


def test_a_rollback_whose_checkpoint_cannot_be_written_leaves_those_before(tmp_path):
    class Full(Checkpoints):
        def on_rollback(self, trainer):
            trainer.save_checkpoint = full
            super().on_rollback(trainer)

    def full(*_, **__):
        raise UserError("no space left")

    with pytest.raises(UserError, match="no space left"):
        guarded(tmp_path, lr=0.16, guard=KLGuard(max_kl=3), checkpoints=Full)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["lit_rlhf"]["iteration"] == 1
