"""A run that stops and continues is the run that never stopped: weights, rows and samples, to the bit."""

import copy
import csv
import math
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import LORA, Prompts, letters, tiny_policy
from transformers import get_scheduler

from lit_rlhf import algorithms
from lit_rlhf.algorithms import PPO
from lit_rlhf.baseline import ValueBaseline
from lit_rlhf.callbacks import Samples
from lit_rlhf.clip import AdaptiveKLPenalty
from lit_rlhf.entropy import TargetEntropy
from lit_rlhf.kl import AdaptiveKL
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.models.critic import SeparateCritic, ValueHead
from lit_rlhf.rewards.shaping import ScoreShaper
from lit_rlhf.rollout.sampler import Sampler


class Stop(L.Callback):
    """Ends the run as a kill would, right after a checkpoint: nothing behind it is finished or written."""

    def __init__(self, *, iteration=None, step=None):
        self.iteration, self.step = iteration, step

    def on_train_batch_start(self, trainer, module, _batch, _index):
        if (module.iteration, trainer.global_step) == (self.iteration, None) or trainer.global_step == self.step:
            raise Killed


class Killed(Exception):
    pass


def make(lora=None, algorithm=PPO, **changes):
    settings = {
        "reward": letters, "gold": letters, "rollout_batch_size": 6, "minibatch_size": 2,
        **({"ppo_epochs": 2} if algorithm is PPO else {}),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    }  # fmt: skip
    return algorithm(
        policy=tiny_policy(lora=lora),
        sampler=Sampler(max_new_tokens=5),
        kl=AdaptiveKL(init_coef=0.1, target=0.01, horizon=50),
        scores=ScoreShaper(normalize=True),
        seed=4,
        **{**settings, **changes},
    )


def run(folder, ppo, *, until=6, ckpt_path=None, every_n_train_steps=None, stop=None, extra=(), **settings):
    """6 optimiser steps an iteration. Checkpoints: at the end of each iteration, or every n steps."""
    when = {"every_n_train_steps": every_n_train_steps} if every_n_train_steps else {"save_on_train_epoch_end": True}
    checkpoints = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, save_top_k=0, **when)
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=CSVLogger(save_dir=folder), enable_progress_bar=False,
        callbacks=[checkpoints, Samples(every_n_iterations=1, max_samples=4), *([stop] if stop else []), *extra],
        enable_model_summary=False, num_sanity_val_steps=0,
        **{"max_epochs": until, "check_val_every_n_epoch": 2, **settings},
    )  # fmt: skip
    try:
        trainer.fit(ppo, datamodule=Prompts(validation=True), ckpt_path=ckpt_path)
    except Killed:
        pass
    return ppo


def written(folder):
    """All rows but wall-clock columns, and all samples, as text."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
                for row in csv.DictReader(file)]  # fmt: skip
    return rows, (folder / "samples.jsonl").read_text()


def assert_same(one, two, folder_one, folder_two):
    states = (one.state_dict(), two.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows, samples = zip(written(folder_one), written(folder_two), strict=True)
    assert rows[0] == rows[1]
    assert samples[0] == samples[1]
    assert one.axes == two.axes
    assert one.kl.coef == two.kl.coef


@pytest.mark.parametrize("lora", [None, LORA])
def test_three_and_three_iterations_equal_six(tmp_path, lora):
    each = {"check_val_every_n_epoch": 1}  # a run's last iteration is validated in any case
    whole = run(tmp_path / "whole", make(lora), **each)
    run(tmp_path / "split", make(lora), until=3, **each)
    resumed = run(tmp_path / "split", make(lora), ckpt_path=tmp_path / "split/checkpoints/last.ckpt", **each)
    assert resumed.iteration == 6
    assert [int(row["iteration"]) for row in written(tmp_path / "split")[0]] == [1, 2, 3, 4, 5, 6]
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


@pytest.mark.parametrize(("lora", "critic"), [(None, SeparateCritic), (LORA, ValueHead)])
def test_a_run_with_weights_in_half_precision_resumes_exactly(tmp_path, lora, critic):
    settings = {"precision": "bf16-true", "until": 2}
    whole = run(tmp_path / "whole", make(lora, critic=critic), **settings)
    run(tmp_path / "split", make(lora, critic=critic), **settings, every_n_train_steps=4, stop=Stop(step=5))
    last = tmp_path / "split/checkpoints/last.ckpt"
    resumed = run(tmp_path / "split", make(lora, critic=critic), ckpt_path=last, **settings)
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")
    assert whole.policy.base.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four iterations that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, make(), until=4), folder


@pytest.mark.parametrize("steps", [1, 4, 6, 11, 13, 18])
def test_a_kill_in_the_middle_of_an_iteration_changes_nothing(whole, tmp_path, steps):
    """A checkpoint every ``steps`` steps, a kill after the second one (or the first, late in the run)."""
    whole, folder = whole
    kill = Stop(step=min(2 * steps, 23))
    run(tmp_path / "split", make(), until=4, every_n_train_steps=steps, stop=kill)
    resumed = run(tmp_path / "split", make(), until=4, ckpt_path=tmp_path / "split/checkpoints/last.ckpt")
    assert_same(whole, resumed, folder, tmp_path / "split")


@pytest.mark.parametrize("steps", [5, 12])
def test_resume_is_exact_when_max_steps_bounds_the_run(tmp_path, steps):
    bounded = {"max_epochs": -1, "max_steps": 20}
    whole = run(tmp_path / "whole", make(), **bounded)
    run(tmp_path / "split", make(), every_n_train_steps=steps, stop=Stop(step=steps), **bounded)
    resumed = run(tmp_path / "split", make(), ckpt_path=tmp_path / "split/checkpoints/last.ckpt", **bounded)
    assert resumed.trainer.global_step == 20
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


@pytest.mark.parametrize("steps", [6, 7, 9])
def test_a_run_that_max_steps_ended_extends_exactly_to_all_its_iterations(tmp_path, steps):
    bounds = {"until": 4, "check_val_every_n_epoch": 1}  # a run's last iteration is validated in any case
    whole = run(tmp_path / "whole", make(), **bounds)
    run(tmp_path / "split", make(), max_steps=steps, **bounds)
    resumed = run(tmp_path / "split", make(), ckpt_path=tmp_path / "split/checkpoints/last.ckpt", **bounds)
    assert resumed.trainer.global_step == 24
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_resume_is_exact_when_updates_stop_early(tmp_path, steps):
    whole = run(tmp_path / "whole", make(target_kl=2e-4), until=4)
    assert any(row["policy/early_stopped"] == "1.0" for row in written(tmp_path / "whole")[0])
    run(tmp_path / "split", make(target_kl=2e-4), until=4, every_n_train_steps=1, stop=Stop(step=steps))
    resumed = run(tmp_path / "split", make(target_kl=2e-4), until=4, ckpt_path=tmp_path / "split/checkpoints/last.ckpt")
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


FAMILY = {
    "A2C": {},
    "Reinforce": {},
    "Reinforce with values": {"baseline": ValueBaseline()},
    "ReinforcePP": {"epochs": 2},
    "RLOO": {"group_size": 3, "epochs": 2, "clip": AdaptiveKLPenalty(target=1e-4)},
    "GRPO": {"group_size": 3, "epochs": 2},
    "DrGRPO": {"group_size": 3},
    "DAPO": {"group_size": 2, "kept_batch_size": 4},
    "GSPO": {"group_size": 3},
    "RAFT": {"group_size": 2, "minibatch_size": 1},
    "ExpertIteration": {"group_size": 2, "threshold": 0.0},
    "OnlineDPO": {"epochs": 2},
    "TRPO": {"epochs": 2},
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_algorithm_resumes_from_the_middle_of_an_iteration(tmp_path, name):
    def fresh():
        return make(algorithm=getattr(algorithms, name.split()[0]), **copy.deepcopy(FAMILY[name]))

    whole = run(tmp_path / "whole", fresh(), until=2)
    steps = whole.steps_per_epoch()
    middle = steps + steps // 2  # of the second iteration
    run(tmp_path / "split", fresh(), until=2, every_n_train_steps=middle, stop=Stop(step=middle))
    resumed = run(tmp_path / "split", fresh(), until=2, ckpt_path=tmp_path / "split/checkpoints/last.ckpt")
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")
    start = tiny_policy().state_dict()
    assert any(not torch.equal(start[k], v) for k, v in resumed.policy.state_dict().items())


def test_micro_batches_resume_too(tmp_path):
    whole = run(tmp_path / "whole", make(), until=3, accumulate_grad_batches=2)
    run(tmp_path / "split", make(), until=3, accumulate_grad_batches=2, every_n_train_steps=4, stop=Stop(step=9))
    resumed = run(tmp_path / "split", make(), until=3, accumulate_grad_batches=2,
                  ckpt_path=tmp_path / "split/checkpoints/last.ckpt")  # fmt: skip
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


def test_the_same_seed_twice_is_identical_and_two_seeds_differ(tmp_path):
    one, two = (run(tmp_path / name, make(), until=2) for name in ("one", "two"))
    assert_same(one, two, tmp_path / "one", tmp_path / "two")
    other = make()
    other.seed = 5
    run(tmp_path / "other", other, until=2)
    assert written(tmp_path / "other")[1] != written(tmp_path / "one")[1]


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path):
    from lit_rlhf.errors import UserError

    run(tmp_path, make(LORA), until=1)
    with pytest.raises(UserError, match="another configuration"):
        run(tmp_path, make(), ckpt_path=tmp_path / "checkpoints/last.ckpt")


class Spoiled(PPO):
    """Steps 3, 4, 9 and 10 are bad, by the first of their micro-batches."""

    def loss(self, *args):
        loss, metrics = super().loss(*args)
        bad = self.trainer.global_step in (2, 3, 8, 9) and self.loader.position % 2
        return (loss * math.nan if bad else loss), metrics


@pytest.mark.parametrize("steps", [3, 4, 9])
def test_a_run_that_skips_steps_resumes_between_them(tmp_path, steps):
    def fresh():
        return make(algorithm=Spoiled, ppo_epochs=2)

    def split(**settings):
        return run(tmp_path / "split", fresh(), until=2, accumulate_grad_batches=2, **settings)

    whole = run(tmp_path / "whole", fresh(), until=2, accumulate_grad_batches=2)
    assert [float(row["optim/skipped_steps"]) for row in written(tmp_path / "whole")[0]] == [2, 2]
    split(every_n_train_steps=steps, stop=Stop(step=steps))
    resumed = split(ckpt_path=tmp_path / "split/checkpoints/last.ckpt")
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")
    assert resumed.guard.state_dict() == whole.guard.state_dict()


class Draws(L.Callback):
    """Code of a user's that draws from the global generators, which nobody seeds but the run."""

    def __init__(self):
        self.numbers = []

    def on_train_batch_end(self, trainer, *_):
        self.numbers.append((trainer.global_step, random.random(), float(np.random.rand()), float(torch.rand(()))))


class Learns:
    """A reward with noise and with state: the mean of its own past scores is taken off."""

    def __init__(self):
        self.seen, self.total = 0, 0.0

    def __call__(self, prompts, completions, **columns):
        mean = self.total / max(1, self.seen)
        return [score - mean + random.random() for score in letters(prompts, completions)]

    def learn_from(self, scores):
        self.seen, self.total = self.seen + len(scores.total), self.total + float(scores.total.sum())

    def state_dict(self):
        return {"seen": self.seen, "total": self.total}

    def load_state_dict(self, state):
        self.seen, self.total = state["seen"], state["total"]


def everything(lora=None):
    algorithm = make(
        lora, critic=SeparateCritic, entropy=TargetEntropy(target=2.0, lr=0.5), clip=AdaptiveKLPenalty(target=1e-3),
        reward=Learns(), scheduler=lambda optimizer, num_training_steps: get_scheduler(
            "linear", optimizer, num_warmup_steps=3, num_training_steps=num_training_steps
        ),
    )  # fmt: skip
    algorithm.config = {"seed": 4, "kl": {"init_coef": 0.1}}
    return algorithm


def checkpoint_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def differing(one, two, where=""):
    """The places in which two checkpoints differ, but for times."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [k for k in {**one, **two} if not str(k).startswith("time/") and "per_second" not in str(k)]
        return [place for k in keys for place in differing(one.get(k), two.get(k), f"{where}.{k}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [place for n, (a, b) in pairs for place in differing(a, b, f"{where}[{n}]")]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two
    return [] if same else [where]


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_checkpoint_holds_all_that_a_run_is_made_of(tmp_path, lora):
    """Two iterations, a kill in the middle of the second, four more: the last checkpoints are the same."""
    L.seed_everything(5)
    draws, rest = Draws(), Draws()
    whole = run(tmp_path / "whole", everything(lora), every_n_train_steps=3, until=3, stop=draws)
    L.seed_everything(5)

    class DrawsUntil(Draws):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 10:
                raise Killed

    run(tmp_path / "cut", everything(lora), every_n_train_steps=3, until=3, stop=DrawsUntil())
    held = checkpoint_of(tmp_path / "cut")
    L.seed_everything(6)  # another process has other generators
    resumed = run(tmp_path / "cut", everything(lora), every_n_train_steps=3, until=3, stop=rest,
                  ckpt_path=tmp_path / "cut/checkpoints/last.ckpt")  # fmt: skip
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "cut")
    assert rest.numbers == draws.numbers[9:]
    ends = [checkpoint_of(tmp_path / name) for name in ("whole", "cut")]
    for end in ends:
        end.pop("callbacks"), end.pop("loops")
    assert differing(*ends) == []

    state = held["lit_rlhf"]
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert set(held["state_dict"]) == trained  # the policy and its critic
    assert any(name.startswith("critic.") for name in trained)
    assert all(("lora_" in name) == bool(lora) for name in trained if name.startswith("policy."))
    assert len(held["optimizer_states"][0]["state"]) == len(trained)
    assert held["lr_schedulers"][0]["last_epoch"] == held["global_step"] == 9
    assert {"kl", "clip", "entropy"} == set(state["controllers"])
    assert state["controllers"]["kl"]["coef"] != 0.1
    assert state["scores"]["count"] == 12  # of the running moments: two rollouts of six
    assert (state["loader"]["iteration"], state["loader"]["position"]) == (1, 3)
    assert state["loader"]["experience"]["response_ids"].shape[0] == 6
    assert state["loader"]["prompts"]
    assert (state["iteration"], state["last_logged"]) == (1, 1)
    assert state["tokens"] > 12
    assert state["reference"] == whole.reference_id
    assert state["reward"]["seen"] == 12
    assert len(state["generators"]) == 1
    assert len(state["samples"]) == 6
    assert held["config"] == {"seed": 4, "kl": {"init_coef": 0.1}}
