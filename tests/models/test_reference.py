"""The reference in mixed precision: linear layers are kept as autocast would make them."""

import pytest
import torch
from tiny import tiny_policy

from lit_rlhf.models.reference import make_reference

TOKENS = (torch.tensor([[5, 9], [12, 13]]), torch.ones(2, 2, dtype=torch.bool),
          torch.tensor([[44, 7, 30], [90, 17, 33]]), torch.ones(2, 3, dtype=torch.bool))  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_cast_weights_change_no_bit_of_what_it_says_under_autocast(family, tied):
    policy = tiny_policy(family, tie_word_embeddings=tied)
    reference = make_reference(policy)
    reference.place(CPU, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference(*TOKENS).logprobs, policy(*TOKENS).logprobs)
    model = reference._policy.base
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.get_output_embeddings().weight.dtype == (torch.float32 if tied else torch.bfloat16)
    kinds = {m.weight.dtype for m in model.modules() if type(m) is torch.nn.Linear and m.out_features != 259}
    assert kinds <= {torch.bfloat16}
    assert kinds or family == "gpt2"  # its layers are no nn.Linear


def test_without_autocast_it_stays_as_it_is():
    reference = make_reference(tiny_policy())
    before = reference.fingerprint()
    reference.place(CPU, None)
    assert reference.fingerprint() == before


def test_a_run_in_full_precision_afterwards_sees_what_the_first_one_saw():
    reference = make_reference(tiny_policy())
    reference.place(CPU, torch.bfloat16)
    reference.place(CPU, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = reference(*TOKENS).logprobs
    reference.place(CPU, None)
    with torch.no_grad():
        torch.testing.assert_close(reference(*TOKENS).logprobs, before, atol=0.2, rtol=0)  # activations in fp32 now


def test_what_a_class_wants_in_fp32_is_not_cast(monkeypatch):
    reference = make_reference(tiny_policy())
    monkeypatch.setattr(reference._policy.base, "_keep_in_fp32_modules_strict", {"down_proj"})
    reference.place(CPU, torch.bfloat16)
    layer = reference._policy.base.model.layers[0].mlp
    assert (layer.down_proj.weight.dtype, layer.up_proj.weight.dtype) == (torch.float32, torch.bfloat16)
