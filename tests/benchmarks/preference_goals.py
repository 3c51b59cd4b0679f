"""What the algorithms of preferences converge to: their papers' losses over every pair, minimised without a network.

The data are those of ``ExactProblem.preferences``, as many as there can be. A loss is written here from its paper and a
policy is a free table of log-probabilities, so that nothing is shared with what is measured.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.exact import ExactProblem

Loss = Callable[[ExactProblem, Tensor], Tensor]  # of a policy's log-probabilities (X, Y) to a number


def minimiser(problem: ExactProblem, loss: Loss, steps: int = 2000) -> Tensor:
    """(X, Y) log-probabilities of the policy whose loss is smallest, by L-BFGS from the reference."""
    # In units of which a rare completion's is as steep as a common one's.
    scale = problem.reference.exp().rsqrt()
    free = torch.zeros(problem.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=steps, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
        tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(problem, (problem.reference + scale * free).log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return (problem.reference + scale * free.detach()).log_softmax(-1)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def pair_shares(problem: ExactProblem, flipped: float = 0.0) -> Tensor:
    """(X, Y, Y) the probability that a prompt's preference is for the one completion over the other."""
    reference = problem.reference.exp()
    drawn = reference.unsqueeze(2) * reference.unsqueeze(1) * (1 - torch.eye(problem.shape[1]))
    wins = torch.sigmoid(problem.scores.unsqueeze(2) - problem.scores.unsqueeze(1))
    wins = (1 - flipped) * wins + flipped * (1 - wins)
    return 2 * wins * drawn / drawn.sum((1, 2), keepdim=True)


def over_pairs(problem: ExactProblem, values: Tensor, flipped: float = 0.0) -> Tensor:
    """The mean of values (X, Y, Y) of chosen and rejected completions."""
    return (pair_shares(problem, flipped) * values).sum((1, 2)).mean()


def margins(values: Tensor) -> Tensor:
    """(X, Y) values of completions -> (X, Y, Y), the chosen one's minus the rejected one's."""
    return values.unsqueeze(2) - values.unsqueeze(1)


def lengths(problem: ExactProblem) -> Tensor:
    """(Y,) tokens of completions."""
    return torch.tensor([len(completion) for completion in problem.completions], dtype=torch.float64)


def cdpo_loss(problem: ExactProblem, logprobs: Tensor, *, beta: float, smoothing: float) -> Tensor:
    """Conservative DPO (Mitchell 2023); without smoothing DPO (arXiv:2305.18290, eq. 7)."""
    d = beta * margins(logprobs - problem.reference)
    return over_pairs(problem, -(1 - smoothing) * logsigmoid(d) - smoothing * logsigmoid(-d))


def robust_dpo_loss(problem: ExactProblem, logprobs: Tensor, *, beta: float, smoothing: float) -> Tensor:
    """Robust DPO (arXiv:2403.00409, section 3) where that share of the labels is flipped."""
    d = beta * margins(logprobs - problem.reference)
    values = (-(1 - smoothing) * logsigmoid(d) + smoothing * logsigmoid(-d)) / (1 - 2 * smoothing)
    return over_pairs(problem, values, flipped=smoothing)


def ipo_loss(problem: ExactProblem, logprobs: Tensor, *, beta: float, by_length: bool = True) -> Tensor:
    """IPO (arXiv:2310.12036, eq. 17); by length with means over the tokens instead of sums."""
    ratios = (logprobs - problem.reference) / (lengths(problem) if by_length else 1)
    return over_pairs(problem, (margins(ratios) - 1 / (2 * beta)) ** 2)


def orpo_loss(problem: ExactProblem, logprobs: Tensor, *, weight: float) -> Tensor:
    """ORPO (arXiv:2403.07691, eqs. 6 and 7): log p is the mean over the tokens, in the odds too."""
    means = logprobs / lengths(problem)
    odds = means - torch.log1p(-means.exp())
    return over_pairs(problem, -means.unsqueeze(2) - weight * logsigmoid(margins(odds)))


# ---- labels ---------------------------------------------------------------------------------------------------------


def kto_loss(problem: ExactProblem, logprobs: Tensor, *, beta: float) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 7) with the reference point 0 and both weights 1.

    The share of a completion's labels that are "desirable" is sigmoid(r / beta).
    """
    good, value = torch.sigmoid(problem.scores / beta), torch.sigmoid(beta * (logprobs - problem.reference))
    return (problem.reference.exp() * (good * (1 - value) + (1 - good) * value)).sum(-1).mean()


def kto_target(problem: ExactProblem, beta: float) -> Tensor:
    """(X, Y) log-probabilities of the policy whose KTO loss is smallest, for beta <= 1, with the reference point 0.

    The loss is a constant less the reference's mean of g sigmoid(beta l), with g = 2 sigmoid(r / beta) - 1 and the
    log-ratio l. Completions with r < 0 get probability 0. In those with r > 0 it is concave for beta <= 1, and equally
    steep in all of their probabilities: g slope(l) is one number, found by bisection so that they sum to 1. The
    reference point is 0 there: the mean log-ratio, of which it is the positive part, is that of some completions with
    probability 0.
    """
    good = 2 * torch.sigmoid(problem.scores / beta) - 1

    def ratios(slope: Tensor) -> Tensor:  # (X, 1) -> (X, Y), of falling slopes
        low, high = (torch.full(problem.shape, x, dtype=torch.float64) for x in (-60.0, 60.0))
        for _ in range(80):
            middle = (low + high) / 2
            steep = good * beta * torch.sigmoid(beta * middle) * torch.sigmoid(-beta * middle) * (-middle).exp() > slope
            low, high = torch.where(steep, middle, low), torch.where(steep, high, middle)
        return torch.where(good > 0, low, -torch.inf)

    low, high = (torch.full((problem.shape[0], 1), x, dtype=torch.float64) for x in (-40.0, 40.0))  # log slope
    for _ in range(80):
        middle = (low + high) / 2
        large = (problem.reference + ratios(middle.exp())).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(large, middle, low), torch.where(large, high, middle)
    return (problem.reference + ratios(low.exp())).log_softmax(-1)


def minimum_of(loss: Callable[..., Tensor], **settings: float) -> Callable[[ExactProblem], Tensor]:
    """The target of a solver: the minimiser of a loss with these settings."""
    return functools.partial(minimiser, loss=functools.partial(loss, **settings))
