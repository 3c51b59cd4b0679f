"""Attention by products: the same as PyTorch's own, taken only where it is faster, and gone from what is saved."""

import json

import pytest
import torch
from tiny import SMALL, tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from lit_rlhf.models import attention
from lit_rlhf.models.policy import Policy

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
IDS = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def taken(monkeypatch):
    """The shapes of the queries that went to the products."""
    shapes, real = [], attention.products

    def products(query, *rest):
        shapes.append(tuple(query.shape))
        return real(query, *rest)

    monkeypatch.setattr(attention, "products", products)
    return shapes


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_products_are_scaled_dot_product_attention(groups, mask):
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 6, 5, 8), torch.randn(2, groups, 7, 8), torch.randn(2, groups, 7, 8)
    seen = (torch.rand(2, 1, 5, 7) > 0.4) | (torch.arange(7) == 0)
    masks = {"none": None, "bool": seen, "float": torch.zeros(2, 1, 5, 7).masked_fill(~seen, -torch.inf)}
    inputs = [x.requires_grad_() for x in (query, keys, values)]
    found = attention.products(query * 8**-0.5, keys, values, masks[mask])
    wanted = scaled_dot_product_attention(*inputs, attn_mask=masks[mask], enable_gqa=True)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mask", [None, PADDED])
def test_a_model_is_as_close_to_full_precision_as_with_sdpa(family, mask, taken):
    logits = []
    for dtype, fitting in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = tiny_model(family).to(dtype)
        if fitting:
            attention.use_fitting_attention(model)
        out = model(IDS, attention_mask=mask, use_cache=True)
        step = model(IDS[:, :1], attention_mask=None if mask is None else torch.cat([mask, mask[:, -1:]], 1),
                     past_key_values=out.past_key_values)  # fmt: skip
        real = out.logits if mask is None else out.logits[mask.bool()]
        logits.append(torch.cat([real.flatten(0, -2), step.logits[:, -1]]).detach().float())
    sdpa, products = (float((found - logits[0]).square().mean().sqrt()) for found in logits[1:])
    assert products < 1.2 * sdpa < 0.1 * float(logits[0].std())  # rounding alone, and no more of it
    assert taken == 2 * [(2, 2, 6, 16)] + 2 * [(2, 2, 1, 16)]  # of two layers, in the last model


def test_a_large_bias_of_the_keys_costs_no_precision_in_bfloat16():
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 4, 16, 8).bfloat16() for _ in range(3))
    keys = keys + 100  # adds the same to all logits of a query: no weight changes
    found = attention.products(query, keys, values, None).double()
    exact = torch.softmax(query.double() @ keys.double().transpose(2, 3), -1) @ values.double()
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


def test_a_row_of_padding_alone_stays_finite_and_gives_finite_gradients():
    query = torch.randn(1, 2, 3, 4).requires_grad_()
    mask = torch.tensor([[[[False] * 3, [True, False, False], [True] * 3]]])
    found = attention.products(query, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), mask)
    found.sum().backward()
    assert found.isfinite().all()
    assert query.grad.isfinite().all()


def test_an_encoder_sees_to_both_sides(taken):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config).eval().to(torch.bfloat16)
    wanted = model(IDS, attention_mask=PADDED).last_hidden_state
    attention.use_fitting_attention(model)
    found = model(IDS, attention_mask=PADDED).last_hidden_state
    assert taken
    torch.testing.assert_close(found[PADDED.bool()], wanted[PADDED.bool()], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "length", "expected"),
    [(torch.float32, 64, True), (torch.float32, 65, False), (torch.bfloat16, 257, False), (torch.bfloat16, 256, True)],
)
def test_only_short_sequences_are_products(dtype, length, expected, taken):
    model = tiny_model(max_position_embeddings=512, hidden_size=256)
    attention.use_fitting_attention(model)
    model.to(dtype)(torch.ones(1, length, dtype=torch.long))
    assert bool(taken) == expected


def test_autocast_counts_as_bfloat16_and_tiny_models_stay_with_one_kernel_in_fp32(taken):
    model = tiny_model()
    attention.use_fitting_attention(model)
    model(IDS)
    assert not taken
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert taken


def test_attention_that_somebody_named_stays():
    config = {"tokenizer": "bytes", **SMALL["llama"]}
    policy = Policy.from_config(**config)
    assert policy.base.config._attn_implementation == attention.NAME
    policy.base.set_attn_implementation("eager")
    attention.use_fitting_attention(policy.base)
    assert policy.base.config._attn_implementation == "eager"


def test_nothing_of_it_is_saved(tmp_path):
    policy = Policy.from_config(tokenizer="bytes", **SMALL["llama"])
    policy.save(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert Policy.from_pretrained(path=str(tmp_path)).base.config._attn_implementation == attention.NAME
    assert Policy.from_pretrained(path=str(tmp_path), attention="sdpa").base.config._attn_implementation == "sdpa"
