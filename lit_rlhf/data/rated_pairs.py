"""Preference pairs drawn from the human ratings, for reward models and direct preference methods."""

import itertools
import random
from bisect import bisect_left, bisect_right

from lit_rlhf.data.base import RatingsData, Row, require_positive
from lit_rlhf.data.human_ratings import RatedSnippet
from lit_rlhf.errors import UserError

Pair = tuple[RatedSnippet, RatedSnippet]


class HumanRatingsPairs(RatingsData):
    """Pairs of snippets, of which people preferred the first.

    Batches: `chosen` and `rejected`, lists of str, and `margin`, the tensor (B,) of mean(chosen) - mean(rejected).

    Training pairs are noisy, as a single person's choice is. Draw two different snippets i and j, one rater's score
    x of i and one rater's score y of j, each uniformly; the higher score is chosen, and a tie is drawn again:

        P(i chosen) = P(x > y | x != y),     x ~ uniform(ratings of i),  y ~ uniform(ratings of j)

    This is Thurstone's law of comparative judgement (1927) with each snippet's own empirical distribution of
    scores in place of a normal one. Bradley-Terry (1952), P = sigmoid(r_i - r_j), is its logistic approximation, so a
    reward model fitted to these pairs by the Bradley-Terry loss learns a calibrated scale. The margin of a training
    pair can be negative: then this rater disagreed with the average.

    With `all_raters` training batches also hold `agreement`, the tensor (B,) of that probability for the chosen
    snippet: a loss that weighs both outcomes by it is the expected loss over the raters' draws, without their noise.

    An epoch takes the snippets in shuffled order, two by two, and starts again until it has its pairs: each snippet
    is in as many pairs as any other, give or take one (with `min_difference` > 0 only about so, because snippets in
    the middle of the scale have fewer partners). The pairs are a function of `seed`; every epoch has the same ones.

    Validation and test pairs are clean and the same whatever the seed: from their own split, each pair at most once,
    labelled by the means, which differ by at least `eval_min_difference`. So `margin` is positive there.

    Args:
        domain: movies, tweets, amazon or nyt.
        batch_size: pairs in a batch.
        pairs_per_epoch: training pairs; by default as many as training snippets, so that each is in two pairs.
        min_difference: smallest difference of the two means in a training pair.
        eval_min_difference: the same for validation and test pairs; more than 0.
        eval_pairs: pairs each for validation and test; fewer if there are no more.
        all_raters: training batches say what share of the raters agrees.
        seed: of the training pairs.

    Raises:
        UserError: a bad argument; at `setup`, no two snippets differ enough.
    """

    def __init__(
        self,
        *,
        domain: str = "movies",
        batch_size: int = 32,
        pairs_per_epoch: int | None = None,
        min_difference: float = 0.0,
        eval_min_difference: float = 1.0,
        eval_pairs: int = 2000,
        all_raters: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(domain, batch_size)
        if pairs_per_epoch is not None:
            require_positive(pairs_per_epoch=pairs_per_epoch)
        if min_difference < 0:
            raise UserError(f"min_difference={min_difference}: must be at least 0")
        _check_eval(eval_min_difference, eval_pairs)
        self.pairs_per_epoch = pairs_per_epoch
        self.min_difference = min_difference
        self.eval_min_difference = eval_min_difference
        self.eval_pairs = eval_pairs
        self.all_raters = all_raters
        self.seed = seed

    def make_rows(self) -> dict[str, list[Row]]:
        snippets = self.ratings.load("train")
        count = self.pairs_per_epoch or len(snippets)
        pairs = rater_pairs(snippets, count, self.min_difference, random.Random(f"pairs {self.seed}"))
        evaluation = _evaluation_rows(self, self.eval_min_difference, self.eval_pairs)
        rows = [_pair_row(pair) for pair in pairs]
        if self.all_raters:
            rows = [{**row, "agreement": agreement(*pair)} for row, pair in zip(rows, pairs, strict=True)]
        return {"train": rows, **evaluation}


class HumanRatingsScores(RatingsData):
    """Snippets with their mean rating, for a reward model fitted by regression.

    Training batches: `text`, a list of str, and `score`, the tensor (B,) of means in [-4, 4]. Validation and test
    batches are the pairs of `HumanRatingsPairs`, so that the two kinds of reward model are compared on the same.

    Args:
        domain: movies, tweets, amazon or nyt.
        batch_size: texts, or pairs, in a batch.
        eval_min_difference: smallest difference of the two means in a validation or test pair; more than 0.
        eval_pairs: pairs each for validation and test; fewer if there are no more.

    Raises:
        UserError: a bad argument; at `setup`, no two snippets differ enough.
    """

    def __init__(
        self,
        *,
        domain: str = "movies",
        batch_size: int = 32,
        eval_min_difference: float = 1.0,
        eval_pairs: int = 2000,
    ) -> None:
        super().__init__(domain, batch_size)
        _check_eval(eval_min_difference, eval_pairs)
        self.eval_min_difference = eval_min_difference
        self.eval_pairs = eval_pairs

    def make_rows(self) -> dict[str, list[Row]]:
        train = [{"text": snippet.text, "score": snippet.mean} for snippet in self.ratings.load("train")]
        return {"train": train, **_evaluation_rows(self, self.eval_min_difference, self.eval_pairs)}


def rater_pairs(snippets: list[RatedSnippet], count: int, min_difference: float, rng: random.Random) -> list[Pair]:
    """`count` training pairs (chosen, rejected), drawn as `HumanRatingsPairs` says.

    Raises:
        UserError: no two snippets can make a pair.
    """
    by_mean = sorted(snippets, key=_mean)
    pairs: list[Pair] = []
    while len(pairs) < count:
        before = len(pairs)
        for couple in _couples(snippets, by_mean, min_difference, rng):
            if (pair := _ask_raters(*couple, rng)) is not None:
                pairs.append(pair)
        if len(pairs) == before:
            spread = by_mean[-1].mean - by_mean[0].mean if by_mean else 0.0
            raise UserError(
                f"min_difference={min_difference} leaves no pair of the {len(snippets)} training snippets, "
                f"whose means differ by at most {spread:.2f}"
            )
    return pairs[:count]


def agreement(chosen: RatedSnippet, rejected: RatedSnippet) -> float:
    """P(x > y | x != y) for a rater's score x of `chosen` and y of `rejected`, each uniform; 1/2 if all are equal.

    >>> sure, split = RatedSnippet("1", "", 2.0, (2, 2)), RatedSnippet("2", "", 1.5, (3, 1, 0, 2))
    >>> agreement(sure, split)
    0.6666666666666666
    """
    scores = sorted(rejected.ratings)
    below = sum(bisect_left(scores, x) for x in chosen.ratings)
    above = sum(len(scores) - bisect_right(scores, x) for x in chosen.ratings)
    return below / (below + above) if below + above else 0.5


def mean_pairs(snippets: list[RatedSnippet], count: int, min_difference: float, rng: random.Random) -> list[Pair]:
    """`count` different pairs (higher mean, lower mean), uniform over all that differ by `min_difference` > 0.

    Fewer where there are no more.
    """
    by_mean = sorted(snippets, key=_mean)
    # Snippet i is higher than the first lower[i] of the list by enough. Numbering these pairs lets a sample of
    # numbers be a sample of pairs, without listing the pairs.
    lower = [bisect_right(by_mean, snippet.mean - min_difference, key=_mean) for snippet in by_mean]
    ends = list(itertools.accumulate(lower, initial=0))
    numbers = rng.sample(range(ends[-1]), min(count, ends[-1]))
    higher = [bisect_right(ends, number) - 1 for number in numbers]
    return [(by_mean[i], by_mean[number - ends[i]]) for i, number in zip(higher, numbers, strict=True)]


def _couples(
    snippets: list[RatedSnippet], by_mean: list[RatedSnippet], min_difference: float, rng: random.Random
) -> list[Pair]:
    """One pass over the snippets, two by two; those too close to each other each find another partner."""
    order = rng.sample(snippets, len(snippets))
    couples = []
    for first, second in zip(order[::2], order[1::2], strict=False):
        if abs(first.mean - second.mean) >= min_difference:
            couples.append((first, second))
            continue
        for snippet in (first, second):
            below = bisect_right(by_mean, snippet.mean - min_difference, key=_mean)
            above = bisect_left(by_mean, snippet.mean + min_difference, key=_mean)
            partners = below + len(by_mean) - above
            if partners:
                k = rng.randrange(partners)
                couples.append((snippet, by_mean[k if k < below else above + k - below]))
    return couples


def _ask_raters(first: RatedSnippet, second: RatedSnippet, rng: random.Random) -> Pair | None:
    """Which of the two one rater of each prefers; None if all of them gave the same score."""
    if len({*first.ratings, *second.ratings}) == 1:
        return None
    while (x := rng.choice(first.ratings)) == (y := rng.choice(second.ratings)):
        pass
    return (first, second) if x > y else (second, first)


def _evaluation_rows(data: RatingsData, min_difference: float, count: int) -> dict[str, list[Row]]:
    rows = {}
    for split in ("validation", "test"):
        snippets = data.ratings.load(split)
        pairs = mean_pairs(snippets, count, min_difference, random.Random(split))
        if not pairs:
            raise UserError(
                f"eval_min_difference={min_difference} leaves no pair of the {len(snippets)} {split} snippets "
                f"of {data.ratings.domain}"
            )
        rows[split] = [_pair_row(pair) for pair in pairs]
    return rows


def _pair_row(pair: Pair) -> Row:
    chosen, rejected = pair
    return {"chosen": chosen.text, "rejected": rejected.text, "margin": chosen.mean - rejected.mean}


def _mean(snippet: RatedSnippet) -> float:
    return snippet.mean


def _check_eval(min_difference: float, pairs: int) -> None:
    require_positive(eval_pairs=pairs)
    if min_difference <= 0:
        raise UserError(f"eval_min_difference={min_difference}: must exceed 0, or there is nothing to tell apart")
