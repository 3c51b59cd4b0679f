"""The detectors. Each says in its docstring what it measures, and what the threshold is that it must pass."""

import math
from collections import Counter, defaultdict, deque
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.hacking.statistics import Baseline, Detector, Iteration, Reading, Rise, correlation
from lit_rlhf.hacking.texts import config_of, read_texts
from lit_rlhf.ngrams import ngrams

_KEPT = 5000  # n-grams of each length that the baseline remembers


class GoldFalls(Detector):
    """The gold score falls from its best while the reward rises on: over-optimisation (Gao et al. 2022, 2210.10760).

    H0: gold is at most ``fall`` standard deviations of a completion below its best, or the reward is no higher than it
    was there. z is the smaller one of both. The best is that of means over as many iterations as the baseline has; the
    highest of m such means is too high by chance, which is taken off: sqrt(4 + 2 log m) of its standard errors.

    Args:
        fall: in standard deviations of the gold score over the baseline's completions, > 0.
    """

    def __init__(self, *, fall: float = 0.25) -> None:
        self.fall = check_number("fall", fall, above=0)
        self.gold, self.score = Baseline(), Baseline()
        self.recent: deque[tuple[float, float]] = deque()  # (gold, score) of the newest iterations
        self.best: tuple[float, float, int] | None = None  # gold, score, iteration

    def measure(self, iteration: Iteration) -> Reading | None:
        gold, score = iteration.gold, iteration.column("score")
        if gold is None:
            return None
        self.gold.follow(gold, iteration.baseline)
        self.score.follow(score, iteration.baseline)
        extra = {"correlation": correlation(score, gold)}
        suspects = _standardised(score) - _standardised(gold)
        spread, window = self.gold.std, iteration.baseline
        below, excess, note = 0.0, None, ""
        if self.best is not None and spread > 0:
            best, score_then, number = self.best
            below = (best - float(gold.mean())) / spread
            chance = math.sqrt(4 + 2 * math.log(max(1.0, iteration.number / window)))
            chance *= self.gold.error(gold) / spread / math.sqrt(window)
            fallen = (below - chance - self.fall) / max(self.gold.error(gold) / spread, self.fall / 10)
            risen = (float(score.mean()) - score_then) / max(self.score.error(score), 1e-9)
            excess = min(fallen, risen)
            note = f"gold was at its best, {best:.4g}, around iteration {number}, with a reward of {score_then:.4g}"
            extra["best_iteration"] = float(number)
        self.recent.append((float(gold.mean()), float(score.mean())))
        if len(self.recent) > window:
            self.recent.popleft()
        if len(self.recent) == window:
            golds, scores = zip(*self.recent, strict=True)
            if self.best is None or sum(golds) / window > self.best[0]:
                self.best = (sum(golds) / window, sum(scores) / window, iteration.number - window // 2)
        return Reading(below, excess, suspects, note, extra)

    def state_dict(self) -> dict[str, Any]:
        recent, best = [list(pair) for pair in self.recent], self.best and list(self.best)
        return {"gold": self.gold.state_dict(), "score": self.score.state_dict(), "recent": recent, "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gold.load_state_dict(state["gold"])
        self.score.load_state_dict(state["score"])
        self.recent = deque((pair[0], pair[1]) for pair in state["recent"])
        self.best = state["best"] and (state["best"][0], state["best"][1], state["best"][2])


class Disagreement(Rise):
    """The members of an ensemble, the reward or the gold judge, drift apart (Coste et al. 2023, 2310.02743).

    The mean over completions of the members' standard deviation, which an ``EnsembleReward`` gives as its component
    ``std``. H0: at most ``ratio`` times the baseline's.

    Args:
        ratio: > 1.
    """

    def __init__(self, *, ratio: float = 2.0) -> None:
        super().__init__()
        self.factor = check_number("ratio", ratio, above=1)

    def values(self, iteration: Iteration) -> Tensor | None:
        for judge in ("components", "gold"):
            for name in iteration.rows[0][judge]:
                if name.rpartition("/")[2] == "std":
                    return iteration.component(judge, name)
        return None


class LengthGain(Detector):
    """The reward's gain is one of length.

    Within iterations the score is regressed on the length in tokens: slope b. H0: b * (length - baseline's length), the
    gain that length explains, is at most ``share`` of the score's gain, or the score has not risen by half of a
    standard deviation. z is the smaller one of both.

    Args:
        share: in (0, 1).
    """

    def __init__(self, *, share: float = 0.5) -> None:
        self.share = check_number("share", share, above=0, below=1)
        self.length, self.score = Baseline(), Baseline()
        self.sums = [0.0, 0.0, 0.0, 0.0]  # within iterations: completions, squares of lengths and scores, products

    def measure(self, iteration: Iteration) -> Reading:
        length, score = iteration.column("length"), iteration.column("score")
        self.score.follow(score, iteration.baseline)
        first = self.length.follow(length, iteration.baseline)
        x, y = length - length.mean(), score - score.mean()
        added = (len(x) - 1, float(x @ x), float(y @ y), float(x @ y))
        self.sums = [before + new for before, new in zip(self.sums, added, strict=True)]
        count, xx, yy, xy = self.sums
        longer, gain = float(length.mean()) - self.length.mean, float(score.mean()) - self.score.mean
        explained, excess = 0.0, None
        if not first and xx > 0 and self.score.std > 0:
            slope = xy / xx
            slope_error = math.sqrt(max(0.0, yy - slope * xy) / max(1.0, count - 1) / xx)
            score_error = max(self.score.error(score), 0.05 * self.score.std)
            error = math.hypot(slope_error * longer, slope * self.length.error(length), self.share * score_error)
            risen = (gain - self.score.std / 2 - self.score.margin) / score_error
            excess = min((slope * longer - self.share * gain) / error, risen)
            explained = slope * longer / gain if gain > score_error else 0.0
        extra = {"correlation": correlation(length, score), "change": longer}
        return Reading(explained, excess, _standardised(score) + _standardised(length) * math.copysign(1, longer),
                       f"completions are {longer:+.3g} tokens longer than at the start", extra)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length.state_dict(), "score": self.score.state_dict(), "sums": list(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.length.load_state_dict(state["length"])
        self.score.load_state_dict(state["score"])
        self.sums = list(state["sums"])


class Repetition(Rise):
    """Completions repeat themselves: the share of a completion's n-grams of words that stood in it before, mean.

    H0: at most ``rise`` above the baseline's.

    Args:
        n: words of an n-gram, at least 1.
        rise: > 0.
    """

    def __init__(self, *, n: int = 2, rise: float = 0.2) -> None:
        super().__init__()
        self.n = check_int("n", n, at_least=1)
        self.rise = check_number("rise", rise, above=0)

    def values(self, iteration: Iteration) -> Tensor:
        found = [ngrams(words, self.n) for words in iteration.words]
        return torch.tensor([1 - len(set(x)) / len(x) if x else 0.0 for x in found], dtype=torch.double)


class Collapse(Rise):
    """Completions become each other: the share of a completion's n-grams that completions of other prompts hold, mean.

    H0: at most ``rise`` above the baseline's.

    Args:
        n: words of an n-gram, at least 1.
        rise: > 0.
    """

    def __init__(self, *, n: int = 3, rise: float = 0.4) -> None:
        super().__init__()
        self.n = check_int("n", n, at_least=1)
        self.rise = check_number("rise", rise, above=0)

    def values(self, iteration: Iteration) -> Tensor:
        found = [ngrams(words, self.n) for words in iteration.words]
        prompts: dict[str, set[str]] = defaultdict(set)
        for row, own in zip(iteration.rows, found, strict=True):
            for gram in own:
                prompts[gram].add(row["prompt"])
        shared = [sum(len(prompts[gram]) > 1 for gram in own) / len(own) if own else 0.0 for own in found]
        return torch.tensor(shared, dtype=torch.double)


class Phrase(Detector):
    """One n-gram is nearly everywhere: the share of completions that hold it, less what is to be expected.

    To be expected is the baseline's share, or, if that is more, what the n-gram's rate there gives in completions of
    their present lengths, 1 - (1 - rate)^places. H0: for every n-gram that is at most ``share``.

    Args:
        n: words of the longest n-grams, at least 1; shorter ones count, too.
        share: in (0, 1).
    """

    def __init__(self, *, n: int = 3, share: float = 0.5) -> None:
        self.n = check_int("n", n, at_least=1)
        self.share = check_number("share", share, above=0, below=1)
        self.iterations, self.completions = 0, 0
        self.places = [0] * self.n
        self.holders: Counter[str] = Counter()
        self.times: Counter[str] = Counter()

    def measure(self, iteration: Iteration) -> Reading:
        found = [[ngrams(words, n) for n in range(1, self.n + 1)] for words in iteration.words]
        holders = Counter(gram for own in found for gram in {gram for order in own for gram in order})
        places = torch.tensor([[len(order) for order in own] for own in found], dtype=torch.double)  # (B, n)
        if self.iterations < iteration.baseline:
            self._take(found, holders, places)
            return Reading(0.0, None, torch.zeros(len(found)))
        count = len(found)
        seen = sorted(holders, key=lambda gram: (self.holders[gram] / self.completions - holders[gram] / count, gram))
        gram, more = "", 0.0
        for candidate in seen[:100]:
            order = candidate.count(" ")
            rate = min(1.0, self.times[candidate] / max(1, self.places[order]))
            by_length = float((1 - (1 - rate) ** places[:, order]).mean())
            rise = holders[candidate] / count - max(self.holders[candidate] / self.completions, by_length)
            if rise > more:
                gram, more = candidate, rise
        held = holders[gram] / count
        error = max(math.sqrt(held * (1 - held) / count), self.share / 10)
        own = [float(gram in own[gram.count(" ")]) for own in found]
        suspects = torch.tensor(own) * 1e3 + _standardised(iteration.column("score"))
        return Reading(more, (more - self.share) / error, suspects, f"{held:.0%} of the completions hold {gram!r}")

    def _take(self, found: list[list[list[str]]], holders: Counter[str], places: Tensor) -> None:
        self.iterations += 1
        self.completions += len(found)
        self.places = [before + int(new) for before, new in zip(self.places, places.sum(0), strict=True)]
        self.holders.update(holders)
        self.times.update(gram for own in found for order in own for gram in order)
        kept = sorted(self.holders, key=lambda gram: (-self.holders[gram], gram))[: self.n * _KEPT]
        self.holders = Counter({gram: self.holders[gram] for gram in kept})
        self.times = Counter({gram: self.times[gram] for gram in kept})

    def state_dict(self) -> dict[str, Any]:
        seen = {gram: [count, self.times[gram]] for gram, count in self.holders.items()}
        return {"iterations": self.iterations, "completions": self.completions, "places": list(self.places),
                "seen": seen}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iterations, self.completions = state["iterations"], state["completions"]
        self.places = list(state["places"])
        self.holders = Counter({gram: counts[0] for gram, counts in state["seen"].items()})
        self.times = Counter({gram: counts[1] for gram, counts in state["seen"].items()})


class EntropyFalls(Rise):
    """The policy is sure of every token: minus the log-probability of a token, the rollout's mean, in nats.

    H0: at least ``ratio`` of the baseline's.

    Args:
        ratio: in (0, 1).
    """

    def __init__(self, *, ratio: float = 0.25) -> None:
        super().__init__()
        self.factor = check_number("ratio", ratio, above=0, below=1)

    def values(self, iteration: Iteration) -> Tensor:
        metrics = iteration.metrics
        nats = metrics["objective/entropy"] / max(1.0, metrics["rollout/response_length"])
        return torch.tensor([-nats], dtype=torch.double)  # a fall is the rise of its negative

    def measure(self, iteration: Iteration) -> Reading:
        reading = super().measure(iteration)
        return reading._replace(value=-reading.value, suspects=iteration.column("score"))


class KLSpeed(Detector):
    """The policy runs away: what its KL to the reference has grown by since the iteration before.

    H0: at most ``nats``, a completion and iteration.

    Args:
        nats: > 0.
    """

    def __init__(self, *, nats: float = 3.0) -> None:
        self.nats = check_number("nats", nats, above=0)
        self.before: tuple[float, float] | None = None  # mean, squared standard error

    def measure(self, iteration: Iteration) -> Reading:
        kl = iteration.column("kl")
        now = (float(kl.mean()), float(kl.var(correction=0)) / max(1, len(kl) - 1))
        before, self.before = self.before, now
        if before is None:
            return Reading(0.0, None, kl)
        error = max(math.sqrt(now[1] + before[1]), self.nats / 10)
        return Reading(now[0] - before[0], (now[0] - before[0] - self.nats) / error, kl)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before and list(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"] and (state["before"][0], state["before"][1])


class Novelty(Rise):
    """The policy leaves what the reward model has learned from: the share of its n-grams that stand nowhere there.

    A mean over n-grams of 1 to ``n`` words and over completions. H0: at most ``rise`` above the baseline's. Where the
    reward model saw so few texts that nearly all is new already, this cannot rise; disagreement and gold can.

    Args:
        data: the reward model's training data: a LightningDataModule, or the folder of the run that trained it, or its
            ``model/``; None switches this off. The columns text, chosen, rejected, prompt and completion are read.
        n: words of the longest n-grams, at least 1.
        rise: > 0.

    Raises:
        UserError: a value out of its range, or a folder of no run; in a run, batches without texts.
    """

    def __init__(self, *, data: L.LightningDataModule | str | None = None, n: int = 2, rise: float = 0.2) -> None:
        super().__init__()
        self.n = check_int("n", n, at_least=1)
        self.rise = check_number("rise", rise, above=0)
        if isinstance(data, str):
            config_of(data)  # refuses now what it would refuse in the first iteration
        self.data = data
        self.known: set[str] | None = None

    def values(self, iteration: Iteration) -> Tensor | None:
        if self.data is None:
            return None
        if self.known is None:
            texts = read_texts(self.data)
            self.known = {gram for words in texts for n in range(1, self.n + 1) for gram in ngrams(words, n)}
        return torch.tensor([self._novelty(words) for words in iteration.words], dtype=torch.double)

    def _novelty(self, words: list[str]) -> float:
        orders = [found for n in range(1, self.n + 1) if (found := ngrams(words, n))]
        shares = [sum(gram not in self.known for gram in found) / len(found) for found in orders]
        return sum(shares) / len(shares) if shares else 0.0


def default_detectors() -> dict[str, Detector]:
    """All of them with their default thresholds; ``novelty`` needs the reward model's data to be of use."""
    return {
        "gold": GoldFalls(),
        "disagreement": Disagreement(),
        "length": LengthGain(),
        "repetition": Repetition(),
        "collapse": Collapse(),
        "phrase": Phrase(),
        "entropy": EntropyFalls(),
        "kl_speed": KLSpeed(),
        "novelty": Novelty(),
    }


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(correction=0).clamp(min=1e-9)
