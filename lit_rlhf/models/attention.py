"""Attention of short sequences on a CPU, by plain matrix products.

PyTorch's fused kernels there are made for long sequences: for 8 sequences of 64 tokens with the heads of SmolLM2 a
forward and backward pass in bfloat16 takes four times as long as these products (8.6 against 2.0 ms on two cores of an
EPYC), for 16 single tokens after 48 others six times (0.52 against 0.09 ms). In fp32 the gain is smaller (3.2 against
2.2 ms) and ends sooner. Everything else goes to transformers' own function, as if ``sdpa`` had been chosen.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_products"
#: Tokens up to which the products are used. In bfloat16 the fused kernels become faster at about 1,000; but the weights
#: are kept for the backward pass, and at this length they are a fifth of a layer's activations. In fp32 the kernels are
#: as fast at 128, and in models so small that the number of operations counts they always are.
SHORT, SHORT_FP32, WIDE = 256, 64, 256


def use_fitting_attention(model: PreTrainedModel) -> None:
    """Lets a model for which transformers chose ``sdpa`` use products where they are faster."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Queries (B, H, T, D), keys and values (B, K, S, D), K a divisor of H -> (B, T, H, D)."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    steps, length = query.shape[2], key.shape[2]
    causal = attention_mask is None and is_causal and steps > 1
    extras = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    if extras or (causal and steps != length) or not products_are_faster(query, length):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if causal:
        attention_mask = torch.ones(steps, steps, dtype=torch.bool).tril()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return products(query * scaling, key, value, attention_mask, dropout).transpose(1, 2).contiguous(), None


def products_are_faster(query: Tensor, length: int) -> bool:
    """Whether attention of ``query`` (B, H, T, D) to ``length`` keys takes less time as plain products."""
    if query.device.type != "cpu":
        return False
    if _in_bfloat16(query):
        return query.shape[2] == 1 or length <= SHORT
    return query.shape[2] > 1 and length <= SHORT_FP32 and query.shape[1] * query.shape[3] >= WIDE


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(query key^T) value of each head, (B, H, T, D).

    Logits and softmax are in fp32: where keys have a large bias, logits in bfloat16 would be off by tenths of a nat.

    Heads that share a key are rows of one product, so that keys and values need not be repeated.

    Args:
        query: (B, H, T, D), scaled.
        key, value: (B, K, S, D).
        mask: (T, S), (B, 1, T, S) or (B, H, T, S); bool, true where a query sees a key, or floats that are added.
        dropout: probability, of the attention weights.
    """
    (batch, heads, steps, _), groups = query.shape, key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        rows = query.float().reshape(batch, groups, -1, query.shape[-1])
        logits = torch.matmul(rows, key.float().transpose(2, 3))
    if mask is not None:
        logits = logits.view(batch, heads, steps, -1)
        # Not -inf: a padded query that sees no key at all would become NaN.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    weights = torch.softmax(logits, -1).to(value.dtype)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return torch.matmul(weights.view(batch, groups, -1, key.shape[2]), value).view(batch, heads, steps, -1)


def _in_bfloat16(query: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return query.dtype == torch.bfloat16


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
