"""The sampler against transformers' generate, against exact distributions, and against itself in other chunks."""

import pytest
import torch
from tiny import tiny_model

from lit_rlhf.batch import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.sampler import Sampler

FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox"]
PROMPTS = [[5, 9, 44, 7, 30], [12, 13], [200], [8, 8, 8, 90, 17, 33, 2 + 60]]
EOS, PAD = 2, 0


def batch_of(prompts, episodes=None):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    numbers = torch.arange(len(prompts)) if episodes is None else torch.tensor(episodes)
    return PromptBatch(prompt_ids=ids, prompt_mask=mask, episodes=numbers, prompts=[""] * len(prompts))


def run(model, prompts, seed=0, pad=PAD, stop=(EOS,), episodes=None, **settings):
    return Sampler(**settings).generate(model, batch_of(prompts, episodes), seed=seed, stop_ids=stop, pad_id=pad)


def texts(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate_with_left_padding(family):
    model = tiny_model(family)
    batch = batch_of(PROMPTS)
    expected = model.generate(
        batch.prompt_ids, attention_mask=batch.prompt_mask.long(), do_sample=False, max_new_tokens=12, pad_token_id=PAD
    )[:, batch.prompt_ids.shape[1] :]
    ours = run(model, PROMPTS, temperature=0.0, max_new_tokens=12)
    assert torch.equal(ours.response_ids, expected[:, : ours.response_ids.shape[1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_logprobs_are_those_of_unpadded_single_forward_passes(family):
    model, temperature = tiny_model(family), 0.7
    rollout = run(model, PROMPTS, temperature=temperature, max_new_tokens=9)
    for row, prompt in enumerate(PROMPTS):
        response = rollout.response_ids[row][rollout.response_mask[row]]
        logits = model(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(rollout.logprobs[row][rollout.response_mask[row]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_distribution_is_the_full_softmax_at_the_temperature(temperature):
    model = tiny_model(spread=0.5)
    number = 20_000
    rollout = run(model, [PROMPTS[0]] * number, temperature=temperature, max_new_tokens=1)
    expected = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature, -1) * number
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=len(expected)).double()
    rare = expected < 5  # pooled, as a chi-square test wants
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    degrees = len(observed) - 1
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    assert rare.sum() > 50  # a top-k of 50 would leave these out
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_second_token_follows_its_conditional_distribution():
    model = tiny_model(spread=0.8)
    rollout = run(model, [PROMPTS[1]] * 8000, max_new_tokens=2, stop=())
    first = int(torch.mode(rollout.response_ids[:, 0]).values)
    second = rollout.response_ids[rollout.response_ids[:, 0] == first, 1]
    expected = torch.softmax(model(torch.tensor([[*PROMPTS[1], first]])).logits[0, -1].double(), -1)
    observed = torch.bincount(second, minlength=len(expected)) / len(second)
    assert 0.5 * (observed - expected).abs().sum() < 0.5 * (len(expected) / len(second)) ** 0.5


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_the_same_episodes_come_out_for_any_chunk_size_and_order(chunk):
    model = tiny_model()
    prompts = PROMPTS * 3
    whole = texts(run(model, prompts, max_new_tokens=10))
    assert texts(run(model, prompts, max_new_tokens=10, chunk_size=chunk)) == whole
    backwards = run(model, prompts[::-1], max_new_tokens=10, episodes=list(range(len(prompts)))[::-1])
    assert texts(backwards) == whole[::-1]


def test_rows_that_finish_do_not_disturb_the_others():
    model = tiny_model(spread=0.15)
    prompts = [PROMPTS[i % 4] for i in range(40)]
    many_stops = tuple(range(2, 60))  # about a quarter of the tokens end a completion: rows leave at every step
    together = run(model, prompts, max_new_tokens=12, stop=many_stops)
    assert len({len(t) for t in texts(together)}) > 4
    alone = [texts(run(model, [p], max_new_tokens=12, stop=many_stops, episodes=[i]))[0] for i, p in enumerate(prompts)]
    assert texts(together) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_computed_once_for_its_group(family):
    model, rows = tiny_model(family), []
    model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    groups = run(model, [p for p in PROMPTS for _ in range(3)], max_new_tokens=6, stop=())
    assert rows == [4] + 5 * [12]
    rows.clear()
    order = [3 * prompt + member for member in range(3) for prompt in range(4)]  # no prompt follows itself
    apart = run(model, PROMPTS * 3, max_new_tokens=6, stop=(), episodes=order)
    assert rows == 6 * [12]
    assert torch.equal(groups.response_ids[order], apart.response_ids)
    torch.testing.assert_close(groups.logprobs[order], apart.logprobs, atol=1e-5, rtol=1e-5)


def test_prompts_that_differ_in_their_padding_alone_are_not_one():
    # The id of the padding may also be a token of a prompt.
    model = tiny_model()
    together = run(model, [[PAD, 5, 9], [5, 9]], max_new_tokens=6)
    alone = [texts(run(model, [p], max_new_tokens=6, episodes=[i]))[0] for i, p in enumerate([[PAD, 5, 9], [5, 9]])]
    assert texts(together) == alone


def test_two_seeds_differ_and_one_seed_repeats():
    model = tiny_model()
    first, again, other = (texts(run(model, PROMPTS, seed=s, max_new_tokens=8)) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_emitted_stop_token_is_inside_the_mask_once_even_when_it_is_the_pad_token():
    model = tiny_model(spread=0.15)
    stops = tuple(range(2, 60))
    rollout = run(model, PROMPTS * 10, pad=EOS, stop=stops, max_new_tokens=12)
    for ids, mask, finished in zip(rollout.response_ids, rollout.response_mask, rollout.finished, strict=True):
        counted = ids[mask].tolist()
        assert sum(t in stops for t in counted) == int(finished)
        assert not finished or counted[-1] in stops
        assert mask.int().diff().max() <= 0  # ones, then zeros
        assert (ids[~mask] == EOS).all()
    assert rollout.finished.any()
    assert not rollout.finished.all()


def test_a_completion_cut_at_the_limit_keeps_its_tokens():
    model = tiny_model()
    long = run(model, PROMPTS, max_new_tokens=9, stop=())
    short = run(model, PROMPTS, max_new_tokens=5, stop=())
    assert torch.equal(short.response_ids, long.response_ids[:, :5])
    assert short.response_mask.all()
    assert not short.finished.any()


def test_a_custom_stop_token_finishes_a_completion():
    model = tiny_model()
    free = run(model, PROMPTS, max_new_tokens=6, stop=())
    stop = int(free.response_ids[0, 2])
    stopped = run(model, PROMPTS, max_new_tokens=6, stop=(), stop_tokens=[stop])
    assert stopped.finished[0]
    assert texts(stopped)[0] == free.response_ids[0, : free.response_ids[0].tolist().index(stop) + 1].tolist()


def test_top_k_and_top_p_cut_the_distribution_when_asked():
    model = tiny_model(spread=0.5)
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    best = set(logits.topk(3).indices.tolist())
    assert set(run(model, [PROMPTS[0]] * 300, max_new_tokens=1, top_k=3).response_ids[:, 0].tolist()) == best
    ordered = logits.softmax(-1).sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.3).sum()) + 1
    nucleus = set(ordered.indices[:size].tolist())
    assert set(run(model, [PROMPTS[0]] * 2000, max_new_tokens=1, top_p=0.3).response_ids[:, 0].tolist()) == nucleus


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"chunk_size": 0}, {"top_k": 0},
        {"top_p": 0.0}, {"top_p": 1.5},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(UserError, match=f"sampler.{next(iter(settings))}"):
        Sampler(**settings)


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_a_cut_or_greedy_distribution_is_refused_in_training(settings):
    with pytest.raises(UserError, match=f"sampler.{next(iter(settings))}"):
        Sampler(**settings).require_training()
