"""What runs out of memory is done again in halves, with the same result; once more, and the run says what to set."""

import re
import subprocess
import sys

import lightning as L
import pytest
import torch
from algorithms.test_resume import Stop, assert_same, make, run
from classifiers import save_classifier
from command_line import TINY, environment, run_here
from ppo_runs import Watch, fit
from ppo_runs import make as ppo
from tiny import Prompts, letters, tiny_policy
from torch.testing import assert_close

from lit_rlhf import algorithms
from lit_rlhf.algorithms import DPO, KTO, SFT
from lit_rlhf.checkpoint_io import damage
from lit_rlhf.errors import UserError
from lit_rlhf.halving import Halving, out_of_memory
from lit_rlhf.models.critic import SeparateCritic
from lit_rlhf.models.scorer import Scorer
from lit_rlhf.rewards import ModelReward
from lit_rlhf.rollout.sampler import Sampler

#: stage -> the part of the algorithm that makes its passes, and the method; an update's are the algorithm's own
PASSES = {"rollout": ("sampler", "_decode"), "anchor": ("policy", "forward"), "natural": ("policy", "forward")}


class Tight(L.Callback):
    """Passes with more than ``rows`` rows find no memory.

    Args:
        stage: "rollout", "anchor", "forward" or "backward" of an update, "early", the backward pass of the policy
            before that of a separate critic, or "natural", TRPO's own passes.
        rows: that fit.
        after: passes of the stage, whatever their size, that find enough.
    """

    def __init__(self, stage, rows, *, after=0, error=torch.OutOfMemoryError):
        self.stage, self.rows, self.left, self.error = stage, rows, after, error
        self.failed = []

    def setup(self, trainer, module, stage):
        part, name = PASSES.get(self.stage, (None, "policy_loss" if self.stage == "early" else "batch_loss"))
        owner = getattr(module, part) if part else module
        passes = getattr(owner, name)

        def tight(*args, **kwargs):
            rows = len(args[1]) if self.stage == "rollout" else len(args[0]) if part else module.rows_of(args[0])
            result = passes(*args, **kwargs)
            if self.stage in ("backward", "early"):
                loss = result[0] if self.stage == "early" else result
                loss.register_hook(lambda _: self.check(rows))
            elif self.stage in ("rollout", "forward") or torch.is_grad_enabled() == (self.stage == "natural"):
                self.check(rows)
            return result

        setattr(owner, name, tight)

    def check(self, rows):
        if rows > self.rows and self.left <= 0:
            self.failed.append(rows)
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB")
        self.left -= 1


class Rows(Watch):
    def on_train_batch_start(self, *_):
        pass  # makes no forward pass of its own


def outcome(trainer, algorithm, *callbacks, **settings):
    watch = Rows()
    trainer(callbacks=[watch, *callbacks], max_epochs=2, **settings).fit(algorithm, datamodule=Prompts())
    rows = [{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k} for row in watch.rows]
    return algorithm.state_dict(), rows, watch.samples


def assert_close_runs(one, two):
    assert_close(one[0], two[0], atol=2e-6, rtol=1e-5)
    assert [row["completion"] for row in one[2]] == [row["completion"] for row in two[2]]
    for row, other in zip(one[1], two[1], strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"policy/clipfrac", "value/clipfrac"}:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_a_rollout_halves_its_chunks_for_good(trainer, caplog):
    whole = outcome(trainer, ppo())
    tight = Tight("rollout", 4)
    assert_close_runs(outcome(trainer, ppo(), tight), whole)
    assert tight.failed == [8]
    said = [message for message in caplog.messages if "out of memory" in message]
    assert len(said) == 1
    assert re.search(r"stage 'rollout' with 8 rows .* From now on it takes 4; set sampler.chunk_size to", said[0])
    halved = outcome(trainer, ppo(sampler=Sampler(max_new_tokens=6, chunk_size=4)))
    assert all(torch.equal(x, halved[0][name]) for name, x in outcome(trainer, ppo(), Tight("rollout", 4))[0].items())


def test_anchors_halve_too(trainer):
    whole = outcome(trainer, ppo())
    tight = Tight("anchor", 2)
    assert_close_runs(outcome(trainer, ppo(), tight), whole)
    assert tight.failed == [4]


FAMILY = {
    "PPO": {"target_kl": 1.0},
    "PPO with a separate critic": {"critic": SeparateCritic},
    "GRPO": {"group_size": 4, "epochs": 2},
    "OnlineDPO": {"group_size": 4},
    "TRPO": {"epochs": 2},
}


def online(name, **changes):
    settings = {"ppo_epochs": 2} if name == "PPO" else {}
    common = {"reward": letters, "rollout_batch_size": 8, "minibatch_size": 8, "seed": 3}
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5)}
    sampler = Sampler(max_new_tokens=6)
    settings = {**settings, **common, **sgd, **FAMILY[name], **changes}
    return getattr(algorithms, name.split()[0])(policy=tiny_policy(), sampler=sampler, **settings)


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize(("name", "micro"), [*((name, 1) for name in FAMILY), ("PPO", 2), ("GRPO", 2)])
def test_an_update_does_its_step_again_with_the_same_gradient(trainer, stage, name, micro):
    """With two micro-batches it is the second that fails: what the first left is not counted twice."""
    whole = outcome(trainer, online(name), accumulate_grad_batches=micro)
    tight = Tight(stage, 4 // micro, after=micro - 1)
    assert_close_runs(outcome(trainer, online(name), tight, accumulate_grad_batches=micro), whole)
    assert tight.failed == [8 // micro]


@pytest.mark.parametrize("micro", [1, 2])
def test_the_policys_backward_pass_before_a_separate_critics_is_done_again_once(trainer, micro):
    name = "PPO with a separate critic"
    whole = outcome(trainer, online(name), accumulate_grad_batches=micro)
    tight = Tight("early", 4 // micro, after=micro - 1)
    assert_close_runs(outcome(trainer, online(name), tight, accumulate_grad_batches=micro), whole)
    assert tight.failed == [8 // micro]
    with pytest.raises(UserError, match="out of memory in stage 'update' with 4 rows at once"):
        outcome(trainer, online(name), Tight("early", 2))


def test_a_natural_step_is_taken_in_halves_from_where_it_began(trainer):
    """To the bit as if it had been halves from the start; against whole ones conjugate gradients magnify rounding."""
    halves = online("TRPO")
    halves.halving.load_state(["update"])
    expected = outcome(trainer, halves)
    tight = Tight("natural", 4, after=2)
    found = outcome(trainer, online("TRPO"), tight)
    assert tight.failed == [8]
    assert all(torch.equal(x, found[0][name]) for name, x in expected[0].items())
    one_product = {"cg_steps": 1, "line_search_steps": 1}
    whole = outcome(trainer, online("TRPO", **one_product))
    assert_close_runs(outcome(trainer, online("TRPO", **one_product), Tight("natural", 4, after=2)), whole)


@pytest.mark.parametrize(
    ("stage", "key"),
    [("rollout", r"sampler\.chunk_size"), ("anchor", r"algorithm\.minibatch_size"),
     ("forward", r"policy\.gradient_checkpointing=true or, .* trainer\.accumulate_grad_b"), ("backward", "policy")],
)  # fmt: skip
def test_a_second_time_it_says_what_to_set(trainer, stage, key):
    with pytest.raises(UserError, match=rf"out of memory in stage '\w+' with \d rows at once: CUDA out of.* Set {key}"):
        fit(trainer, ppo(), callbacks=[Tight(stage, 1)])


@pytest.mark.parametrize("stage", ["rollout", "anchor", "forward", "backward"])
def test_other_errors_are_left_as_they_are(trainer, stage):
    class Other(RuntimeError):
        def __init__(self, _):
            super().__init__("shapes do not fit")

    with pytest.raises(Other, match="shapes do not fit"):
        fit(trainer, ppo(), callbacks=[Tight(stage, 1, error=Other)])


class Third(Tight):
    """The third optimiser step and later ones."""

    def setup(self, trainer, module, stage):
        self.trainer = trainer
        super().setup(trainer, module, stage)

    def check(self, rows):
        if self.trainer.global_step >= 2:
            super().check(rows)


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_resume_goes_on_in_halves(tmp_path, step):
    """The checkpoint is from before the third step, from right behind it, or from later."""
    def tight(folder, **settings):
        third = Third("forward", 3)
        return run(folder, make(ppo_epochs=2, minibatch_size=6), until=5, extra=[third], **settings), third

    whole, _ = tight(tmp_path / "whole")
    tight(tmp_path / "split", every_n_train_steps=step, stop=Stop(step=step))
    resumed, third = tight(tmp_path / "split", ckpt_path=tmp_path / "split/checkpoints/last.ckpt")
    assert third.failed == ([6] if step == 2 else [])
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")


TEXTS = ["abc", "hello there", "xyz", "q", "lorem", "ipsum and more"]
ROWS = {
    SFT: [{"text": TEXTS[:4]}, {"text": TEXTS[2:]}],
    DPO: [{"chosen": TEXTS[:3], "rejected": TEXTS[3:]}, {"chosen": TEXTS[1:5], "rejected": TEXTS[:4]}],
}


@pytest.mark.parametrize("algorithm", ROWS)
@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("micro", [1, 2])
def test_an_offline_update_is_done_again_as_well(trainer, algorithm, stage, micro):
    results = []
    for callbacks in ([], [Tight(stage, 2, after=0)]):
        module = algorithm(policy=tiny_policy(), log_every_n_steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
        trainer(callbacks=callbacks, max_epochs=2, accumulate_grad_batches=micro).fit(module, ROWS[algorithm])
        results.append((module.state_dict(), module.last_row, module.axes))
    assert callbacks[0].failed
    assert_close(results[0][0], results[1][0], atol=2e-6, rtol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-6)
    assert results[0][2] == results[1][2]


def test_a_loss_that_is_no_mean_over_parts_is_not_split(trainer):
    kto = KTO(policy=tiny_policy(), log_every_n_steps=1)
    rows = [{"completion": TEXTS[:4], "label": [True, False, True, False]}]
    with pytest.raises(UserError, match=r"out of memory in stage 'update' with 4 rows .*data\.batch_size"):
        trainer(callbacks=[Tight("forward", 2)], max_epochs=1).fit(kto, rows)


def test_a_reward_model_scores_in_halves(tmp_path, monkeypatch):
    save_classifier(tmp_path)
    reward = ModelReward(path=str(tmp_path), batch_size=4)
    expected = reward(prompts=[""] * 6, completions=TEXTS)
    scores, sizes = Scorer.forward, []

    def tight(self, ids, mask):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores(self, ids, mask)

    monkeypatch.setattr(Scorer, "forward", tight)
    for _ in range(2):
        assert_close(reward(prompts=[""] * 6, completions=TEXTS), expected)
    assert sizes == [4, 2, 2, 2, 2, 2, 2]


REAL = """
import resource, torch
from lit_rlhf.halving import Halving

def work(rows):
    return torch.ones(rows, 10_000_000).sum().item()

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 250_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(Halving().run("rollout", 8, work))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_the_cpu_allocators_error_is_one(tmp_path):
    """8 rows of 40 MB do not fit into 250 MB, 4 do."""
    done = subprocess.run([sys.executable, "-c", REAL], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "40000000.0", done.stderr
    assert "out of memory in stage 'rollout' with 8 rows at once" in done.stderr


def test_what_is_a_lack_of_memory():
    for error in (torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


def test_one_row_cannot_be_halved():
    with pytest.raises(UserError, match="with 1 rows at once"):
        Halving().run("rollout", 1, lambda _: (_ for _ in ()).throw(MemoryError()))


def test_a_run_that_ends_because_of_it_names_the_newest_checkpoint(tmp_path):
    tight = ["+callbacks.tight._target_=test_out_of_memory.Tight", "+callbacks.tight.stage=forward"]
    command = ["train", *TINY, *tight, "+callbacks.tight.rows=0", f"paths.output_dir={tmp_path}/run"]
    result = run_here(*command, "trainer.limit_val_batches=0", "trainer.max_epochs=2", "+callbacks.tight.after=3")
    assert result.code == 1
    path = tmp_path / "run/checkpoints/step=00000002-epoch=0001.ckpt"  # the second step of the second iteration fails
    assert f"The newest checkpoint is {path}; ckpt_path={path} goes on from there" in result.err
    assert damage(path) is None
