"""The policy's copies: what decodes, what is saved, and what is left alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LORA, Prompts, letters, tiny_model, tiny_policy
from transformers import AutoModelForSequenceClassification, pipeline

from lit_rlhf.algorithms import PPO
from lit_rlhf.errors import UserError
from lit_rlhf.models.critic import SeparateCritic, ValueHead
from lit_rlhf.models.guided import QHeads, save_guidance
from lit_rlhf.models.policy import Policy, byte_tokenizer
from lit_rlhf.rollout.sampler import Sampler
from lit_rlhf.sample import complete

IDS = torch.tensor([[5, 9, 44, 7, 30], [12, 13, 90, 17, 33]])


def trained(family):
    lora = {**LORA, "fan_in_fan_out": True} if family == "gpt2" else LORA
    policy = tiny_policy(family, lora=lora)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_model_that_decodes_has_the_adapter_of_now(family):
    policy = trained(family)
    with torch.no_grad():
        for _ in range(2):
            expected = policy.model(IDS).logits
            torch.testing.assert_close(policy.decoder()(IDS).logits, expected, atol=1e-4, rtol=1e-4)
            for name, parameter in policy.named_parameters():  # the next rollout phase follows the update
                if "lora_B" in name:
                    parameter.mul_(-1.5)
        assert not torch.allclose(policy.model(IDS).logits, expected, atol=1e-2)


def test_a_bf16_copy_follows_full_fine_tuning_and_leaves_the_weights_in_fp32():
    policy = tiny_policy()
    with torch.no_grad():
        policy.decoder(torch.bfloat16)
        next(policy.parameters()).add_(1.0)
        copy = policy.decoder(torch.bfloat16)
    for ours, theirs in zip(policy.model.parameters(), copy.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(theirs, ours.bfloat16())
    assert all("_decoder" not in name for name, _ in policy.named_parameters())


def test_what_decodes_comes_back_after_it_was_freed():
    policy = tiny_policy()
    before = [x.clone() for x in policy.decoder(torch.bfloat16).parameters()]
    policy.free_decoder()
    assert sum(x.numel() for x in policy._decoder.parameters()) == 0
    for fresh, old in zip(policy.decoder(torch.bfloat16).parameters(), before, strict=True):
        assert torch.equal(fresh, old)
    adapted = trained("llama")
    copy = adapted.decoder(torch.bfloat16)
    wanted = copy(IDS).logits
    adapted.free_decoder()
    assert torch.equal(adapted.decoder(torch.bfloat16)(IDS).logits, wanted)


@pytest.mark.parametrize("lora", [LORA, None])
def test_validation_before_training_leaves_a_copy_that_training_can_write_to(trainer, lora):
    """Lightning validates in inference mode."""
    ppo = PPO(policy=tiny_policy(lora=lora), reward=letters, sampler=Sampler(max_new_tokens=4),
              rollout_batch_size=4, minibatch_size=4)  # fmt: skip
    loop = trainer(max_epochs=2, precision="bf16-mixed")
    loop.validate(ppo, datamodule=Prompts(validation=True), verbose=False)
    assert ppo.last_row["iteration"] == 0
    assert "val/objective/scores" in ppo.last_row
    loop.fit(ppo, datamodule=Prompts(validation=True))
    assert ppo.iteration == 2


def test_the_head_is_not_copied_for_every_row_of_a_prefill():
    """A strided slice of hidden states times the head makes torch copy the head once a row: gigabytes when real."""
    model = tiny_model(hidden_size=64)
    shapes = []
    policy = Policy(model=model, tokenizer=byte_tokenizer())
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: shapes.append(inputs[0]))
    complete(policy, ["abcdef", "abcd"], Sampler(max_new_tokens=3), seed=0)
    assert len(shapes) == 3
    assert all(hidden.is_contiguous() and hidden.shape[1] == 1 for hidden in shapes)


def test_saving_leaves_the_policy_as_it_is(tmp_path):
    policy = trained("llama")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.save(tmp_path)
    assert before.keys() == policy.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_a_saved_folder_answers_a_conversation_in_transformers_as_sample_does(tmp_path):
    policy = tiny_policy(seed=3)
    policy.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    chats = [talk[:1], [{"role": "system", "content": "Be brief."}, *talk, {"role": "user", "content": "Why?"}]]
    greedy = Sampler(max_new_tokens=12, temperature=0)
    [long] = complete(policy, chats[1:], greedy, 0)
    # The tokenizer of a chat model ends turns by a token that the base model's generation config may not know.
    end = next(letter for letter in long[2:] if letter.isascii() and letter.isupper())
    policy.tokenizer.add_special_tokens({"eos_token": end})
    ours = complete(policy, chats, greedy, 0)
    assert len(ours[1]) < len(long)
    policy.save(tmp_path)
    answer = pipeline("text-generation", model=str(tmp_path), device="cpu")
    for chat, text in zip(chats, ours, strict=True):
        [found] = answer(chat, do_sample=False, max_new_tokens=12)
        assert found["generated_text"] == [*chat, {"role": "assistant", "content": text}]


def test_critics_and_q_heads_read_the_states_that_tokens_are_chosen_in(tmp_path):
    """OPT's may be narrower than its layers (here 16 of 32, of opt-350m 512 of 1024)."""
    policy = tiny_policy("opt")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    tokens = (IDS, mask, IDS[:, :3], mask[:, :3])
    output = policy(*tokens)
    assert output.hidden.shape == (2, 4, 16)
    critic = SeparateCritic(policy)
    critic.head.weight.data.normal_()
    critic.save(tmp_path)
    assert ValueHead(policy)(output).shape == critic(output, *tokens).shape == (2, 4)
    again = SeparateCritic(policy, init=str(tmp_path / "critic"))
    assert torch.equal(again(output, *tokens), critic(output, *tokens))
    policy.save(tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    scorer.save_pretrained(tmp_path / "scorer")
    values = SeparateCritic(policy, init=str(tmp_path / "scorer"))(output, *tokens)
    scores = scorer(input_ids=torch.cat([IDS, IDS[:, :3]], 1)).logits
    torch.testing.assert_close(values[:, -1:], scores)
    heads = QHeads(policy.hidden_size, policy.vocabulary, count=2)
    save_guidance(tmp_path, heads.targets, beta=1.0, prior=1.0)
    assert Policy.from_pretrained(path=str(tmp_path)).base.heads[0].inner.in_features == 16


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"policy\.path=.* has no tokenizer: save one into that folder"):
        Policy.from_pretrained(path=str(tmp_path))


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    """Transformers would make them at random."""
    policy = tiny_policy()
    policy.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no whole causal language model: it has no weights for lm_head\.weight"):
        Policy.from_pretrained(path=str(tmp_path))


def test_a_path_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"policy\.path="):
        Policy.from_pretrained(path=str(tmp_path))


def test_lora_targets_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"policy\.lora"):
        tiny_policy(lora={"r": 4, "target_modules": ["nowhere"]})


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_of_sequence():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert Policy(model=tiny_model(), tokenizer=tokenizer).tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
def test_a_model_without_a_key_value_cache_is_refused(model_type):
    with pytest.raises(UserError, match="has no key-value cache"):
        Policy.from_config(tokenizer="bytes", model_type=model_type, hidden_size=16, num_hidden_layers=2)


def test_a_key_that_the_model_config_does_not_read_is_refused():
    with pytest.raises(UserError, match=r"policy\.model_type=gpt2 does not read hiden_size"):
        Policy.from_config(tokenizer="bytes", model_type="gpt2", hidden_size=16, hiden_size=32, n_layer=1, n_head=2)


def test_a_model_of_the_hub_that_cannot_be_had_says_what_to_do():
    with pytest.raises(UserError, match=r"download 'nobody/nothing' elsewhere .*policy\.path=FOLDER; smollm2"):
        Policy.from_pretrained(path="nobody/nothing")  # the tests run with HF_HUB_OFFLINE=1
