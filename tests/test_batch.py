"""Shape checks, rows by index, concatenation and trimming of the batch types."""

import pytest
import torch

from lit_rlhf.batch import Experience, PromptBatch, Rollout


def rollout(prompt_width=3, width=2, rows=2, start=0):
    return Rollout(
        prompt_ids=torch.full((rows, prompt_width), 7),
        prompt_mask=torch.ones(rows, prompt_width, dtype=torch.bool),
        response_ids=torch.full((rows, width), 9),
        response_mask=torch.ones(rows, width, dtype=torch.bool),
        logprobs=torch.full((rows, width), -1.0),
        finished=torch.ones(rows, dtype=torch.bool),
        episodes=torch.arange(start, start + rows),
    )


def test_cat_pads_prompts_on_the_left_and_responses_on_the_right():
    both = Rollout.cat([rollout(), rollout(prompt_width=4, width=3, start=2)])
    assert both.prompt_mask.tolist()[0] == [False, True, True, True]
    assert both.response_mask.tolist()[0] == [True, True, False]
    assert both.logprobs.tolist()[0] == [-1.0, -1.0, 0.0]
    assert both.episodes.tolist() == [0, 1, 2, 3]


def test_rows_are_taken_from_tensors_and_lists_alike():
    batch = PromptBatch(
        prompt_ids=torch.tensor([[1], [2], [3]]),
        prompt_mask=torch.ones(3, 1, dtype=torch.bool),
        episodes=torch.arange(3),
        prompts=["a", "b", "c"],
        columns={"answer": [10, 20, 30]},
    )
    picked = batch[[2, 0]]
    assert picked.prompt_ids.tolist() == [[3], [1]]
    assert picked.prompts == ["c", "a"]
    assert picked.columns == {"answer": [30, 10]}
    assert len(batch[1:]) == 2


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("episodes", torch.arange(3), "episodes has 3 rows, but prompt_ids has 2"),
        ("logprobs", torch.zeros(2, 5), "logprobs has 5 right, but response_ids has 2"),
        ("logprobs", torch.zeros(2), "logprobs must be 2-D"),
        ("response_mask", torch.ones(2, 2), "response_mask must be bool"),
    ],
)
def test_wrong_shapes_and_masks_are_refused_by_name(field, value, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Rollout(**{**vars(rollout()), field: value})


def test_trim_drops_columns_that_are_padding_in_every_row():
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    batch = Experience(
        prompt_ids=torch.tensor([[0, 5, 6], [0, 0, 6]]),
        prompt_mask=torch.tensor([[False, True, True], [False, False, True]]),
        response_ids=torch.arange(8).view(2, 4),
        response_mask=mask,
        logprobs=torch.zeros(2, 4),
        ref_logprobs=torch.zeros(2, 4),
        advantages=torch.ones(2, 4),
    ).trim()
    assert batch.prompt_ids.tolist() == [[5, 6], [0, 6]]
    assert batch.response_ids.tolist() == [[0, 1], [4, 5]]
    assert batch.advantages.shape == (2, 2)
