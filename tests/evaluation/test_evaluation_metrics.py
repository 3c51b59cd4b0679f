"""Metrics of completions against numbers made by hand, and put together from two processes."""

import math

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation import (
    DistinctN,
    EmptyRate,
    PairAccuracy,
    PassAtK,
    Perplexity,
    RefusalRate,
    SelfBLEU,
    WinRate,
    bootstrap,
)


def merged(metric, make, parts):
    """The metric of parts that processes of their own saw: their states put together as torchmetrics does it."""
    processes = [make() for _ in parts]
    for process, part in zip(processes, parts, strict=True):
        process.update(*part)
    for name, reduction in metric._reductions.items():
        states = [getattr(process, name) for process in processes]
        states = [torch.cat(state) if isinstance(state, list) else state for state in states]
        setattr(metric, name, torch.cat(states) if reduction.__name__ == "dim_zero_cat" else torch.stack(states).sum(0))
    metric._update_count = 1
    return metric.compute()


def measured(metric, *arguments):
    metric.update(*arguments)
    return metric.compute()


def test_distinct_n_is_the_share_of_different_n_grams():
    texts = ["a b a b", "a b c"]  # bigrams ab ba ab, ab bc: 3 of 5; words a b a b a b c: 3 of 7
    assert measured(DistinctN(2), texts) == pytest.approx(3 / 5)
    assert measured(DistinctN(1), texts) == pytest.approx(3 / 7)
    assert measured(DistinctN(3), texts) == pytest.approx(1.0)  # aba bab, abc
    assert math.isnan(measured(DistinctN(5), texts))
    assert merged(DistinctN(2), DistinctN, [(texts[:1],), (texts[1:],)]) == pytest.approx(3 / 5)


def test_self_bleu_is_one_where_all_texts_are_alike_and_low_where_none_share_a_word():
    assert measured(SelfBLEU(), ["one two three four five"] * 3) == pytest.approx(1.0)
    assert measured(SelfBLEU(), ["one two three four", "five six seven eight"]) == 0.0
    assert math.isnan(measured(SelfBLEU(), ["alone"]))
    halves = ["a b c d", "a b c d", "w x y z", "w x y z"]
    assert measured(SelfBLEU(), halves) == pytest.approx(1.0)
    assert merged(SelfBLEU(), SelfBLEU, [(halves[:2],), (halves[2:],)]) == pytest.approx(1.0)
    assert measured(SelfBLEU(at_most=2), [*halves[:2], *halves[2:]]) == 0.0  # of the four, the first and the third


def test_self_bleu_of_a_hand_made_pair():
    # "a b c" against "a b d": 2 of 3 words, 1 of 2 bigrams, of trigrams 0 of 1, smoothed to 1/2; equally long.
    assert measured(SelfBLEU(), ["a b c", "a b d"]) == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), rel=1e-6)


def test_texts_of_all_kinds_come_through():
    metric = SelfBLEU()
    metric.update(["", "naïve\n", "\ud800"])
    metric.update([])
    metric.update(["\u2028 日本"])
    assert metric.texts == ["", "naïve\n", "?", "\u2028 日本"]


def test_empty_and_refusing_completions_are_counted():
    texts = ["", " \n", "fine", "I'm sorry, but no", "I\u2019m sorry", "As an AI, I", "Sorry is a card game", "I can't"]
    assert measured(EmptyRate(), texts) == pytest.approx(2 / 8)
    assert measured(RefusalRate(), texts) == pytest.approx(4 / 8)
    assert measured(RefusalRate(["fin"]), texts) == pytest.approx(1 / 8)
    assert merged(EmptyRate(), EmptyRate, [(texts[:2],), (texts[2:],)]) == pytest.approx(2 / 8)
    assert math.isnan(measured(EmptyRate(), []))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(
    "make", [DistinctN, SelfBLEU, EmptyRate, RefusalRate, PassAtK, WinRate, PairAccuracy, Perplexity]
)
def test_nothing_has_no_mean(make):
    found = make().compute()
    if isinstance(found, tuple):
        found = found[0]
    assert all(map(math.isnan, found if isinstance(found, tuple) else [found]))


def test_pass_at_k_is_the_unbiased_estimate():
    correct = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    assert measured(PassAtK(1), correct) == pytest.approx((1 / 4 + 0 + 3 / 4) / 3)
    assert measured(PassAtK(2), correct) == pytest.approx((1 / 2 + 0 + 1) / 3)  # pairs with a right one: 3 of 6, 0, 6
    assert merged(PassAtK(2), lambda: PassAtK(2), [(correct[:1],), (correct[1:],)]) == pytest.approx(1 / 2)
    with pytest.raises(UserError, match="at least 5 completions of each prompt, got 4"):
        PassAtK(5).update(correct)


def test_a_win_rate_counts_ties_half():
    found = measured(WinRate(), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 3.0]),
                     torch.ones(4), torch.ones(4))  # fmt: skip
    assert found.plain.value == 0.625
    assert 0 <= found.plain.low < 0.625 < found.plain.high <= 1


def test_a_win_rate_without_intervals_is_the_same_number():
    scores, lengths = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 3.0]]), torch.tensor([[9, 3, 4, 5], [1] * 4])
    full, alone = (measured(WinRate(intervals=i), *scores, *lengths) for i in (True, False))
    for with_it, without in zip(full, alone, strict=True):
        assert without.value == with_it.value
        assert not math.isnan(with_it.low)
        assert math.isnan(without.low)
        assert math.isnan(without.high)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_rows():
    rows = torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
    found = bootstrap(rows)
    half = 1.959964 * float(rows.std()) / math.sqrt(len(rows))
    assert found.value == pytest.approx(float(rows.mean()))
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert bootstrap(rows) == found  # the same rows are drawn again
    assert all(map(math.isnan, bootstrap(torch.zeros(0))))


def test_length_alone_wins_half_of_the_time_at_equal_length():
    """A judge that likes length only: whoever is longer wins with probability sigmoid(3 tanh(d / s))."""
    generator = torch.Generator().manual_seed(0)
    longer = 20 + 40 * torch.randn(4000, generator=generator).double()
    chance = torch.sigmoid(3 * torch.tanh(longer / longer.std(correction=0)))
    wins = (torch.rand(4000, generator=generator) < chance).double()
    found = measured(WinRate(), wins, 1 - wins, 100 + longer, torch.full((4000,), 100.0))
    assert found.plain.value > 0.6
    assert found.length_controlled.value == pytest.approx(0.5, abs=0.03)
    assert found.length_controlled.low < 0.5 < found.length_controlled.high


def test_without_a_difference_in_length_the_controlled_rate_is_the_plain_one():
    wins = (torch.arange(200) % 4 > 0).float()
    found = measured(WinRate(), wins, 1 - wins, torch.ones(200), torch.ones(200))
    assert found.length_controlled.value == pytest.approx(0.75, abs=0.01)
    always = measured(WinRate(), torch.ones(50), torch.zeros(50), torch.ones(50), torch.ones(50))
    assert always.plain == (1.0, 1.0, 1.0)
    assert always.length_controlled.value > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.ones(3), torch.ones(2), torch.ones(2)), "all of the same B"),
        ((torch.tensor([1.0, math.nan]), torch.ones(2), torch.ones(2), torch.ones(2)), "finite"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        WinRate().update(*arguments)


def test_accuracy_and_calibration_of_pairs():
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    found = measured(PairAccuracy(), chosen, rejected)
    assert found.accuracy.value == 0.625  # right, wrong, a tie, right
    assert found.loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in (2, -1, 0, 1)) / 4)


def test_bins_of_confidence_add_up_to_the_calibration_error():
    generator = torch.Generator().manual_seed(0)
    margins = torch.cat([2 * torch.randn(500, generator=generator), torch.tensor([0.0])])
    found = measured(PairAccuracy(), margins, torch.zeros(501))
    assert [round(part["low"], 1) for part in found.bins] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert sum(part["count"] for part in found.bins) == 501
    off = sum(part["count"] * abs(part["confidence"] - part["accuracy"]) for part in found.bins) / 501
    assert off == pytest.approx(found.calibration_error, abs=1e-5)  # torchmetrics', over both orders
    for part in found.bins:
        assert part["low"] <= part["confidence"] <= part["high"]
    (one, *others) = measured(PairAccuracy(), torch.tensor([0.1]), torch.zeros(1)).bins
    assert one == {"low": 0.5, "high": 0.6, "count": 1, "accuracy": 1, "confidence": pytest.approx(0.525, abs=1e-3)}
    assert all(set(part) == {"low", "high", "count"} for part in others)


def test_a_reward_model_that_says_how_sure_it_is_has_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    margins = 4 * torch.rand(40_000, generator=generator).double()
    honest = torch.where(torch.rand(40_000, generator=generator) < torch.sigmoid(margins), margins, -margins)
    assert measured(PairAccuracy(), honest, torch.zeros_like(honest)).calibration_error < 0.01
    # Always as sure as sigmoid(4) = 0.982, and right in 3 of 4.
    sure = torch.where(torch.arange(400) % 4 > 0, 4.0, -4.0)
    found = measured(PairAccuracy(), sure, torch.zeros(400))
    assert found.calibration_error == pytest.approx(float(torch.sigmoid(torch.tensor(4.0))) - 0.75, abs=1e-4)


def test_the_interval_of_pairs_that_share_texts_holds_the_accuracy_of_other_texts():
    """Of 400 draws of texts about 95 in 100; taken for independent pairs, 86."""
    found = []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        worth = 1.3 * torch.randn(500, generator=generator)
        scores = worth + 0.75 * torch.randn(500, generator=generator)
        texts = torch.randint(500, (20_000, 2), generator=generator)
        texts = texts[worth[texts[:, 0]] - worth[texts[:, 1]] >= 1][:1000]
        metric = PairAccuracy()
        metric.update(scores[texts[:, 0]], scores[texts[:, 1]], texts)
        found.append(metric.compute().accuracy)
    truth = sum(interval.value for interval in found) / len(found)
    assert 0.92 < sum(low < truth < high for _, low, high in found) / len(found) < 0.975
