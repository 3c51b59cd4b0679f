"""Our side: what ``lit-rlhf train`` runs, composed from the same configs."""

import ctypes
import functools
import platform
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir

from lit_rlhf.batch import PromptBatch
from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.machine import best_precision, decode_dtype, keep_freed_memory, peak_memory_gb, reset_peak_memory
from lit_rlhf.models.policy import Policy
from lit_rlhf.overrides import replace_parts
from lit_rlhf.rollout.sampler import Sampler
from lit_rlhf.train import build
from tests.benchmarks.contender import Gate
from tests.benchmarks.countdown import countdown_prompts, stop_lengths
from tests.benchmarks.floor import measure_floor
from tests.benchmarks.settings import Materials, Settings

#: More than are ever asked for.
ITERATIONS = 10_000


def overrides(settings: Settings, materials: Materials, folder: str) -> list[str]:
    """The arguments of ``lit-rlhf train`` for this work; what is not said is the library's default.

    Nothing is saved, validated or sent anywhere, as with the peers.
    """
    return [
        f"algorithm={settings.work}",
        f"policy={'smollm2_lora' if settings.lora else 'smollm2'}",
        f"policy.path={materials.model}",
        "data=jsonl",
        f"data.path={materials.prompts}",
        "data.columns=[]",
        f"sampler.max_new_tokens={settings.response_length}",
        f"algorithm.rollout_batch_size={settings.completions}",
        f"algorithm.minibatch_size={settings.minibatch * settings.accumulate}",
        f"trainer.accumulate_grad_batches={settings.accumulate}",
        f"trainer.precision={settings.precision}",
        f"trainer.max_epochs={ITERATIONS}",
        "trainer.limit_val_batches=0",
        "+trainer.enable_checkpointing=false",
        "+trainer.enable_progress_bar=false",
        "optimizer.lr=1e-6",
        "callbacks=samples",
        "logger=csv",
        f"paths.output_dir={folder}",
        *_OF_WORK[settings.work](settings, materials),
    ]


_OF_WORK = {
    "ppo": lambda settings, materials: [
        "reward=model",
        f"reward.path={materials.reward}",
        f"critic={'separate' if settings.separate_critic else 'value_head'}",
        f"algorithm.ppo_epochs={settings.epochs}",
    ],
    "grpo": lambda settings, materials: [
        "reward._target_=tests.benchmarks.ours.length_reward",
        f"algorithm.group_size={settings.group}",
        f"algorithm.epochs={settings.epochs}",
        "kl.coef=0.04",
    ],
}


def length_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def train(settings: Settings, materials: Materials, gate: Gate) -> None:
    """Iterations of PPO or GRPO, for as long as they are asked for; no completion ends before its full length."""
    folder = tempfile.mkdtemp(dir=Path.cwd())
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        run = build(compose("train", overrides=replace_parts(overrides(settings, materials, folder))))
    policy = run.algorithm.policy
    policy.tokenizer.eos_token = policy.base.generation_config.eos_token_id = None
    run.trainer.callbacks.append(_Wait(gate, settings))
    gate.answers["floor"] = lambda: measure_floor(run.algorithm, settings)
    run.trainer.fit(run.algorithm, datamodule=run.datamodule)


class _Wait(L.Callback):
    """Waits at the gate before each iteration, and says of each what it did."""

    def __init__(self, gate: Gate, settings: Settings) -> None:
        self.gate = gate
        self.measures_update = settings.update_memory  # in the first iteration
        self.tokens = 0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if hasattr(module.reward, "scorer"):
            module.reward.scorer.register_forward_pre_hook(self._count)

    def _count(self, _scorer: Any, arguments: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.gate.facts["reward_tokens"] = self.gate.facts.get("reward_tokens", 0) + int(arguments[1].sum())

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.gate.wait()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if self.measures_update and index == 0:
            give_back_freed_memory()
            reset_peak_memory()

    def on_row(self, trainer: L.Trainer, module: L.LightningModule, row: dict[str, float]) -> None:
        if self.measures_update:
            self.gate.facts["update_peak_gb"] = peak_memory_gb()
            self.measures_update = False
        stages = {name: round(value, 4) for name, value in row.items() if name.startswith("time/")}
        self.gate.facts.update(tokens=row["tokens"] - self.tokens, stages=stages)
        self.tokens = row["tokens"]


ppo = grpo = train


def give_back_freed_memory() -> None:
    """Lets glibc give what was freed back to the system, so that a peak shows what is in use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def rollout(settings: Settings, materials: Materials, gate: Gate) -> None:
    """Stage 1 alone, as an algorithm does it: the weights for decoding made anew, then the sampler."""
    keep_freed_memory()
    policy = Policy.from_pretrained(path=materials.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    precision = best_precision() if settings.precision == "auto" else settings.precision
    dtype = decode_dtype(precision)
    eos, pad = policy.base.config.eos_token_id, policy.tokenizer.pad_token_id
    lengths = stop_lengths(settings.completions, settings.response_length)
    rows = countdown_prompts(lengths, longest=settings.prompt_length, eos=eos, vocabulary=policy.vocabulary)
    width = max(map(len, rows))
    prompts = PromptBatch(
        prompt_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        episodes=torch.arange(len(rows)),
        prompts=[""] * len(rows),
    ).to(device)
    complete = functools.partial(
        Sampler(max_new_tokens=settings.response_length).generate, prompts=prompts, seed=0, stop_ids=[eos], pad_id=pad
    )
    while True:
        gate.wait()
        made = complete(policy.decoder(dtype).eval())
        found = made.lengths.tolist()
        gate.facts.update(tokens=sum(found), exact=found == lengths)
