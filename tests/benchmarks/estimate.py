"""Predictions of ``lit-rlhf estimate machine=here`` beside what runs on this machine really take.

    python -m tests.benchmarks.estimate            # all workloads; a table and estimate.json
    python -m tests.benchmarks.estimate W2 LoRA

SmolLM2-135M's shape with random weights, so that hardly a completion ends early, on random prompts; its tokenizer comes
by ``lit-rlhf fetch smollm2``. Each prediction and each run is a process of its own. Iterations are timed but the first.
"""

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from lit_rlhf.models.sources import resolve_model
from tests.benchmarks.host import run_module

THREADS = torch.get_num_threads()
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
POLICY = ["policy=tiny", "policy.tokenizer=smollm2", *(f"++policy.{key}={value}" for key, value in SHAPE.items())]
PPO = [
    *POLICY, "critic=value_head", "algorithm.rollout_batch_size=16", "algorithm.minibatch_size=8",
    "algorithm.ppo_epochs=2", "sampler.max_new_tokens=32", "reward=model", "reward.path=reward_model",
]  # fmt: skip
LORA = ["policy.lora={r: 16, lora_alpha: 32, target_modules: all-linear}"]
GRPO = [
    "algorithm=grpo", *POLICY, "algorithm.rollout_batch_size=16", "algorithm.group_size=8",
    "algorithm.minibatch_size=16", "sampler.max_new_tokens=32", "reward=length", "reward.target=20",
]  # fmt: skip
#: name -> overrides, tokens of a prompt
WORKLOADS: dict[str, tuple[list[str], int]] = {
    "W2": (PPO, 32),
    "W1": ([*PPO, "critic=separate", "trainer.precision=32-true"], 32),
    "LoRA": ([*PPO, *LORA], 32),
    "GRPO": (GRPO, 64),
    "micro": ([*PPO, "trainer.accumulate_grad_batches=4"], 32),
}


class RandomPrompts(L.LightningDataModule):
    """Prompts of the same length, drawn from the whole vocabulary."""

    def __init__(self, length: int, vocabulary: int = 49152, count: int = 256):
        super().__init__()
        self.ids = torch.randint(3, vocabulary - 1, (count, length), generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.ids]
        return DataLoader(rows, batch_size=16)


def save_reward_model(folder: Path) -> None:
    """A reward model of the policy's size."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **SHAPE)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def predict(name: str, cwd: Path) -> dict[str, Any]:
    overrides, length = WORKLOADS[name]
    arguments = ("estimate", *overrides, f"prompt_length={length}", "format=json")
    return json.loads(run_module("lit_rlhf", *arguments, threads=THREADS, cwd=cwd))


def measure(name: str, cwd: Path, iterations: int) -> dict[str, Any]:
    overrides, length = WORKLOADS[name]
    data = ["data._target_=tests.benchmarks.estimate.RandomPrompts", f"data.length={length}"]
    settings = ["logger=csv", f"trainer.max_epochs={iterations + 1}", f"paths.output_dir={name}"]
    run_module("lit_rlhf", "train", *overrides, *data, *settings, threads=THREADS, cwd=cwd)
    with open(cwd / name / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/iteration")][1:]
    times = {key: [float(row[key]) for row in rows] for key in rows[0] if key.startswith("time/")}
    return {
        **{key.removeprefix("time/"): statistics.median(values) for key, values in times.items()},
        "spread": [min(times["time/iteration"]), max(times["time/iteration"])],
        "peak": json.loads((cwd / name / "summary.json").read_text())["peak_memory_gb"],
    }


def by_stage(seconds: dict[str, float]) -> dict[str, float]:
    """An estimate's times under the names of a run's."""
    names = {"1": "rollout", "2": "score", "3": "anchor", "7": "update", "8": "update"}
    stages = dict.fromkeys(names.values(), 0.0)
    for name, time in seconds.items():
        stages[names[name[0]]] += time
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("estimate.json"))
    arguments = parser.parse_args()
    table = Table("work", "", "predicted", "measured", "ratio")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        save_reward_model(cwd / "reward_model")
        for name in arguments.workloads:
            predicted, measured = predict(name, cwd), measure(name, cwd, arguments.iterations)
            results[name] = {"predicted": predicted, "measured": measured}
            pairs = {stage: (time, measured.get(stage, 0.0)) for stage, time in by_stage(predicted["seconds"]).items()}
            pairs |= {"iteration": (predicted["iteration"], measured["iteration"])}
            for key, (left, right) in {**pairs, "peak GB": (predicted["peak"], measured["peak"])}.items():
                ratio = f"{left / right:.2f}" if right else ""
                table.add_row(name, key, f"{left:.2f}", f"{right:.2f}", ratio, end_section=key == "peak GB")
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
