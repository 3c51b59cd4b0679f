"""How different completions are from one another: what collapses when a policy finds one text that pays."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from sacrebleu.metrics import BLEU
from torch import Tensor

from lit_rlhf.checks import check_int
from lit_rlhf.evaluation.statistics import KeepingMetric, TextMetric
from lit_rlhf.ngrams import ngrams


class DistinctN(KeepingMetric):
    """Distinct n-grams of words as a share of all, over all texts (Li et al. 2016, arXiv:1510.03055).

    1 where no n-gram occurs twice. It falls with the number of texts, so only equally many are to be compared.

    Args:
        n: words of an n-gram; words are what white space separates.
        **settings: of ``torchmetrics.Metric``.

    Raises:
        UserError: ``n`` below 1.

    >>> metric = DistinctN(1)
    >>> metric.update(["good good film", "good film"])  # two words of five
    >>> round(float(metric.compute()), 3)
    0.4
    """

    higher_is_better = True
    total: Tensor

    def __init__(self, n: int = 2, **settings: Any) -> None:
        super().__init__(**settings)
        self.n = check_int("n", n, at_least=1)
        self.add_rows("hashes", torch.long)
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str]) -> None:
        grams = [gram for text in texts for gram in ngrams(text.split(), self.n)]
        self.total += len(grams)
        self.keep("hashes", torch.tensor(sorted(map(_hash, set(grams)))))

    def compute(self) -> Tensor:
        """A share, NaN without any n-gram."""
        if not self.total:
            return torch.tensor(float("nan"))
        return len(self.kept("hashes").unique()) / self.total


class SelfBLEU(TextMetric):
    """The mean BLEU of every text with all others as its references (Zhu et al. 2018, arXiv:1802.01886), in [0, 1].

    1 where every text occurs twice. BLEU is sacrebleu's of sentences: up to 4-grams, those orders that a text is too
    short for left out, exponential smoothing.

    Args:
        at_most: texts that are compared, evenly spaced among all: the time grows with their square.
        **settings: of ``torchmetrics.Metric``.

    Raises:
        UserError: ``at_most`` below 2.

    >>> metric = SelfBLEU()
    >>> metric.update(["a fine film", "a fine film"])
    >>> round(float(metric.compute()), 3)
    1.0
    """

    higher_is_better = False

    def __init__(self, at_most: int = 200, **settings: Any) -> None:
        super().__init__(**settings)
        self.at_most = check_int("at_most", at_most, at_least=2)

    def compute(self) -> Tensor:
        """A mean, NaN of fewer than two texts."""
        texts = self.texts
        if len(texts) < 2:
            return torch.tensor(float("nan"))
        count = min(self.at_most, len(texts))
        texts = [texts[number * len(texts) // count] for number in range(count)]
        bleu = BLEU(effective_order=True)
        scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
        return torch.tensor(scores, dtype=torch.double).mean() / 100


def _hash(gram: str) -> int:
    # Python's own differs from process to process.
    encoded = gram.encode("utf-8", errors="replace")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big", signed=True)
