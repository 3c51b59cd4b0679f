"""Layers that decode multiply by packed weights after a while, with the results of plain ones to the last bit."""

import pytest
import torch
from ppo_runs import prompts_of
from tiny import tiny_policy
from torch import nn

from lit_rlhf.models.packed import AFTER, DecodingLinear, can_pack, use_decoding_layers
from lit_rlhf.rollout.sampler import Sampler

pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="oneDNN does not multiply bfloat16 here"
)
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


def packed(model):
    return [module for module in model.modules() if isinstance(module, DecodingLinear) and module.packed is not None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (3, 1), (33,), (2, 32)])
def test_a_packed_weight_gives_the_same_bits(bias, rows):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).bfloat16().requires_grad_(False)
    model = nn.Sequential(layer)
    x, few = torch.randn(*rows, 24).bfloat16(), torch.randn(2, 24).bfloat16()
    many, weight = torch.randn(5, 40, 24).bfloat16(), layer.weight.clone()
    expected, plain = layer(x), layer(many)
    use_decoding_layers(model)
    for _ in range(AFTER):
        model(few)
    assert not packed(model)
    model(few)
    assert packed(model) == [layer]
    assert torch.equal(model(x), expected)
    assert layer.weight.numel() == 0
    assert torch.equal(model(many), plain)  # the next prompts find a plain weight again
    assert not packed(model)
    assert torch.equal(layer.weight, weight)


def test_products_with_many_rows_pack_nothing():
    model = nn.Sequential(nn.Linear(24, 40).bfloat16().requires_grad_(False))
    use_decoding_layers(model)
    for _ in range(2 * AFTER):
        model(torch.zeros(65, 24).bfloat16())
    assert not packed(model)


def test_layers_that_share_a_weight_and_rows_of_another_type_decode_on():
    first, second = (nn.Linear(24, 24, bias=False).bfloat16().requires_grad_(False) for _ in range(2))
    second.weight = first.weight
    model, x = nn.Sequential(first, second), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    use_decoding_layers(model)
    for _ in range(AFTER + 2):
        model(x.bfloat16())
    assert len(packed(model)) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x.bfloat16()), expected)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt_neox", False), ("gpt2", True)])
def test_completions_are_those_of_plain_layers_in_every_rollout(family, tied, lora):
    policy = tiny_policy(family, tie_word_embeddings=tied, lora=lora)
    sampler = Sampler(max_new_tokens=AFTER + 8)

    def complete(model):
        return sampler.generate(model, prompts_of(policy), seed=0, stop_ids=[], pad_id=0)

    for _ in range(2):
        model = policy.decoder(torch.bfloat16)
        unchanged = [] if lora is None else [model.get_output_embeddings()]
        assert set(packed(model)) <= set(unchanged)  # weights that have changed are plain again
        found = complete(model)
        plain = policy._copy(torch.bfloat16)
        policy._refresh(plain)
        expected = complete(plain)
        assert torch.equal(found.response_ids, expected.response_ids)
        assert torch.equal(found.logprobs, expected.logprobs)
        linear = [module for module in plain.modules() if type(module) is nn.Linear]
        assert len(packed(model)) == len(linear) > 0
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if lora is None or "lora_B" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        policy.free_decoder()
