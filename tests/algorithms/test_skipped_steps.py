"""A step whose numbers are not finite is skipped, to the bit, and counted; too many in a row end the run."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ppo_runs import fit, make
from tiny import letters, tiny_policy

from lit_rlhf import SFT
from lit_rlhf.algorithms import TRPO
from lit_rlhf.algorithms.base import RunningMean
from lit_rlhf.algorithms.steps import StepGuard
from lit_rlhf.entropy import TargetEntropy
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.sampler import Sampler


class Spoil(L.Callback):
    """Makes one number of some micro-batches NaN or infinite; keeps what was trained before and after each batch."""

    def __init__(self, *batches, what="loss", value=math.nan):
        self.batches, self.what, self.value, self.count, self.trained = batches, what, value, 0, []

    def setup(self, trainer, module, stage):
        loss, callback = module.loss, self

        def spoiled(*args):
            found, metrics = loss(*args)
            callback.count += 1
            if callback.count - 1 not in callback.batches:
                return found, metrics
            if callback.what == "gradient":  # whose loss is finite
                root = module.policy.model.lm_head.weight.flatten()[0]
                return found + torch.sqrt((root - root.detach()).abs()), metrics
            return found * callback.value, metrics

        module.loss = spoiled

    def on_train_batch_start(self, trainer, module, *_):
        self.trained.append(state_of(trainer, module))

    def on_train_end(self, trainer, module):
        self.trained.append(state_of(trainer, module))


def state_of(trainer, module):
    optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
    moments = [x for state in optimizer["state"].values() for x in state.values()]
    return [x.detach().clone() for x in [*module.state_dict().values(), *map(torch.as_tensor, moments)]]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_touches_neither_weights_nor_moments(trainer, optimizer, what):
    spoil = Spoil(1, what=what)
    watch = fit(trainer, make(optimizer=OPTIMIZERS[optimizer]), callbacks=[spoil], max_epochs=1)
    before = spoil.trained
    assert same(before[1], before[2])
    assert not same(before[0], before[1])
    assert not same(before[2], before[3])
    (row,) = watch.rows
    assert (row["optim/skipped_steps"], row["policy/updates"]) == (1, 3)
    assert all(math.isfinite(value) for value in row.values())


CLIP = {"gradient_clip_val": 0.1}
BY_VALUE = {**CLIP, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize("settings", [CLIP, BY_VALUE, {"accumulate_grad_batches": 2}])
def test_with_clipping_and_micro_batches_too(trainer, settings):
    """Of the micro-batches, the first of the second step is bad, and the second is not counted either."""
    micro = settings.get("accumulate_grad_batches", 1)
    spoil = Spoil(micro, value=math.inf)
    watch = fit(trainer, make(optimizer=OPTIMIZERS["adamw"]), callbacks=[spoil], max_epochs=1, **settings)
    steps = spoil.trained[::micro]
    assert same(steps[1], steps[2])
    assert not same(steps[2], steps[3])
    assert watch.rows[0]["optim/skipped_steps"] == 1


def test_the_rows_means_are_those_of_the_other_steps(trainer):
    """SGD without momentum: skipping the first of two steps leaves the second as if it were the first."""
    rows = []
    for spoil in (Spoil(0), Spoil(1)):
        watch = fit(trainer, make(ppo_epochs=1, lr=0.0), callbacks=[spoil], max_epochs=1)
        rows.append(watch.rows[0])
    whole = fit(trainer, make(ppo_epochs=1, lr=0.0), max_epochs=1).rows[0]
    tokens = whole["tokens"]
    # The two halves of the batch, weighted by their tokens, are the whole.
    share = (whole["loss/value"] - rows[0]["loss/value"]) / (rows[1]["loss/value"] - rows[0]["loss/value"])
    assert share * tokens == pytest.approx(round(share * tokens), abs=1e-3)
    assert 0 < share < 1
    entropy = share * rows[1]["policy/entropy"] + (1 - share) * rows[0]["policy/entropy"]
    assert entropy == pytest.approx(whole["policy/entropy"])


@pytest.mark.parametrize("name", ["log-probability", "value", "probability ratio"])
def test_a_number_that_a_finite_loss_hides_is_found(name):
    guard, x = StepGuard(1), torch.ones(1, requires_grad=True)
    loss = guard.spoiled(x.sum(), {name: torch.tensor([1.0, math.inf])})
    loss.backward()
    assert x.grad.isnan()
    assert not guard.check(float(x.grad.norm()), 3)
    assert "1 optimiser steps in a row were skipped, the last one step 3" in guard.verdict
    assert f"(algorithm.max_skipped_steps=1): in the last one the {name} is inf" in guard.verdict


def test_early_stop_and_controllers_do_not_see_a_skipped_step(trainer):
    spoil = Spoil(0, 1, 2, 3)
    entropy = TargetEntropy(target=2.0)
    ppo = make(target_kl=1e-9, entropy=entropy)
    before = entropy.state_dict()
    watch = fit(trainer, ppo, callbacks=[spoil], max_epochs=1)
    (row,) = watch.rows
    assert (row["optim/skipped_steps"], row["policy/updates"], row["policy/early_stopped"]) == (4, 0, 0)
    assert entropy.state_dict() == before
    assert "policy/entropy" not in row


def test_too_many_in_a_row_end_the_run_and_leave_a_checkpoint(trainer, tmp_path):
    """Steps 2 and 3, one good one, then 5, 6, 7: the third in a row."""
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_top_k=0)
    spoil = Spoil(1, 2, 4, 5, 6, 7)
    ppo = make(optimizer=OPTIMIZERS["adamw"], max_skipped_steps=3)
    with pytest.raises(UserError, match=r"3 optimiser steps in a row were skipped, the last one step 7.*the loss is nan"
                       rf".*{tmp_path}/checkpoints/last.ckpt is of this moment"):  # fmt: skip
        fit(trainer, ppo, callbacks=[spoil, keep], enable_checkpointing=True, max_epochs=3)
    stored = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 7
    assert stored["lit_rlhf"]["guard"] == {"in_a_row": {}, "skipped": 3}
    assert all(x.isfinite().all() for x in stored["state_dict"].values())
    # It goes on from there, with all its tries.
    again = make(optimizer=OPTIMIZERS["adamw"], max_skipped_steps=3)
    fit(trainer, again, callbacks=[Spoil(0)], ckpt_path=tmp_path / "checkpoints/last.ckpt", max_epochs=3)
    assert again.guard.verdict is None
    assert again.trainer.global_step == 12


def test_without_a_place_for_checkpoints_it_says_so(trainer):
    with pytest.raises(UserError, match="There is no checkpoint of it: the trainer has no callback"):
        fit(trainer, make(max_skipped_steps=1), callbacks=[Spoil(0)])


class HalfScaler(L.pytorch.plugins.MixedPrecision):
    def __init__(self, init_scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
        super().__init__("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_while_the_scale_is_found_is_counted_and_ends_nothing(trainer, fused):
    """2 ** 40 overflows; the scaler halves its scale until it does not."""
    plugin = HalfScaler(2.0**40)
    ppo = make(optimizer=OPTIMIZERS["fused" if fused else "adamw"], max_skipped_steps=1)
    watch = fit(trainer, ppo, plugins=[plugin], max_epochs=6)
    skipped = sum(row["optim/skipped_steps"] for row in watch.rows)
    assert skipped == 40 - math.log2(plugin.scaler.get_scale()) > 0
    assert sum(row["policy/updates"] for row in watch.rows) == 24 - skipped


def test_at_a_scale_of_one_it_ends_the_run(trainer):
    with pytest.raises(UserError, match="1 optimiser steps in a row"):
        fit(trainer, make(max_skipped_steps=1), callbacks=[Spoil(0)], plugins=[HalfScaler(1.0)])


def test_a_natural_step_that_is_not_finite_is_not_taken(trainer):
    class Broken(TRPO):
        def _surrogate(self, part):
            return super()._surrogate(part) * math.nan

    policy = tiny_policy()
    before = copy.deepcopy(policy.state_dict())
    settings = {"policy": policy, "reward": letters, "sampler": Sampler(max_new_tokens=4), "rollout_batch_size": 8}
    trpo = Broken(minibatch_size=8, epochs=2, max_skipped_steps=2, **settings)
    with pytest.raises(UserError, match=r"2 natural-gradient steps in a row were skipped, the last one step 3"):
        fit(trainer, trpo, max_epochs=3)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert trpo.last_row["optim/skipped_steps"] == 1
    assert trpo.last_row["policy/updates"] == 2  # the critic's


def test_an_offline_algorithm_skips_as_well(trainer):
    policy = tiny_policy()
    rows = [{"text": ["abc", "hello there"]}, {"text": ["xyz", "q"]}, {"text": ["lorem", "ipsum"]}]
    spoil = Spoil(1)
    sft = SFT(policy=policy, log_every_n_steps=1, optimizer=OPTIMIZERS["adamw"])
    trainer(callbacks=[spoil], max_epochs=1).fit(sft, rows)
    before = spoil.trained
    assert same(before[1], before[2])
    assert not same(before[2], before[3])
    assert sft.last_row["optim/skipped_steps"] == 0
    assert math.isfinite(sft.last_row["loss/total"])


def test_a_mean_takes_another_and_leaves_it_empty():
    one, two = RunningMean(), RunningMean()
    one.add({"x": 1.0, "y_max": 3.0}, 1.0)
    two.add({"x": 4.0, "y_max": 2.0}, 2.0)
    one.take(two)
    assert two.sums == {}
    assert one.compute() == {"x": 3.0, "y_max": 3.0}
