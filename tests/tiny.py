"""Tiny models, tokenizers, prompts and rewards, made on the spot: no test downloads anything."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.models.policy import Policy, byte_tokenizer

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
GROUPED = {**LLAMA, "num_key_value_heads": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL = {
    "llama": LLAMA,
    "qwen2": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": LLAMA,
    "mistral": {**GROUPED, "sliding_window": 6},
    "gemma2": {**GROUPED, "head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 3.0},
    "cohere": GROUPED,  # scaled logits
    "mixtral": {**GROUPED, **EXPERTS},
    "gpt_oss": {**GROUPED, **EXPERTS, "head_dim": 16, "sliding_window": 6},  # attention sinks
    "deepseek_v3": {
        **LLAMA, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "qwen3_5_text": {
        **GROUPED, "head_dim": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },  # a recurrent state beside keys and values
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16,
        "max_position_embeddings": 128,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},  # ALiBi
    "gemma3": {"text_config": {**GROUPED, "head_dim": 16, "sliding_window": 6, "vocab_size": 259}, "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    }},
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
