"""Frozen models in half precision: their linear layers are kept as autocast would make them in every pass."""

import itertools

import torch
from torch import nn
from transformers import PreTrainedModel


def cast_dtype(precision: str, *, sharded: bool) -> torch.dtype | None:
    """What frozen models are cast to under a ``trainer.precision``; the shards of a layer have one precision."""
    halves = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    return None if sharded else halves.get(precision)


def cast_layers(model: PreTrainedModel, dtype: torch.dtype, *, all_weights: bool = False) -> None:
    """Keeps the linear layers of a frozen model in ``dtype``, to which autocast casts them anyway.

    That halves their memory and changes no number. Embeddings and norms, and what is tied to them, stay as they are, as
    does what the model's class wants in fp32, unless ``all_weights`` are to be cast. Once cast, weights stay rounded.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    others = {
        id(parameter)
        for name, module in model.named_modules()
        if type(module) is not nn.Linear or kept & set(name.split("."))
        for parameter in module.parameters(recurse=False)
    }
    for parameter in model.parameters():
        if all_weights or id(parameter) not in others:
            parameter.data = parameter.data.to(dtype)


def leave_file(model: nn.Module) -> None:
    """Copies what a model on the CPU has of the file that it was loaded from.

    Weights are pages of the file until they change, and all of it stays in memory while one weight is in it. So this
    saves memory where most weights were cast.
    """
    for weight in itertools.chain(model.parameters(), model.buffers()):
        if weight.is_cpu and weight.dtype == torch.float32:
            weight.data = weight.data.clone()
