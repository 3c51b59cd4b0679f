"""SFT: the loss is the mean negative log-likelihood of the targets, and the policy learns to write and to stop."""

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from ppo_runs import prompts_of
from tiny import LORA, tiny_policy
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.algorithms import SFT
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.metrics import lookup

BOS, EOS = 1, 2
TEXTS = ["a film", "it is a long and winding road", "dull", "so so, but short"]


def nll(policy, ids, first):
    """-log p of ids[first:], one number a token: the oracle, without padding."""
    logprobs = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-float(logprobs[t - 1, ids[t]]) for t in range(first, len(ids))]


def ids_of(policy, text):
    return policy.tokenizer(text)["input_ids"]


def adam(lr=1e-2):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def texts(rows, batch_size=2, shuffle=False):
    return DataLoader([{"text": row} for row in rows], batch_size=batch_size, shuffle=shuffle)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_loss_is_the_mean_over_the_tokens_of_unpadded_texts(family):
    policy = tiny_policy(family)
    sft = SFT(policy=policy)
    micro = sft.collate({"text": TEXTS})
    expected = [x for text in TEXTS for x in nll(policy, [*ids_of(policy, text), EOS], 1)]
    loss, metrics = sft.loss(micro.inputs)
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert micro.terms == len(expected) == sum(len(text) for text in TEXTS)  # a byte a token: minus the first, plus eos
    assert (micro.sequences, micro.tokens) == (4, len(expected) + 4)
    assert 0 <= float(metrics["sft/token_accuracy"]) < 0.2


def test_only_the_completion_is_learned():
    policy = tiny_policy("gpt2")
    sft = SFT(policy=policy)
    pairs = [("say: ", "yes"), ("a longer question? ", "no, never")]
    batch = {"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]}
    expected = [
        x for p, c in pairs for x in nll(policy, [*ids_of(policy, p), *ids_of(policy, c), EOS], len(ids_of(policy, p)))
    ]
    micro = sft.collate(batch)
    assert micro.terms == len(expected) == len("yes") + len("no, never") + 2
    assert float(sft.loss(micro.inputs)[0]) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_chat_prompt_goes_through_the_template():
    policy = tiny_policy()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    sft = SFT(policy=policy)
    micro = sft.collate({"prompt": [[{"role": "user", "content": "hi"}]], "completion": ["yo"]})
    assert micro.inputs["input_ids"][0].tolist() == [*ids_of(policy, "<user>hi<bot>yo"), EOS]
    assert micro.inputs["target_mask"][0].tolist() == [False] * len("<user>hi<bot>") + [True] * 3


def test_the_end_is_a_target_once_and_lost_with_what_is_cut():
    policy = tiny_policy()
    row = SFT(policy=policy).collate({"text": ["abc"]}).inputs
    assert row["input_ids"][0].tolist() == [*ids_of(policy, "abc"), EOS]
    assert row["target_mask"][0].tolist() == [False, True, True, True]
    ended = SFT(policy=policy).collate({"text": ["abc</s>"]}).inputs["input_ids"][0].tolist()
    assert ended == [*ids_of(policy, "abc"), EOS]
    cut = SFT(policy=policy, max_length=3).collate({"text": ["abc"]}).inputs["input_ids"][0].tolist()
    assert cut == ids_of(policy, "abc")


def test_a_tokenizer_that_opens_texts_makes_the_first_word_a_target_and_opens_once():
    policy = tiny_policy()
    opening = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    policy.tokenizer.backend_tokenizer.post_processor = opening
    a, b = ids_of(tiny_policy(), "ab")
    text = SFT(policy=policy).collate({"text": ["ab"]}).inputs
    assert text["input_ids"][0].tolist() == [BOS, a, b, EOS]
    assert text["target_mask"][0].tolist() == [False, True, True, True]
    pair = SFT(policy=policy).collate({"prompt": ["a"], "completion": ["b"]}).inputs
    assert pair["input_ids"][0].tolist() == [BOS, a, b, EOS]
    assert pair["target_mask"][0].tolist() == [False, False, True, True]


def test_a_tokenizer_that_ends_texts_does_not_end_prompts():
    policy = tiny_policy()
    a, b = ids_of(policy, "ab")
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    policy.tokenizer.backend_tokenizer.post_processor = ends
    assert ids_of(policy, "ab") == [BOS, a, b, EOS]
    pair = SFT(policy=policy).collate({"prompt": ["a"], "completion": ["b"]}).inputs
    assert pair["input_ids"][0].tolist() == [BOS, a, b, EOS]
    rollout = prompts_of(policy, ["ab", "ab</s>"])
    assert rollout.prompt_ids.tolist() == [[0, BOS, a, b], [BOS, a, b, EOS]]  # one of the user's own stays


def test_pad_equal_to_eos_keeps_the_eos_a_target():
    policy = tiny_policy()
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    micro = SFT(policy=policy).collate({"text": ["abc", "a"]})
    assert micro.inputs["target_mask"].tolist() == [[False, True, True, True], [False, True, False, False]]
    assert micro.inputs["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]


def test_token_accuracy_counts_the_likeliest_tokens():
    """Four greedy tokens, then one that is not the likeliest: 4 of 5."""
    policy = tiny_policy()
    ids = [10]
    for _ in range(5):
        ids.append(int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()))
    ids[-1] = (ids[-1] + 1) % 256
    ones = torch.ones(1, 6, dtype=torch.bool)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": ones, "target_mask": torch.arange(6)[None] > 0}
    assert float(SFT(policy=policy).loss(inputs)[1]["sft/token_accuracy"]) == pytest.approx(4 / 5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_does_not_depend_on_the_micro_batch_split(trainer, lora):
    gradients = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    for batch_size in (1, 2, 4):
        sft = SFT(policy=tiny_policy(lora=lora), optimizer=adam())
        settings = {"max_epochs": 1, "accumulate_grad_batches": 4 // batch_size}
        trainer(callbacks=[Spy()], **settings).fit(sft, texts(TEXTS, batch_size))
    assert len(gradients) == 3
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-4, atol=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(trainer, tmp_path):
    policy = tiny_policy()
    sft = SFT(policy=policy, optimizer=adam(0.0))
    fit = trainer(max_epochs=1, logger=CSVLogger(save_dir=tmp_path))
    fit.fit(sft, texts(TEXTS, 3), texts(TEXTS[:3], 2))
    with open(tmp_path / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)

    def mean(rows):
        values = [x for text in rows for x in nll(policy, [*ids_of(policy, text), EOS], 1)]
        return sum(values) / len(values)

    for prefix, rows in (("", TEXTS), ("val/", TEXTS[:3])):
        assert float(row[f"{prefix}loss/total"]) == pytest.approx(mean(rows), rel=1e-5)
        assert float(row[f"{prefix}sft/perplexity"]) == pytest.approx(math.exp(mean(rows)), rel=1e-5)
    assert row["episode"] == "4"
    assert row["tokens"] == str(sum(len(text) + 1 for text in TEXTS))
    for name in row:
        lookup(name)


@pytest.mark.parametrize("lora", [None, LORA])
def test_it_learns_to_write_a_text_and_to_stop(trainer, tmp_path, lora):
    sft = SFT(policy=tiny_policy(spread=0.1, lora=lora), optimizer=adam(2e-2))
    trainer(max_epochs=50).fit(sft, texts(["abcd"], 1))
    sft.export(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("a", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    assert written == [*tokenizer("abcd")["input_ids"], EOS]
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, sft.policy.model.eval()(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_same_run(trainer, tmp_path):
    lora = {**LORA, "lora_dropout": 0.2}

    def run(folder, ckpt=None):
        sft = SFT(policy=tiny_policy(lora=lora), optimizer=adam(), log_every_n_steps=1)
        save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(
            max_epochs=2, callbacks=[save], enable_checkpointing=True, logger=CSVLogger(save_dir=folder),
            accumulate_grad_batches=2,
        )  # fmt: skip
        fit.fit(sft, texts(TEXTS * 2, 2, shuffle=True), ckpt_path=ckpt)
        return [p for p in sft.parameters() if p.requires_grad], (folder / "metrics.csv").read_text()

    weights, rows = run(tmp_path / "whole")
    for step in (1, 2, 3):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "metrics.csv").write_text(rows)
        resumed, resumed_rows = run(tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))
        assert resumed_rows == rows


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["a text"], "yields list"),
        ({"sentence": ["a"]}, r"this one has \['sentence'\]"),
        ({"prompt": ["a"]}, "'prompt' and 'completion'"),
        ({"text": "a text"}, "lists of equal length"),
        ({"text": []}, "lists of equal length"),
        ({"text": ["fine", "  "]}, "sample 1 of the batch has no text"),
        ({"text": ["fine", None]}, "sample 1 of the batch has no text"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "lists of equal length"),
        ({"prompt": ["a", "b" * 200], "completion": ["c", "d"]}, "sample 1 of the batch: its prompt has 200 tokens"),
        ({"prompt": [[{"role": "user", "content": "hi"}]], "completion": ["c"]}, "no chat template"),
    ],
)
def test_bad_batches_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        SFT(policy=tiny_policy(), max_length=100).collate(batch)


@pytest.mark.parametrize("length", [1, 129])
def test_a_length_outside_the_context_is_refused(length):
    with pytest.raises(UserError, match=f"max_length={length} must be at least 2 and .* context of 128"):
        SFT(policy=tiny_policy(), max_length=length)


def test_a_tokenizer_without_an_end_of_sequence_is_refused():
    policy = tiny_policy()
    policy.tokenizer.eos_token = None
    with pytest.raises(UserError, match="end of sequence"):
        SFT(policy=policy)
