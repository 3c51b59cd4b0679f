"""Tiny models, tokenizers, prompts and rewards, made on the spot: no test downloads anything."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.models.policy import Policy, byte_tokenizer

SMALL = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "qwen2": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def tiny_model(model_type: str = "llama", *, spread: float = 0.3, seed: int = 0, **changes):
    """A random causal LM over the byte vocabulary; ``spread`` widens its weights, so that it has clear preferences."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**SMALL.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=spread)
    return model


def tiny_policy(model_type: str = "llama", *, lora: dict | None = None, **changes) -> Policy:
    return Policy(model=tiny_model(model_type, **changes), tokenizer=byte_tokenizer(), lora=lora)


class Prompts(L.LightningDataModule):
    """A user's datamodule that knows nothing of the package."""

    texts = ("hello", "a b c", "the quick brown fox", "xyz", "zebra", "one two", "q", "lorem ipsum")

    def __init__(self, batch_size: int = 3, validation: bool = False):
        super().__init__()
        self.batch_size = batch_size
        self.validation = validation

    def train_dataloader(self):
        rows = [{"prompt": text, "number": i} for i, text in enumerate(self.texts)]
        return DataLoader(rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader([{"prompt": text} for text in self.texts[:4]], batch_size=2) if self.validation else []


def letters(prompts, completions, **columns):
    """A reward with some spread on random text."""
    return [sum(ord(c) % 7 for c in text) / 10 - 0.1 * len(text) for text in completions]
