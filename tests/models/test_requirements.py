"""Which causal language models of transformers can be policies: a tiny one of each kind of layer is tried."""

import pytest
import torch
from ppo_runs import make
from tiny import LORA, SMALL, Prompts, tiny_model, tiny_policy
from transformers import AutoModelForCausalLM, BertConfig

from lit_rlhf.batch import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy, byte_tokenizer
from lit_rlhf.rollout.sampler import Sampler

KINDS = sorted(set(SMALL) - {"llama", "qwen2", "gpt2", "gpt_neox"})
STOPS = [2, *range(3, 40)]  # many, so that rows leave the batch at different steps


def policy_of(kind, **settings):
    return Policy(model=tiny_model(kind), tokenizer=byte_tokenizer(), **settings)


def complete(policy, texts):
    encoded = policy.tokenizer(texts, return_tensors="pt", padding=True)
    prompts = PromptBatch(
        prompt_ids=encoded.input_ids,
        prompt_mask=encoded.attention_mask.bool(),
        episodes=torch.arange(len(texts)),
        prompts=texts,
    )
    return Sampler(max_new_tokens=16).generate(policy.decoder(), prompts, seed=1, stop_ids=STOPS, pad_id=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_and_training_agree_with_transformers_own_pass_over_every_text_alone(kind):
    policy = policy_of(kind)
    policy.eval()
    rollout = complete(policy, ["hello there", "hello there", "a", "xyz", "one, two"])
    lengths = rollout.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    ours = policy(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask).logprobs
    for row in range(len(lengths)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row, : lengths[row]]
        logits = policy.model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, : lengths[row]], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours[row, : lengths[row]], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5_text", "gpt_oss"])
def test_ppo_trains_what_is_not_a_plain_stack_of_attention(kind, lora, trainer):
    policy = policy_of(kind, lora=lora)
    text = [(name, weight) for name, weight in policy.named_parameters() if "vision" not in name]
    before = {name: weight.clone() for name, weight in text if weight.requires_grad}
    ppo = make(policy)
    trainer(max_epochs=1).fit(ppo, datamodule=Prompts())
    moved = [name for name, weight in policy.named_parameters() if name in before and not weight.equal(before[name])]
    assert len(moved) > len(before) / 2


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}, "reads from left to right"),
        (
            "bart",
            {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
            "padding before a prompt changes the probabilities",
        ),
        ("trocr", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2}, "cannot be called as a policy"),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "has no key-value cache"),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}, "has no key-value cache"),
    ],
    ids=["bert", "bart", "trocr", "openai-gpt", "mamba"],
)
def test_a_model_whose_two_ways_of_computing_would_differ_is_refused(kind, settings, reason):
    model = tiny_model(kind, **settings)
    with pytest.raises(UserError, match=reason):
        Policy(model=model, tokenizer=byte_tokenizer())


def test_an_encoder_from_a_folder_is_refused(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, is_decoder=False)
    model = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().weight.data.normal_()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BertLMHeadModel is no causal language model"):
        Policy.from_pretrained(path=str(tmp_path))


def test_a_pad_token_that_the_model_does_not_know_is_replaced_by_the_end_of_sequence():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # and the embeddings were not resized
    assert tokenizer.pad_token_id == 259
    policy = Policy(model=tiny_model(), tokenizer=tokenizer)
    assert policy.tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_trying_a_model_leaves_it_as_it_was():
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[1].eval()
    modes, before = [part.training for part in model.modules()], torch.get_rng_state()
    Policy(model=model, tokenizer=byte_tokenizer())
    assert [part.training for part in model.modules()] == modes
    assert torch.get_rng_state().equal(before)


@pytest.mark.filterwarnings("ignore:.*(alpha|rank)_pattern:RuntimeWarning")  # of peft, about the experts
def test_lora_on_experts_names_the_layers_that_it_does_not_fit():
    with pytest.raises(UserError, match=r"target_modules \(mlp\.experts, .*mlp\.gate\)"):
        policy_of("mixtral", lora=LORA)
    assert tiny_policy(lora={**LORA, "target_modules": ["q_proj", "v_proj"]})
