"""Arithmetic problems with the answers that the verifier reads."""

import json
import re

import pytest
import torch
from command_line import TINY, run_here

from lit_rlhf.data import ArithmeticPrompts
from lit_rlhf.errors import UserError
from lit_rlhf.rewards import VerifierReward


def problems(loader) -> dict[str, int]:
    return {
        prompt: answer
        for batch in loader
        for prompt, answer in zip(batch["prompt"], batch["answer"], strict=True)
    }


def test_all_problems_of_a_small_range_are_there_once_with_their_answers():
    data = ArithmeticPrompts(operations=["+", "-", "*"], maximum=1, count=9, val_count=3)
    train, held_out = problems(data.train_dataloader()), problems(data.val_dataloader())
    assert (len(train), len(held_out)) == (9, 3)
    assert train | held_out == {
        "0 + 0 =": 0, "0 + 1 =": 1, "1 + 0 =": 1, "1 + 1 =": 2,
        "0 - 0 =": 0, "0 - 1 =": -1, "1 - 0 =": 1, "1 - 1 =": 0,
        "0 * 0 =": 0, "0 * 1 =": 0, "1 * 0 =": 0, "1 * 1 =": 1,
    }  # fmt: skip


def test_the_seed_alone_decides_which_problems_there_are():
    torch.manual_seed(0)
    first = ArithmeticPrompts(seed=1).train_rows
    torch.manual_seed(1)
    assert ArithmeticPrompts(seed=1).train_rows == first
    assert ArithmeticPrompts(seed=2).train_rows != first


def test_more_training_problems_leave_the_others_as_they_are():
    few, many = ArithmeticPrompts(count=10), ArithmeticPrompts(count=500)
    assert many.train_rows[:10] == few.train_rows
    assert many.held_out_rows == few.held_out_rows


def test_numbers_reach_the_maximum_and_operations_are_the_chosen_ones():
    data = ArithmeticPrompts(operations=["*"], maximum=12, count=169, val_count=0)
    found = [re.fullmatch(r"(\d+) \* (\d+) =", row["prompt"]).groups() for row in data.train_rows]
    assert {int(number) for pair in found for number in pair} == set(range(13))
    assert data.val_dataloader() == data.test_dataloader() == []


def test_a_template_wraps_the_problem():
    data = ArithmeticPrompts(operations=["+"], maximum=1, count=4, val_count=0, template='{"q": "{problem}"}')
    assert sorted(row["prompt"] for row in data.train_rows)[0] == '{"q": "0 + 0"}'


def test_training_is_shuffled_unless_told_otherwise_and_evaluation_never():
    torch.manual_seed(0)
    shuffled, fixed = ArithmeticPrompts(batch_size=4), ArithmeticPrompts(batch_size=4, shuffle=False)
    given = [row["prompt"] for row in fixed.train_rows[:4]]
    assert next(iter(fixed.train_dataloader()))["prompt"] == given
    assert next(iter(shuffled.train_dataloader()))["prompt"] != given
    assert list(problems(shuffled.val_dataloader())) == [row["prompt"] for row in fixed.held_out_rows]


def test_the_verifier_reads_the_answers():
    batch = next(iter(ArithmeticPrompts(operations=["-"], maximum=1, count=4, val_count=0).train_dataloader()))
    right = [f" {answer}" for answer in batch["answer"]]
    assert VerifierReward()(batch["prompt"], right, answer=batch["answer"]) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operations": ["/"]}, r"data.operations=\['/'\]: must list any of \+, -, \*, each once"),
        ({"operations": ["+", "+"]}, "each once"),
        ({"operations": []}, r"data.operations=\[\]"),
        ({"maximum": 0}, "data.maximum must be a whole number of at least 1, got 0"),
        ({"count": 0}, "data.count must be"),
        ({"val_count": -1}, "data.val_count must be"),
        ({"seed": 0.5}, "data.seed must be"),
        ({"batch_size": 0}, "data.batch_size must be"),
        ({"template": "What is it?"}, r"data.template='What is it\?' must contain \{problem\}"),
        ({"operations": ["+"], "maximum": 2, "count": 8, "val_count": 2}, "8 and data.val_count=2 are more than the 9"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        ArithmeticPrompts(**arguments)


def test_a_run_completes_problems_and_verifies_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [option for option in TINY if not option.startswith("data")]
    result = run_here(
        "train", *run, "data=arithmetic", "data.maximum=1", "data.count=4", "data.val_count=4", "reward=verifier",
        "paths.output_dir=run",
    )  # fmt: skip
    assert result.code == 0, result.err
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["split"] for sample in samples} == {"train", "validation"}
    assert all(re.fullmatch(r"[01] [+-] [01] =", sample["prompt"]) for sample in samples)
    assert all(sample["score"] in (0, 1) for sample in samples)
