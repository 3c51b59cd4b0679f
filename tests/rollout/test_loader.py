"""The cached buffer: what it hands out, in which order, with which weights, and from where it resumes."""

import pytest
import torch
from tiny import Prompts
from torch.utils.data import DataLoader, RandomSampler

from lit_rlhf.batch import Experience
from lit_rlhf.data.passes import END_OF_PASS, SeededPasses
from lit_rlhf.data.tokenize import PromptRows, split_rows
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.loader import RolloutLoader

LENGTHS = torch.tensor([1, 5, 2, 2, 4, 3, 1, 5])


def experience(iteration, rows):
    """Row i of iteration n holds the number 100 n + i in its prompt."""
    size = len(rows)
    mask = torch.arange(5) < LENGTHS[:size, None]
    zeros = torch.zeros(size, 5)
    return Experience(
        prompt_ids=(100 * iteration + torch.arange(size)).unsqueeze(1),
        prompt_mask=torch.ones(size, 1, dtype=torch.bool),
        response_ids=zeros.long(),
        response_mask=mask,
        logprobs=zeros,
        ref_logprobs=zeros,
        advantages=zeros,
    )


def loader(**changes):
    settings = {"rollout_batch_size": 8, "minibatch_size": 4, "micro_batches": 2, "epochs": 2, "seed": 5}
    prompts = PromptRows(SeededPasses(Prompts().train_dataloader(), seed=5))
    return RolloutLoader(prompts=prompts, collect=experience, **{**settings, **changes})


def numbers(batches):
    return [batch.prompt_ids[:, 0].tolist() for batch in batches]


def test_every_epoch_visits_every_completion_once_in_its_own_order():
    batches = numbers(loader())
    assert len(batches) == len(loader()) == 2 * 2 * 2
    first, second = ([n for batch in batches[i : i + 4] for n in batch] for i in (0, 4))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_the_order_is_a_function_of_seed_iteration_and_epoch():
    one, same, other = loader(), loader(), loader(seed=6)
    assert numbers(one) == numbers(same) != numbers(other)
    one.finish()
    later = numbers(one)
    assert [[n - 100 for n in batch] for batch in later] != numbers(same)


def test_weights_turn_micro_batch_means_into_the_minibatch_mean_over_tokens():
    batches = list(loader())
    for pair in zip(batches[::2], batches[1::2], strict=True):
        values = [batch.prompt_ids.float().expand_as(batch.response_mask)[batch.response_mask] for batch in pair]
        # Lightning divides by the number of micro-batches (2).
        accumulated = sum(v.mean() * batch.weight for v, batch in zip(values, pair, strict=True)) / 2
        torch.testing.assert_close(accumulated, torch.cat(values).mean())


def test_state_resumes_in_the_middle_of_an_iteration():
    whole = loader()
    expected = numbers(whole)
    stopped = loader()
    iterator = iter(stopped)
    first = [next(iterator) for _ in range(3)]
    state = stopped.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert numbers(first) + numbers(resumed) == expected
    for one in (whole, resumed):
        one.finish()
    assert numbers(whole) == numbers(resumed)
    assert whole.prompts.draw(11) == resumed.prompts.draw(11)


def test_prompts_continue_across_batches_and_passes_after_a_resume():
    whole = PromptRows(SeededPasses(Prompts(batch_size=3).train_dataloader(), seed=1))
    drawn = [whole.draw(5) for _ in range(6)]
    assert sorted(row["number"] for rows in drawn for row in rows)[:8] == [0, 0, 0, 0, 1, 1, 1, 1]
    for stop in range(6):
        part = PromptRows(SeededPasses(Prompts(batch_size=3).train_dataloader(), seed=1))
        for _ in range(stop):
            part.draw(5)
        resumed = PromptRows(SeededPasses(Prompts(batch_size=3).train_dataloader(), seed=1))
        resumed.load_state_dict(part.state_dict())
        assert [resumed.draw(5) for _ in range(6 - stop)] == drawn[stop:]


def test_passes_shuffle_anew_and_leave_the_global_generator_alone():
    passes = SeededPasses(Prompts(batch_size=8).train_dataloader(), seed=1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    orders = [[batch["number"].tolist() for batch in passes.one_pass()] for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert orders[0] != orders[1]


def test_stop_ends_the_iteration_early():
    rollouts = loader()
    iterator = iter(rollouts)
    next(iterator)
    rollouts.stop()
    assert list(iterator) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatch_size": 3}, "rollout_batch_size=8 is not divisible by algorithm.minibatch_size=3"),
        ({"micro_batches": 3}, "minibatch_size=4 is not divisible by trainer.accumulate_grad_batches=3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(changes, message):
    with pytest.raises(UserError, match=message):
        loader(**changes)


@pytest.mark.parametrize("own", ["loader", "sampler"])
def test_a_loader_with_a_generator_of_its_own_resumes_at_its_place(own):
    def passes():
        generator = torch.Generator().manual_seed(3)
        rows = list(range(10))
        if own == "loader":
            return SeededPasses(DataLoader(rows, batch_size=2, shuffle=True, generator=generator), seed=1)
        sampler = RandomSampler(rows, generator=generator)
        return SeededPasses(DataLoader(rows, batch_size=2, sampler=sampler), seed=1)

    def draw(source, count):
        return [b.tolist() for b in (source.next_batch() for _ in range(count)) if b is not END_OF_PASS]

    whole = passes()
    draw(whole, 8)
    resumed = passes()
    resumed.load_state_dict(whole.state_dict())
    assert draw(resumed, 8) == draw(whole, 8)


@pytest.mark.parametrize("drawn", [2, 4])  # in the middle of a batch, and at its end
def test_a_resume_says_if_the_data_has_changed(drawn, caplog):
    def rows(texts):
        return PromptRows(SeededPasses([{"prompt": texts[:2]}, {"prompt": texts[2:4]}, {"prompt": texts[4:]}], seed=1))

    whole = rows(["a", "b", "c", "d", "e", "f"])
    whole.draw(1)
    whole.draw(drawn)
    for texts, changed in (["a", "b", "c", "d", "e", "f"], False), (["a", "b", "c", "dd", "e", "f"], True):
        caplog.clear()
        resumed = rows(texts)
        resumed.load_state_dict(whole.state_dict())
        resumed.draw(1)
        assert (f"the first {drawn // 2 + 1} batches of pass 1" in caplog.text) == changed


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match="empty"):
        PromptRows(SeededPasses([], seed=0)).draw(1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a"]}, "neither 'prompt' nor 'input_ids'"),
        (["a"], "yields list"),
        ({"prompt": ["a", "b"], "answer": [1]}, "'answer' of the prompt batch has 1 entries, but 'prompt' has 2"),
        ({"input_ids": torch.ones(1, 2)}, "without 'attention_mask'"),
    ],
)
def test_batches_that_are_no_prompts_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        split_rows(batch)


# ---- groups and pairs ----------------------------------------------------------------------------------------


def test_the_rows_of_a_unit_stay_together_in_every_minibatch_and_micro_batch():
    batches = numbers(loader(unit=2))
    assert sorted(n for batch in batches[:4] for n in batch) == list(range(8))
    for batch in batches:
        assert [n - 1 for n in batch[1::2]] == batch[0::2]
        assert all(n % 2 == 0 for n in batch[0::2])
    assert batches[:4] != batches[4:]


def test_a_unit_that_a_micro_batch_would_cut_is_refused():
    with pytest.raises(UserError, match=r"minibatch_size / trainer.accumulate_grad_batches=1 is not divisible by"):
        loader(unit=2, micro_batches=4)


def test_less_experience_than_completions_makes_fewer_minibatches():
    kept = loader(experience_size=4, micro_batches=1)
    kept.collect = lambda iteration, rows: experience(iteration, rows)[[1, 3, 5, 7]]
    batches = numbers(kept)
    assert len(batches) == len(kept) == 2
    assert all(sorted(batch) == [1, 3, 5, 7] for batch in batches)


def test_each_prompt_is_drawn_as_often_as_its_group_is_large_and_a_resume_goes_on():
    def rows(group_size):
        return PromptRows(SeededPasses(Prompts(batch_size=3).train_dataloader(), seed=1), group_size)

    single, grouped = rows(1), rows(4)
    drawn = [single.draw(5) for _ in range(3)]
    repeated = [grouped.draw(20) for _ in range(3)]
    for once, often in zip(drawn, repeated, strict=True):
        assert often == [row for row in once for _ in range(4)]
    resumed = rows(4)
    resumed.load_state_dict(grouped.state_dict())
    assert resumed.draw(12) == grouped.draw(12) == [row for row in single.draw(3) for _ in range(4)]


def test_a_resume_finds_the_order_of_a_loader_whose_workers_persist():
    def passes():
        loader = DataLoader(range(20), batch_size=5, shuffle=True, num_workers=1, persistent_workers=True)
        return SeededPasses(loader, seed=3)

    whole, resumed = passes(), passes()
    first = [batch.tolist() for batch in whole.one_pass()]
    place = whole.state_dict()
    second = [batch.tolist() for batch in whole.one_pass()]
    resumed.load_state_dict(place)
    assert [batch.tolist() for batch in resumed.one_pass()] == second != first
