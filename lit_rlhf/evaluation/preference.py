"""Who is preferred: one policy to another, and the chosen text of a pair to the rejected one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.statistics import RESAMPLES, Interval, KeepingMetric, bootstrap

_EXACT = 1e-9  # of the regression's coefficients
_RIDGE = 1e-2  # of the regression's coefficients: without it they grow for ever where one side always wins


class WinRates(NamedTuple):
    """Shares of prompts on which a policy is preferred, a tie counting half; with 95 % intervals over prompts.

    Attributes:
        plain: as they came.
        length_controlled: what it would be if both answered at the same length.
    """

    plain: Interval
    length_controlled: Interval


class WinRate(KeepingMetric):
    """How often one policy's completion scores higher than another's of the same prompt.

    The length-controlled rate (Dubois et al. 2024, arXiv:2404.04475) is sigmoid(a) of the logistic regression
    P(win) = sigmoid(a + b tanh(d / s)), d the difference in length and s its standard deviation: what is left of the
    preference at d = 0. Intervals are bootstrapped over prompts, unless ``intervals`` is false: then their
    ends are not a number.

    >>> metric = WinRate()
    >>> metric.update(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([9, 9]), torch.tensor([9, 9]))
    >>> metric.compute().plain.value
    0.75
    """

    higher_is_better = True

    def __init__(self, *, intervals: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.resamples = (RESAMPLES, 500) if intervals else (0, 0)
        self.add_rows("wins", torch.double)
        self.add_rows("longer", torch.double)
        self.add_rows("prompts", torch.long)

    def update(
        self,
        scores: Tensor,
        other_scores: Tensor,
        lengths: Tensor,
        other_lengths: Tensor,
        prompts: Tensor | None = None,
    ) -> None:
        """Scores (B,) and lengths (B,) of the policy's completions, and of the other's of the same prompts.

        ``prompts`` (B,) are the prompts' numbers, at least 0 and the same in all processes, where there are several
        completions of each; without them every row counts as a prompt of its own.

        Raises:
            UserError: the shapes differ, or a score is not finite.
        """
        prompts = torch.full_like(lengths, -1) if prompts is None else prompts
        shapes = {tuple(x.shape) for x in (scores, other_scores, lengths, other_lengths, prompts)}
        if len(shapes) != 1 or scores.ndim != 1:
            raise UserError(f"a win rate is of scores and lengths (B,), all of the same B, got {sorted(shapes)}")
        if not (scores.isfinite().all() and other_scores.isfinite().all()):
            raise UserError("a win rate is of finite scores")
        self.keep("wins", ((scores > other_scores).double() + (scores >= other_scores).double()) / 2)
        self.keep("longer", lengths - other_lengths)
        self.keep("prompts", prompts)

    def compute(self) -> WinRates:
        rows = torch.stack([self.kept("wins"), self.kept("longer")], dim=1)
        prompts = self.kept("prompts")
        groups = torch.where(prompts < 0, -1 - torch.arange(len(prompts)), prompts)
        plain, controlled = self.resamples
        return WinRates(
            bootstrap(rows[:, 0], groups=groups, resamples=plain),
            bootstrap(rows, _length_controlled, groups=groups, resamples=controlled),
        )


def _length_controlled(rows: Tensor, weights: Tensor) -> Tensor:
    """sigmoid(a), by Newton's method on the regression of wins on lengths, the columns of ``rows`` (N, 2)."""
    wins, longer = rows.unbind(1)
    total = weights.sum(1, keepdim=True)
    mean = weights @ longer[:, None] / total
    spread = ((weights * (longer - mean).square()).sum(1, keepdim=True) / total).sqrt()
    inputs = torch.tanh(longer / torch.where(spread > 0, spread, torch.inf))  # (R, N); without a spread b does nothing
    inputs = torch.stack([torch.ones_like(inputs), inputs], dim=1)  # (R, 2, N)
    found = torch.zeros(len(weights), 2, dtype=rows.dtype)
    ridge = _RIDGE * torch.eye(2, dtype=rows.dtype)
    for _ in range(30):
        shares = torch.sigmoid((found[:, :, None] * inputs).sum(1))
        slope = (inputs * (weights * (shares - wins))[:, None]).sum(2) + _RIDGE * found
        curve = (inputs * (weights * shares * (1 - shares))[:, None]) @ inputs.mT + ridge
        step = torch.linalg.solve(curve, slope)
        if step.abs().max() < _EXACT:
            break
        found = found - step * (2 / step.abs().amax(1, keepdim=True).clamp(min=2))  # a longer one can overshoot
    return torch.sigmoid(found[:, 0])


class PairScores(NamedTuple):
    """What a reward model says about pairs.

    Attributes:
        accuracy: share of pairs whose chosen text scores higher, a tie counting half; its 95 % interval is over pairs
            or, where their texts are known, over texts.
        calibration_error: mean |confidence - accuracy| over ten bins of confidence, in [0, 1].
        loss: mean -log sigmoid(chosen - rejected), nats.
        bins: five of confidence in the text that scores higher, from 0.5 to 1: ``low``, ``high``, how many pairs
            (``count``) and, where there are any, their mean ``confidence`` and ``accuracy``. As both orders mirror each
            other, the calibration error is their mean |confidence - accuracy|, weighted by their counts.
    """

    accuracy: Interval
    calibration_error: float
    loss: float
    bins: list[dict[str, float]]


class PairAccuracy(KeepingMetric):
    """Accuracy and calibration of scores on pairs, of which a Bradley-Terry model says P(chosen) = sigmoid(margin).

    The expected calibration error (Guo et al. 2017, arXiv:1706.04599) is torchmetrics', of pairs in both orders: which
    text stands first says nothing.

    >>> metric = PairAccuracy()
    >>> metric.update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))  # the first pair is right
    >>> metric.compute().accuracy.value
    0.5
    """

    higher_is_better = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_rows("margins", torch.double)
        self.add_rows("texts", torch.long, 2)

    def update(self, chosen: Tensor, rejected: Tensor, texts: Tensor | None = None) -> None:
        """Scores (B,) of the chosen and of the rejected texts.

        ``texts`` (B, 2) are the numbers of both, at least 0 and the same in all processes, where a text may stand in
        several pairs, which then are right or wrong together; without them the pairs have none in common.
        """
        if chosen.shape != rejected.shape or chosen.ndim != 1:
            raise UserError(f"pairs have scores (B,), got {tuple(chosen.shape)} and {tuple(rejected.shape)}")
        self.keep("margins", chosen - rejected)
        self.keep("texts", torch.full((len(chosen), 2), -1) if texts is None else texts)

    def compute(self) -> PairScores:
        margins = self.kept("margins")
        both = torch.sigmoid(torch.cat([margins, -margins]))
        labels = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)]).long()
        right = ((margins > 0).double() + (margins >= 0).double()) / 2
        texts = self.kept("texts")
        return PairScores(
            bootstrap(right) if (texts < 0).any() else _of_pairs(right, texts),
            float(binary_calibration_error(both, labels, n_bins=10, norm="l1")),
            float(-torch.nn.functional.logsigmoid(margins).mean()),
            _reliability(torch.sigmoid(margins.abs()), right),
        )


def _reliability(confidence: Tensor, right: Tensor) -> list[dict[str, float]]:
    """Bins of confidences (N,), at least 0.5, with the means of what is ``right`` (N,)."""
    place = ((confidence - 0.5) * 10).long().clamp(max=4)
    bins = []
    for number in range(5):
        inside = place == number
        means = {"confidence": confidence[inside], "accuracy": right[inside]} if inside.any() else {}
        limits = {"low": 0.5 + 0.1 * number, "high": 0.6 + 0.1 * number, "count": int(inside.sum())}
        bins.append(limits | {name: float(values.mean()) for name, values in means.items()})
    return bins


def _of_pairs(right: Tensor, texts: Tensor) -> Interval:
    """The mean of (N,), with an interval that knows which pairs share one of their ``texts`` (N, 2).

    Normal, with the dyadic cluster-robust variance (Aronow et al. 2015, doi:10.1093/pan/mpv018): the sum, over all two
    pairs with a text in common, of the products of what each is above the mean.
    """
    mean = right.mean()
    if len(right) < 2:
        return Interval(float(mean), float("nan"), float("nan"))
    above, distinct = right - mean, texts.unique(return_inverse=True)
    of_text = torch.zeros(len(distinct[0])).to(right).index_add_(0, distinct[1].T.flatten(), above.repeat(2))
    variance = (of_text.square().sum() - above.square().sum()) / len(right) ** 2  # each pair stands with itself twice
    error = 1.96 * float(variance.clamp(min=0).sqrt())
    return Interval(float(mean), max(0.0, float(mean) - error), min(1.0, float(mean) + error))
