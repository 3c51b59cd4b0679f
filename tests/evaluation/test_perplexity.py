"""Perplexities against transformers' own loss, by document, in windows, and against what SFT logs."""

import math
from pathlib import Path

import pytest
import torch
from command_line import write_ratings
from tiny import tiny_policy
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import SFT
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation import Perplexity
from lit_rlhf.evaluation import perplexity as module
from lit_rlhf.evaluation.held_out import documents, held_out_batches
from lit_rlhf.evaluation.perplexity import text_nats

TEXTS = ["hello there", "a", "the quick brown fox jumps", "q x"]


def nats_of(policy, text):
    """By transformers: minus the log-probability of all tokens but the first, the end included."""
    ids = torch.tensor([[*policy.tokenizer(text)["input_ids"], policy.tokenizer.eos_token_id]])
    with torch.no_grad():
        return float(policy.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1), ids.shape[1] - 1


def test_the_nats_of_texts_are_those_of_transformers_whatever_they_are_batched_with(monkeypatch):
    policy = tiny_policy()
    expected = [nats_of(policy, text) for text in TEXTS]
    for at_once in (1, 40, 1000):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
        found = text_nats(policy, [(None, text) for text in TEXTS])
        assert found.nats.tolist() == pytest.approx([nats for nats, _ in expected], rel=1e-5)
        assert found.tokens.tolist() == [count for _, count in expected]
        assert found.sizes.tolist() == [len(text) for text in TEXTS]


def test_every_token_counts_alike_and_intervals_are_over_documents():
    metric = Perplexity()
    metric.update(torch.tensor([6.0, 1.0]), torch.tensor([3, 1]), torch.tensor([6, 2]))
    metric.update(torch.tensor([2.0]), torch.tensor([4]), torch.tensor([4]))
    found = metric.compute()
    assert found.perplexity.value == pytest.approx(math.exp(9 / 8))
    assert found.bits_per_byte.value == pytest.approx(9 / 12 / math.log(2))
    assert (found.documents, found.tokens) == (3, 8)
    # Of 27 equally likely draws of three documents the lowest is the third alone, e^0.5, the highest the first, e^2.
    assert found.perplexity.low == pytest.approx(math.exp(0.5))
    assert found.perplexity.high == pytest.approx(math.exp(2))


def test_a_prompt_is_read_and_not_predicted():
    policy = tiny_policy()
    found = text_nats(policy, [("hello", " there")])
    whole, start = nats_of(policy, "hello there")[0], text_nats(policy, [(None, "hello")])
    ids = torch.tensor([policy.tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        end = -policy.model(input_ids=ids).logits[0, -1].log_softmax(-1)[policy.tokenizer.eos_token_id]
    assert found.nats.item() == pytest.approx(whole - (start.nats.item() - float(end)), rel=1e-5)
    assert found.tokens.item() == 7


def test_a_text_longer_than_the_context_is_read_in_windows_and_no_token_counts_twice():
    policy = tiny_policy(max_position_embeddings=8)
    text = "the quick brown fox"
    ids = torch.tensor([*policy.tokenizer(text)["input_ids"], policy.tokenizer.eos_token_id])
    nats = 0.0
    with torch.no_grad():
        for target in range(1, len(ids)):
            # The first window is 0..7; after it each begins four tokens before its first target.
            start = 0 if target < 8 else 4 + (target - 8) // 4 * 4
            logits = policy.model(input_ids=ids[None, start:target]).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[ids[target]])
    found = text_nats(policy, [(None, text)])
    assert found.tokens.item() == len(ids) - 1
    assert found.nats.item() == pytest.approx(nats, rel=1e-5)


def test_it_is_the_perplexity_that_sft_logs(trainer):
    sft, metric = SFT(policy=tiny_policy()), Perplexity()
    metric.update(*text_nats(sft.policy, [(None, text) for text in TEXTS]))
    trainer().validate(sft, DataLoader([{"text": text} for text in TEXTS], batch_size=2), verbose=False)
    assert metric.compute().perplexity.value == pytest.approx(sft.last_row["val/sft/perplexity"], rel=1e-5)


def test_documents_are_parted_by_blank_lines_or_come_from_a_datamodule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_bytes(b"one\ntwo\r\n\r\nthree\n \n\n\nfour\n")
    assert [text for _, text in documents("*.txt")] == ["one\ntwo", "three", "four"]
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path))
    write_ratings(tmp_path, 300)
    held_out = documents({"_target_": "lit_rlhf.data.HumanRatingsText"})
    assert 0 < len(held_out) < 100  # not those of training
    Path("pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    node = {"_target_": "lit_rlhf.data.DatasetPrompts", "format": "jsonl", "path": "pairs.jsonl", "shuffle": False}
    assert documents(node) == [("a", "b"), ("c", "d")]  # where nothing is held out, all


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("nowhere.txt", "text=nowhere.txt: there is no such file"),
        ({"_target_": "lit_rlhf.data.ListPrompts", "prompts": ["a"]}, "a batch of texts needs 'text'"),
        ({"_target_": "lit_rlhf.data.ListPrompts", "prompts": []}, r"text.prompts must be a list"),
        ({"_target_": "lit_rlhf.rollout.Sampler"}, "config key 'text' makes a Sampler, not a LightningDataModule"),
    ],
)
def test_what_holds_no_texts_is_refused(node, message):
    with pytest.raises(UserError, match=message):
        documents(node)


def test_an_empty_metric_says_nan():
    metric = Perplexity()
    metric.update(*torch.zeros(3, 0))
    assert math.isnan(metric.compute().perplexity.value)
    with pytest.raises(UserError, match="at least one token"):
        Perplexity().update(torch.ones(1), torch.zeros(1), torch.ones(1))
    assert list(held_out_batches({"_target_": "lit_rlhf.data.ListPrompts", "prompts": ["a"]}, "text")) == [
        {"prompt": ["a"]}
    ]
