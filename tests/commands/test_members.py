"""Members of the groups that have no tests of their own: each changes a run as its name says."""

import csv
import json
from pathlib import Path

import pytest
import torch
from command_line import TINY, run_here
from safetensors.torch import load_file

STEPS = ["trainer.max_epochs=4", "paths.output_dir=run"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(optimizer):
    settings = [f"optimizer={optimizer}", "optimizer.lr=0.01", "kl.coef=1", "reward=function",
                "reward.function=tiny.letters", f"paths.output_dir={optimizer}"]  # fmt: skip
    assert run_here("train", *TINY, *settings).code == 0
    return torch.cat([x.flatten() for x in load_file(f"{optimizer}/model/model.safetensors").values()])


def test_every_optimizer_takes_another_way():
    after = [weights(kind) for kind in ("adamw", "adam", "sgd", "adafactor")]
    for i, one in enumerate(after):
        for other in after[i + 1 :]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [  # of 8 steps, after every second: the rate of the step that comes next
        (["scheduler=constant"], [1, 1, 1, 1]),
        (["scheduler=linear"], [0.75, 0.5, 0.25, 0]),
        (["scheduler=linear", "scheduler.num_warmup_steps=4"], [0.5, 1, 0.5, 0]),
        (["scheduler=cosine"], [0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5, 0]),  # (1 + cos(pi t)) / 2
    ],
)
def test_the_learning_rate_follows_the_scheduler(scheduler, rates):
    assert run_here("train", *TINY, *scheduler, "optimizer.lr=0.001", *STEPS).code == 0
    with open("run/metrics.csv", newline="") as file:
        found = [float(row["optim/lr"]) for row in csv.DictReader(file) if row["optim/lr"]]
    assert found == pytest.approx([0.001 * rate for rate in rates], abs=1e-12)


@pytest.mark.parametrize("member", ["greedy", "nucleus"])
def test_a_sampler_for_evaluation_is_refused_in_training(member):
    result = run_here("train", *TINY, f"sampler={member}")
    assert result.code == 1
    assert {"greedy": "temperature", "nucleus": "top_p"}[member] in result.err
    assert "Traceback" not in result.err


def test_greedy_samples_are_the_same_for_every_seed_and_others_are_not():
    assert run_here("train", *TINY, *STEPS).code == 0
    command = ["sample", "policies=[run/model]", "prompts=[A film]", "sampler.max_new_tokens=8"]
    for member in ("greedy", "default", "nucleus"):
        one, other = (run_here(*command, f"sampler={member}", f"seed={seed}") for seed in (0, 1))
        assert one.code == other.code == 0
        assert (one.out == other.out) is (member == "greedy")


def test_a_fast_dev_run_takes_one_step_and_leaves_no_checkpoint():
    assert run_here("train", *TINY, "trainer=fast_dev_run", "trainer.accelerator=cpu", *STEPS).code == 0
    assert not Path("run/checkpoints").exists()
    assert json.loads(Path("run/summary.json").read_text())["status"] == "completed"
