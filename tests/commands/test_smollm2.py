"""Every algorithm by its name on SmolLM2: two optimiser steps, and the second one again from the checkpoint between."""

import csv
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from command_line import run_here
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from lit_rlhf.config import CONFIG_DIR

pytestmark = pytest.mark.real

ALGORITHMS = sorted(path.stem for path in (CONFIG_DIR / "algorithm").glob("*.yaml"))
#: Where an algorithm has the key.
SMALL = {
    "rollout_batch_size": 4, "group_size": 2, "kept_batch_size": 4, "minibatch_size": 2, "epochs": 1, "ppo_epochs": 1,
    "cg_steps": 2, "threshold": 0.0, "max_length": 16, "log_every_n_steps": 1,
}  # fmt: skip
CHANGES = {"raft": {"minibatch_size": 1}}  # of each prompt it learns from the best completion alone
#: A checkpoint after each step, steps/1.ckpt and steps/2.ckpt.
KEEP = (
    "+callbacks.steps={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: steps, filename: '{step}', "
    "auto_insert_metric_name: false, save_top_k: -1, every_n_train_steps: 1}"
)


@pytest.fixture
def scratch(monkeypatch):
    """A working directory that does not stay: a run's folder holds half a gigabyte and more."""
    with tempfile.TemporaryDirectory() as path, monkeypatch.context() as patch:
        patch.chdir(path)
        yield


def command(name: str, policy: str) -> list[str]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=[f"algorithm={name}"])
    small = {key: value for key, value in {**SMALL, **CHANGES.get(name, {})}.items() if key in config.algorithm}
    arguments = ["train", f"algorithm={name}", *(f"algorithm.{key}={value}" for key, value in small.items())]
    if "policy" in config:
        arguments.append(f"policy={policy}")
    if "sampler" in config:
        arguments.append("sampler.max_new_tokens=6")
        if name != "expert_iteration":  # whose reward says right or wrong
            arguments.append("reward=length")  # it tells short completions apart, of which a lexicon knows no word
    else:
        arguments.append("trainer.limit_train_batches=2")
    return [*arguments, "data.batch_size=2", "logger=csv", "trainer.max_epochs=1", "trainer.limit_val_batches=0"]


def rows(run: str) -> list[dict[str, str]]:
    """metrics.csv without blanks and without what the clock says."""
    timed = ("time/", "rollout/tokens_per_second")
    with open(Path(run) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith(timed)} for row in csv.DictReader(file)]


def trained_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def exported_weights(run: str) -> dict[str, torch.Tensor]:
    files = sorted((Path(run) / "model").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "policy"), [*((name, "smollm2_lora") for name in ALGORITHMS), ("ppo", "smollm2")])
def test_an_algorithm_trains_smollm2_and_resumes_to_the_bit(name, policy, scratch):
    arguments = command(name, policy)
    whole = run_here(*arguments, KEEP, "paths.output_dir=whole")
    assert whole.code == 0, whole.err
    rest = run_here(*arguments, "ckpt_path=steps/1.ckpt", "paths.output_dir=rest")
    assert rest.code == 0, rest.err
    assert json.loads(Path("whole/summary.json").read_text())["status"] == "completed"

    logged = rows("whole")
    assert all(math.isfinite(float(value)) for row in logged for value in row.values())
    assert float(logged[0].get("objective/kl", 0)) == pytest.approx(0, abs=1e-4)  # the policy is still the reference
    assert rows("rest") == logged[-1:]
    exported, again = exported_weights("whole"), exported_weights("rest")
    assert exported.keys() == again.keys()
    assert all(torch.equal(exported[key], again[key]) for key in exported)
    first, last = (trained_weights(path) for path in ("steps/1.ckpt", "steps/2.ckpt"))
    assert any(not torch.equal(first[key], last[key]) for key in first)
