"""Each algorithm of fixed data by its config: a run of seconds, resumed, and its export sampled from and evaluated."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from command_line import TINY, run_here, write_ratings

from lit_rlhf.config import CONFIG_DIR

OFFLINE = sorted(
    path.stem for path in (CONFIG_DIR / "algorithm").glob("*.yaml")
    if {"override /callbacks": "offline"} in (yaml.safe_load(path.read_text())["defaults"] or [])
    and path.stem not in ("sft", "reward_model")
)  # fmt: skip
SMALL = [
    "policy=tiny", "policy.hidden_size=16", "policy.intermediate_size=16", "data.batch_size=8", "logger=csv",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=1", "algorithm.log_every_n_steps=1", "algorithm.max_length=64",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    write_ratings(folder / "cache", 80)
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder / "cache"))


def rows(run):
    with open(Path(run) / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_family_is_complete():
    assert {"dpo", "robust_dpo", "ipo", "kto", "orpo", "ilql", "dqn"} <= set(OFFLINE)


@pytest.mark.parametrize("name", [*OFFLINE, "cdpo"])
def test_an_algorithm_runs_by_its_name(name):
    assert run_here("train", f"algorithm={name}", *SMALL, "trainer.max_epochs=1", "paths.output_dir=run").code == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "completed"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["optimized_metric"] in summary
    assert Path("run/model/model.safetensors").is_file()
    assert Path("run/report.html").is_file()


def test_a_run_goes_on_where_another_stopped():
    command = ["train", "algorithm=ilql", *SMALL]
    assert run_here(*command, "trainer.max_epochs=2", "paths.output_dir=whole").code == 0
    assert run_here(*command, "trainer.max_epochs=1", "paths.output_dir=rest").code == 0
    resumed = run_here(*command, "trainer.max_epochs=2", "ckpt_path=auto", "paths.output_dir=rest")
    assert resumed.code == 0, resumed.err
    assert rows("rest") == rows("whole")


def test_ilqls_export_is_sampled_from_and_evaluated_by_another_runs_reward():
    assert run_here("train", "algorithm=ilql", *SMALL, "trainer.max_epochs=1", "paths.output_dir=ilql").code == 0
    guidance = json.loads(Path("ilql/model/guidance.json").read_text())
    assert guidance == {"beta": 1.0, "prior": 1.0, "heads": 2}
    sampled = run_here("sample", "policies=[ilql/model]", "prompts=[A film]", "sampler.max_new_tokens=4")
    assert sampled.code == 0, sampled.err
    assert run_here("train", *TINY, "reward=length", "reward.target=4", "paths.output_dir=ppo").code == 0
    policy = "{_target_: lit_rlhf.models.Policy.from_pretrained, path: ilql/model}"
    evaluated = run_here(
        "eval", "run=ppo", "checkpoint=null", f"+overrides.policy={policy}", "paths.output_dir=evaluated"
    )
    assert evaluated.code == 0, evaluated.err
    found = json.loads(Path("evaluated/evaluation.json").read_text())["policies"]
    assert found["policy"]["1"]["objective/kl"]["value"] == 0
