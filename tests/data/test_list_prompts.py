"""Prompts written into a config."""

import pytest
import torch

from lit_rlhf.data import ListPrompts
from lit_rlhf.errors import UserError


def test_texts_and_columns_stay_together_when_shuffled():
    data = ListPrompts(prompts=[str(number) for number in range(20)], columns={"answer": list(range(20))}, batch_size=6)
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    assert [len(batch["prompt"]) for batch in batches] == [6, 6, 6, 2]
    rows = [
        (prompt, answer) for batch in batches for prompt, answer in zip(batch["prompt"], batch["answer"], strict=True)
    ]
    assert rows != sorted(rows, key=lambda row: row[1])
    assert sorted(rows, key=lambda row: row[1]) == [(str(number), number) for number in range(20)]


def test_chats_arrive_as_they_are():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert list(ListPrompts(prompts=[chat, chat[1:]], shuffle=False).train_dataloader()) == [
        {"prompt": [chat, chat[1:]]}
    ]


def test_without_shuffling_and_in_evaluation_the_order_is_the_given_one():
    prompts = [str(number) for number in range(9)]
    fixed, shuffled = ListPrompts(prompts=prompts, shuffle=False), ListPrompts(prompts=prompts)
    for loader in (fixed.train_dataloader(), shuffled.val_dataloader(), shuffled.test_dataloader()):
        assert [prompt for batch in loader for prompt in batch["prompt"]] == prompts


def test_the_last_prompts_can_be_held_out():
    data = ListPrompts(prompts=list("abcd"), columns={"answer": [1, 2, 3, 4]}, val_count=1, shuffle=False)
    assert list(data.train_dataloader()) == [{"prompt": ["a", "b", "c"], "answer": [1, 2, 3]}]
    assert list(data.val_dataloader()) == [{"prompt": ["d"], "answer": [4]}]
    assert list(data.test_dataloader()) == [{"prompt": ["d"], "answer": [4]}]
    whole = ListPrompts(prompts=list("abcd"), shuffle=False)
    assert list(whole.val_dataloader()) == list(whole.train_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"data\.prompts must be a list of at least one prompt, got \[\]"),
        ({"prompts": "one text"}, r"data\.prompts must be a list .*, got 'one text'"),
        ({"prompts": ["a", "b", " "]}, r"data\.prompts\[2\] is empty"),
        ({"prompts": ["a", []]}, r"data\.prompts\[1\] is neither a text nor a list of messages"),
        ({"prompts": ["a", 5]}, r"data\.prompts\[1\] is neither a text nor a list of messages: 5"),
        ({"prompts": [[{"role": "user"}]]}, r"data\.prompts\[0\] has a message without role and content"),
        ({"prompts": ["a", [{"role": "user", "content": "b"}]]}, r"prompts\[1\] is a list, data\.prompts\[0\] a str"),
        ({"prompts": ["a", "half \ud83d"]}, r"data\.prompts\[1\] has half a character, '\\ud83d'"),
        ({"prompts": [[{"role": "user", "content": "\ud83d"}]]}, r"data\.prompts\[0\] has half a character"),
        ({"prompts": ["a", "b"], "columns": {"answer": [1]}}, r"data\.columns\.answer has 1 entries for 2 prompts"),
        ({"prompts": ["a"], "columns": {"prompt": ["b"]}}, r"data\.columns\.prompt: .* cannot be called 'prompt'"),
        ({"prompts": ["a", "b"], "val_count": 2}, "data.val_count=2 leaves none of the 2 prompts for training"),
        ({"prompts": ["a", "b"], "val_count": -1}, "data.val_count must be a whole number of at least 0, got -1"),
        ({"prompts": ["a"], "batch_size": 0}, "data.batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        ListPrompts(**arguments)
