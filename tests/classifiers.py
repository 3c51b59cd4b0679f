"""Tiny sequence classifiers in Hugging Face folders."""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_rlhf.models.policy import byte_tokenizer

LAYERS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "bert": LAYERS,
    "roberta": LAYERS,
    "llama": LAYERS,
    "gemma2": {**LAYERS, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


def save_classifier(
    folder, model_type="bert", *, labels=1, names=None, pad=True, spread=0.3, head=True, seed=0, template=None
):
    """Saves a random classifier and a byte tokenizer; returns the folder as a str.

    ``pad=False`` leaves out the pad token; ``head=False`` saves the backbone alone; ``template`` is the
    tokenizer's for chats.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.chat_template = template
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if names is not None:
        ids["id2label"] = dict(enumerate(names))
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), num_labels=labels, **ids, **SHAPES[model_type])
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=spread)
    if not pad:
        tokenizer.pad_token = None
        model.config.pad_token_id = None
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
