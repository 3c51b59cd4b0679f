"""Texts for SFT and prompts for the online algorithms."""

import itertools

import pytest
import torch

from lit_rlhf.data import HumanRatings, HumanRatingsPrompts, HumanRatingsText
from lit_rlhf.data.human_ratings import split_of
from lit_rlhf.errors import UserError


@pytest.fixture
def texts_of():
    """The first texts, of those made of these words and a number, that fall into a split."""

    def take(split: str, count: int, words: str = "a b c d e f g h") -> list[str]:
        numbered = (f"{words} {number}" for number in itertools.count())
        return list(itertools.islice((text for text in numbered if split_of(text) == split), count))

    return take


def write_all(write_ratings, texts: list[str]) -> None:
    write_ratings([(str(number), text, [number % 9 - 4]) for number, text in enumerate(texts)])


def whole(loader) -> dict[str, list]:
    batches = list(loader)
    return {key: list(itertools.chain.from_iterable(batch[key] for batch in batches)) for key in batches[0]}


@pytest.fixture
def rated(write_ratings):
    texts = [f"snippet number {number} is as long as the others" for number in range(300)]
    write_all(write_ratings, texts)
    return {text: float(number % 9 - 4) for number, text in enumerate(texts)}


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_text_batches_have_the_text_and_its_mean(rated):
    data = ready(HumanRatingsText(batch_size=16))
    batch = next(iter(data.train_dataloader()))
    assert len(batch["text"]) == 16
    assert batch["mean"].tolist() == [rated[text] for text in batch["text"]]
    for split, loader in (
        ("train", data.train_dataloader()),
        ("validation", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        assert sorted(whole(loader)["text"]) == sorted(snippet.text for snippet in HumanRatings().load(split))


def test_only_texts_rated_at_least_so_are_kept(rated):
    data = ready(HumanRatingsText(min_mean=2.0))
    kept = {text for loader in (data.train_dataloader(), data.val_dataloader()) for text in whole(loader)["text"]}
    held = {snippet.text for split in ("train", "validation") for snippet in HumanRatings().load(split)}
    assert kept == {text for text in held if rated[text] >= 2.0}


@pytest.mark.usefixtures("rated")
def test_a_limit_takes_the_same_texts_every_time():
    data = ready(HumanRatingsText(limit=5))
    assert sorted(whole(data.train_dataloader())["text"]) == sorted(
        snippet.text for snippet in HumanRatings().load("train")[:5]
    )
    assert len(data.rows["validation"]) == 5


@pytest.mark.usefixtures("rated")
def test_a_filter_that_leaves_nothing_is_named_with_the_count():
    train = len(HumanRatings().load("train"))
    with pytest.raises(UserError, match=rf"min_mean=4\.5 leaves none of the {train} train snippets of movies"):
        HumanRatingsText(min_mean=4.5).setup()


def test_an_empty_split_is_named(write_ratings, texts_of):
    write_all(write_ratings, texts_of("train", 3))
    with pytest.raises(UserError, match="none of the 0 validation snippets of movies"):
        HumanRatingsText().setup()


def test_prompts_are_the_first_words_of_held_out_snippets(write_ratings, texts_of):
    texts = {
        "train": texts_of("train", 4, "not to be used for any prompt at all"),
        "validation": texts_of("validation", 1, "the  plot is, frankly, as thin as paper"),
        "test": texts_of("test", 1, "an hour of my life that I want back"),
    }
    write_all(write_ratings, [text for split in texts.values() for text in split])
    data = ready(HumanRatingsPrompts(prompt_words=4))
    batch = next(iter(data.train_dataloader()))
    assert batch["prompt"] == ["the plot is, frankly,"]
    assert batch["snippet"] == [" ".join(texts["validation"][0].split())]
    assert torch.equal(batch["mean"], torch.tensor([0.0]))  # written fifth: 4 % 9 - 4
    assert next(iter(data.val_dataloader()))["prompt"] == ["an hour of my"]
    assert next(iter(data.test_dataloader()))["prompt"] == ["an hour of my"]


def test_snippets_too_short_to_leave_something_are_left_out(write_ratings, texts_of):
    long = texts_of("validation", 1, "one two three four five six seven")  # and the number makes eight
    short = texts_of("validation", 1, "six words are not quite")
    test = texts_of("test", 1, "long enough too with its eight words") + texts_of("test", 1, "but this one is not")
    write_all(write_ratings, long + short + test)
    data = ready(HumanRatingsPrompts(prompt_words=4))  # at least twice four words
    assert [row["snippet"] for row in data.rows["train"]] == long
    assert [row["snippet"] for row in data.rows["test"]] == test[:1]
    data = ready(HumanRatingsPrompts(prompt_words=4, min_words=6))
    assert sorted(row["prompt"] for row in data.rows["train"]) == ["one two three four", "six words are not"]


def test_a_prompt_occurs_once_and_never_in_training_if_it_is_evaluated(write_ratings, texts_of):
    texts = texts_of("validation", 3, "shared by both of the splits it is")
    texts += texts_of("test", 3, "shared by both of the splits it is")
    texts += texts_of("validation", 2, "found in training alone it is this time")
    write_all(write_ratings, texts)
    data = ready(HumanRatingsPrompts(prompt_words=4))
    assert [row["prompt"] for row in data.rows["train"]] == ["found in training alone"]
    assert [row["prompt"] for row in data.rows["test"]] == ["shared by both of"]
    write_all(write_ratings, texts[:6])
    with pytest.raises(UserError, match="every validation prompt of movies is one of the 1 evaluation prompts"):
        HumanRatingsPrompts(prompt_words=4).setup()


@pytest.mark.usefixtures("rated")
def test_evaluation_prompts_are_so_many_and_always_the_same():
    arguments = {"prompt_words": 3, "split": "train", "eval_split": "validation"}
    first, again = (ready(HumanRatingsPrompts(eval_prompts=7, **arguments)) for _ in range(2))
    assert len(whole(first.val_dataloader())["prompt"]) == 7
    assert whole(first.val_dataloader()) == whole(again.val_dataloader())
    more = ready(HumanRatingsPrompts(eval_prompts=9, **arguments))
    assert more.rows["validation"][:7] == first.rows["validation"]


@pytest.mark.usefixtures("rated")
def test_training_prompts_are_shuffled_by_the_global_generator():
    data = ready(HumanRatingsPrompts(prompt_words=3, split="train"))
    orders = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        orders.append(whole(data.train_dataloader())["prompt"])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_words": 0}, "prompt_words=0"),
        ({"eval_prompts": 0}, "eval_prompts=0"),
        ({"prompt_words": 5, "min_words": 5}, "min_words=5 must exceed prompt_words=5"),
        ({"split": "test"}, "split and eval_split are both 'test'"),
        ({"eval_split": "dev"}, "'dev'; choose from train, validation, test"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        HumanRatingsPrompts(**arguments)


def test_snippets_that_are_all_too_short_are_named_with_the_count(write_ratings, texts_of):
    write_all(write_ratings, texts_of("validation", 2, "too short") + texts_of("test", 3, "too short"))
    with pytest.raises(UserError, match="min_words=8 leaves none of the 3 test snippets of movies"):
        HumanRatingsPrompts().setup()
