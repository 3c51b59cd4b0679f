"""The peers' sides: TRL's PPO (1.12.0, its last release that has it), TRL's GRPO, and ``generate`` of transformers.

Nothing here imports lit_rlhf: that would change how torch's threads wait.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.benchmarks.contender import Gate
from tests.benchmarks.countdown import countdown_prompts, stop_lengths
from tests.benchmarks.settings import Materials, Settings

#: More than are ever asked for.
ITERATIONS = 10_000
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

os.environ["WANDB_MODE"] = "disabled"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def _rows(materials: Materials) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(materials.prompts).read_text().splitlines()]


def trl_ppo(settings: Settings, materials: Materials, gate: Gate) -> None:
    """TRL builds policy, reference, critic and reward model of the same size; it never stops at an end of sequence.

    Its precision is left at its default. (``bf16`` is true by default, and its PPO trainer makes an accelerator that
    never hears of it, so everything is fp32.)
    """
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(materials.model, padding_side="left")
    language_model = [
        AutoModelForCausalLM.from_pretrained(materials.model, dtype=torch.float32) for _ in range(2 - settings.lora)
    ]
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        for folder in (materials.reward, materials.model)
    ]
    for scorer in scorers:
        scorer.config.pad_token_id = tokenizer.pad_token_id
    adapter = None
    if settings.lora:
        from peft import LoraConfig

        adapter = LoraConfig(**LORA)
    minibatches = settings.completions // settings.minibatch
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(dir=Path.cwd()), per_device_train_batch_size=settings.minibatch,
        gradient_accumulation_steps=minibatches, num_mini_batches=minibatches, num_ppo_epochs=settings.epochs,
        total_episodes=settings.completions * ITERATIONS, response_length=settings.response_length, temperature=1.0,
        local_rollout_forward_batch_size=settings.completions, learning_rate=1e-6, num_sample_generations=0,
        report_to=[], use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, processing_class=tokenizer, model=language_model[0], reward_model=scorers[0], value_model=scorers[1],
        ref_model=None if settings.lora else language_model[1], peft_config=adapter,
        train_dataset=Dataset.from_dict({"input_ids": [row["ids"] for row in _rows(materials)]}),
    )  # fmt: skip
    generate = ppo_trainer.batch_generation

    def counted(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        result = generate(model, queries, *args)
        gate.facts["tokens"] = result[0][:, queries.shape[1] :].numel()
        gate.facts["prompt_tokens"] = queries.numel()
        return result

    ppo_trainer.batch_generation = counted
    trainer.dataloader = _Gated(trainer.dataloader, gate)
    trainer.train()


class _Gated:
    """A loader that waits at the gate before each batch. It stands outside accelerate's, which reads ahead."""

    def __init__(self, loader: Any, gate: Gate) -> None:
        self.loader, self.gate = loader, gate

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.gate.wait()
            yield batch


def trl_grpo(settings: Settings, materials: Materials, gate: Gate) -> None:
    """One step is one group of prompts; precision is left at TRL's default, bf16 autocast."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        gate.facts["tokens"] = gate.facts.get("tokens", 0) + sum(map(len, completion_ids))
        return [float(len(text) % 7) for text in completions]

    class Wait(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.wait()

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=Path.cwd()), per_device_train_batch_size=settings.minibatch,
        gradient_accumulation_steps=settings.completions // settings.minibatch, num_generations=settings.group,
        max_completion_length=settings.response_length, max_steps=ITERATIONS, beta=0.04, learning_rate=1e-6,
        num_iterations=settings.epochs, temperature=1.0, report_to=[], use_cpu=not torch.cuda.is_available(),
        save_strategy="no", logging_steps=1, disable_tqdm=True,
        generation_kwargs={"min_new_tokens": settings.response_length},
    )  # fmt: skip
    GRPOTrainer(
        model=materials.model, reward_funcs=reward, args=config, callbacks=[Wait()],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in _rows(materials)]),
        processing_class=AutoTokenizer.from_pretrained(materials.model, padding_side="left"),
    ).train()  # fmt: skip


def generate(settings: Settings, materials: Materials, gate: Gate) -> None:
    """``generate`` with a key-value cache, all prompts in one batch, padded on the left, from the full softmax."""
    model = AutoModelForCausalLM.from_pretrained(materials.model, dtype=getattr(torch, settings.dtype)).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    lengths = stop_lengths(settings.completions, settings.response_length)
    prompts = countdown_prompts(lengths, longest=settings.prompt_length, eos=eos, vocabulary=model.config.vocab_size)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    while True:
        gate.wait()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=settings.response_length, eos_token_id=eos, pad_token_id=pad,
            )  # fmt: skip
        ends = (output[:, width:] == eos).int()
        found = [int(row.argmax()) + 1 if row.any() else len(row) for row in ends]
        gate.facts.update(tokens=sum(found), exact=found == lengths)
