"""Preference pairs and scores: what is drawn, how often, and from which snippets."""

import itertools
import random
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch

from lit_rlhf.data import HumanRatings, HumanRatingsPairs, HumanRatingsScores, RatedSnippet
from lit_rlhf.data.rated_pairs import agreement, mean_pairs, rater_pairs
from lit_rlhf.errors import UserError


def snippet(text: str, *ratings: int) -> RatedSnippet:
    return RatedSnippet(text, text, sum(ratings) / len(ratings), ratings)


@pytest.fixture
def rated(write_ratings):
    """400 snippets whose scores spread over the whole scale."""
    rng = random.Random(0)
    rows = []
    for number in range(400):
        centre = rng.randint(-3, 3)
        rows.append((str(number), f"snippet number {number}", [centre + rng.randint(-1, 1) for _ in range(9)]))
    write_ratings(rows)
    return {text: sum(scores) / 9 for _, text, scores in rows}


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def whole(loader) -> dict[str, list]:
    batches = list(loader)
    return {key: list(itertools.chain.from_iterable(batch[key] for batch in batches)) for key in batches[0]}


def uses(pairs) -> Counter:
    return Counter(member.text for pair in pairs for member in pair)


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [  # of the 9 equally likely draws of x and y: x > y, x < y, x == y (drawn again)
        ((0, 0, 1), (0, 1, 2), 1 / 6),  # 1, 5, 3
        ((0, 0, 4), (0, 1, 1), 3 / 7),  # 3, 4, 2
    ],
)
def test_the_chosen_snippet_is_the_one_with_the_higher_drawn_score(first, second, share):
    pairs = rater_pairs([snippet("first", *first), snippet("second", *second)], 6000, 0.0, random.Random(0))
    chosen = Counter(pair[0].text for pair in pairs)
    deviation = (6000 * share * (1 - share)) ** 0.5
    assert chosen["first"] == pytest.approx(6000 * share, abs=4.5 * deviation)
    assert chosen["first"] + chosen["second"] == 6000


@pytest.mark.parametrize(("size", "count"), [(20, 20), (20, 50), (21, 63), (3, 9)])
def test_snippets_are_used_evenly_and_never_against_themselves(size, count):
    snippets = [snippet(f"s{number}", number % 9 - 4, number % 7 - 3) for number in range(size)]
    pairs = rater_pairs(snippets, count, 0.0, random.Random(1))
    assert len(pairs) == count
    assert all(chosen is not rejected for chosen, rejected in pairs)
    used = uses(pairs)
    if size % 2 == 0:
        assert {used[member.text] for member in snippets} <= {2 * count // size, 2 * count // size + 1}
    else:  # one sits out in every pass of (size - 1) / 2 pairs
        passes = -(-count // (size // 2))
        assert all(used[member.text] <= passes for member in snippets)


def test_a_smallest_difference_is_kept_and_everyone_with_a_partner_is_used():
    snippets = [snippet(f"s{number}", number - 4) for number in range(9)]  # means -4 to 4
    pairs = rater_pairs(snippets, 60, 4.0, random.Random(0))
    assert all(chosen.mean - rejected.mean >= 4 for chosen, rejected in pairs)
    assert set(uses(pairs)) == {f"s{number}" for number in range(9)}  # -4 with 0 to 4, ..., 0 with -4 and 4
    pairs = rater_pairs(snippets, 60, 5.0, random.Random(0))
    assert set(uses(pairs)) == {f"s{number}" for number in (0, 1, 2, 3, 5, 6, 7, 8)}  # 0 is 5 away from nobody


def test_snippets_that_nobody_can_tell_apart_make_no_pair():
    same = [snippet("a", 0, 0), snippet("b", 0), snippet("c", 0, 0, 0)]
    with pytest.raises(UserError, match="no pair of the 3 training snippets"):
        rater_pairs(same, 5, 0.0, random.Random(0))
    assert set(uses(rater_pairs([*same, snippet("d", 0, 1)], 10, 0.0, random.Random(0)))) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("snippets", [[], [snippet("only", 1, 2)]])
def test_too_few_snippets_make_no_pair(snippets):
    with pytest.raises(UserError, match=f"no pair of the {len(snippets)} training snippets"):
        rater_pairs(snippets, 5, 0.0, random.Random(0))


def test_pairs_by_mean_are_all_those_that_differ_enough_each_once():
    rng = random.Random(3)
    snippets = [snippet(f"s{number}", rng.randint(-4, 4), rng.randint(-4, 4)) for number in range(25)]
    expected = {
        (high.text, low.text) for high, low in itertools.permutations(snippets, 2) if high.mean - low.mean >= 1.5
    }
    pairs = mean_pairs(snippets, 10_000, 1.5, random.Random(0))
    assert {(high.text, low.text) for high, low in pairs} == expected
    assert len(pairs) == len(expected)
    some = mean_pairs(snippets, 40, 1.5, random.Random(0))
    assert len({(high.text, low.text) for high, low in some} & expected) == len(some) == 40


def test_training_batches_hold_training_snippets_and_the_signed_difference_of_means(rated):
    data = ready(HumanRatingsPairs(batch_size=32))
    batch = next(iter(data.train_dataloader()))
    assert (len(batch["chosen"]), len(batch["rejected"]), batch["margin"].shape) == (32, 32, (32,))
    rows = whole(data.train_dataloader())
    train = {member.text for member in HumanRatings().load("train")}
    assert len(rows["chosen"]) == len(train)  # the default number of pairs
    assert set(rows["chosen"]) | set(rows["rejected"]) == train
    for chosen, rejected, margin in zip(rows["chosen"], rows["rejected"], rows["margin"], strict=True):
        assert margin == pytest.approx(rated[chosen] - rated[rejected], abs=1e-6)
    assert (torch.stack(rows["margin"]) < 0).any()  # some raters disagree with the mean
    assert (torch.stack(rows["margin"]) > 0).float().mean() > 0.7


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_pairs_come_from_their_split_and_are_labelled_by_the_means(rated, split):
    data = ready(HumanRatingsPairs(batch_size=50, eval_min_difference=1.5, eval_pairs=120))
    rows = whole(data.val_dataloader() if split == "validation" else data.test_dataloader())
    members = {member.text for member in HumanRatings().load(split)}
    assert len(rows["chosen"]) == 120
    assert set(rows["chosen"]) | set(rows["rejected"]) <= members
    for chosen, rejected in zip(rows["chosen"], rows["rejected"], strict=True):
        assert rated[chosen] - rated[rejected] >= 1.5 - 1e-9


@pytest.mark.usefixtures("rated")
def test_the_seed_changes_the_training_pairs_and_nothing_else():
    first, again, other = (ready(HumanRatingsPairs(seed=seed)).rows for seed in (1, 1, 2))
    assert first == again
    assert first["train"] != other["train"]
    assert first["validation"] == other["validation"]
    assert first["test"] == other["test"]


@pytest.mark.usefixtures("rated")
def test_the_number_of_pairs_can_be_chosen():
    assert len(ready(HumanRatingsPairs(pairs_per_epoch=7)).rows["train"]) == 7


@pytest.mark.usefixtures("rated")
def test_the_loader_shuffles_by_the_global_generator():
    data = ready(HumanRatingsPairs())
    orders = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        orders.append(whole(data.train_dataloader())["chosen"])
    assert orders[0] == orders[1] != orders[2]
    assert whole(data.val_dataloader())["chosen"] == [row["chosen"] for row in data.rows["validation"]]


def test_scores_train_on_the_means_and_are_evaluated_on_the_same_pairs(rated):
    scores = ready(HumanRatingsScores(batch_size=16, eval_pairs=50))
    rows = whole(scores.train_dataloader())
    assert dict(zip(rows["text"], rows["score"], strict=True)) == {
        member.text: pytest.approx(rated[member.text], abs=1e-6) for member in HumanRatings().load("train")
    }
    pairs = ready(HumanRatingsPairs(eval_pairs=50))
    assert scores.rows["validation"] == pairs.rows["validation"]
    assert scores.rows["test"] == pairs.rows["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_pairs": -1}, "eval_pairs=-1"),
        ({"pairs_per_epoch": 0}, "pairs_per_epoch=0"),
        ({"min_difference": -0.5}, "min_difference=-0.5"),
        ({"eval_min_difference": 0.0}, "eval_min_difference=0.0"),
        ({"domain": "books"}, "'books'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        HumanRatingsPairs(**arguments)


@pytest.mark.usefixtures("rated")
def test_a_difference_that_no_pair_has_is_named_with_the_counts():
    train = len(HumanRatings().load("train"))
    with pytest.raises(UserError, match=rf"min_difference=8\.5 leaves no pair of the {train} training snippets"):
        HumanRatingsPairs(min_difference=8.5).setup()
    held_out = len(HumanRatings().load("validation"))
    with pytest.raises(UserError, match=rf"eval_min_difference=8\.5 leaves no pair of the {held_out} validation"):
        HumanRatingsPairs(eval_min_difference=8.5).setup()


class Reader(pl.LightningModule):
    """Trains nothing of use; keeps what Lightning hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": 0, "validation": 0, "test": 0}

    def training_step(self, batch, _):
        self.seen["train"] += len(batch["chosen"])
        return (self.weight - batch["margin"]).square().mean()

    def validation_step(self, batch, _):
        self.seen["validation"] += len(batch["chosen"])

    def test_step(self, batch):
        self.seen["test"] += len(batch["chosen"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.usefixtures("rated")
def test_lightning_trains_validates_and_tests_on_the_pairs(tmp_path):
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    reader, data = Reader(), HumanRatingsPairs(pairs_per_epoch=100, eval_pairs=60)
    trainer.fit(reader, datamodule=data)
    trainer.test(reader, datamodule=data, verbose=False)
    assert reader.seen == {"train": 100, "validation": 60, "test": 60}


@pytest.mark.parametrize(
    ("first", "second", "share"), [((0, 0, 1), (0, 1, 2), 1 / 6), ((0, 0, 4), (0, 1, 1), 3 / 7), ((1,), (1, 1), 1 / 2)]
)
def test_agreement_is_the_share_of_draws_that_prefer_the_chosen_snippet(first, second, share):
    assert agreement(snippet("a", *first), snippet("b", *second)) == pytest.approx(share)


def test_all_raters_adds_their_agreement_to_the_same_training_pairs(rated):
    one = whole(ready(HumanRatingsPairs(seed=3)).train_dataloader())
    data = ready(HumanRatingsPairs(seed=3, all_raters=True))
    everyone = data.rows["train"]
    assert sorted(row["chosen"] for row in everyone) == sorted(one["chosen"])
    assert "agreement" not in one
    assert all(0 <= row["agreement"] <= 1 for row in everyone)
    sure = [row["agreement"] for row in everyone if abs(row["margin"]) > 2.5]
    assert sum(a > 0.5 for a in sure) > 0.95 * len(sure) > 0
    assert "agreement" not in data.rows["validation"][0]
