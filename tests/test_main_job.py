"""The main job on the real models and ratings: what the README says it reaches, from the command itself."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def lit_rlhf(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-m", "lit_rlhf", *arguments], cwd=folder, env=environment)
    assert done.returncode == 0


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what the clock says."""
    with open(run / "metrics.csv", newline="") as file:
        timed = ("time/", "rollout/tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    lit_rlhf(folder, "pipeline", "experiment=human_ratings")
    return folder / "outputs" / "human_ratings"


def test_people_s_ratings_move_the_policy_as_far_as_the_readme_says(job):
    reward_model, ppo = summary(job / "reward_model"), summary(job / "ppo")
    assert reward_model["val/reward_model/accuracy"] >= 0.89
    first = next(row for row in rows(job / "ppo") if row["val/gold/vader"])
    assert ppo["val/gold/vader"] - float(first["val/gold/vader"]) >= 0.35
    assert ppo["val/objective/scores"] > float(first["val/objective/scores"])
    assert 0 < ppo["val/objective/kl"] < 25
    validated = [json.loads(line) for line in (job / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert sum(row["split"] == "validation" and row["iteration"] == ppo["iteration"] for row in validated) == 200
    assert max(summary(job / stage)["peak_memory_gb"] for stage in ("sft", "reward_model", "ppo")) < 5


def test_the_same_seed_twice_is_the_same_run_and_another_seed_is_not(job, tmp_path):
    settings = [
        "train", "experiment=human_ratings/ppo", f"policy.path={job}/sft/model",
        f"reward.path={job}/reward_model/model", "trainer.max_epochs=2", "trainer.limit_val_batches=1",
    ]  # fmt: skip
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        lit_rlhf(tmp_path, *settings, f"seed={seed}", f"paths.output_dir={tmp_path}/{name}")
    files = [f"{name}/model/model.safetensors" for name in ("one", "two", "three")]
    weights = [(tmp_path / file).read_bytes() for file in files]
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two", "three")]
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert samples[0] == samples[1]
    assert weights[0] == weights[1]
    assert rows(tmp_path / "one") != rows(tmp_path / "three")
    assert samples[0] != samples[2]
    assert weights[0] != weights[2]
