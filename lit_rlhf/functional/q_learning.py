"""Losses of Q-learning on the token MDP: a state is a prompt with the tokens so far, an action is the next token."""

import torch
from torch import Tensor

from lit_rlhf.functional.logprobs import selective_logprobs
from lit_rlhf.functional.masked import as_float, masked_mean, same_shape, zero_masked


def bellman_targets(rewards: Tensor, next_values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """One-step targets of Q: ``y_t = r_t + gamma v_{t+1}``; ``y_T = r_T`` at the last token, which ends the episode.

    Masked tokens are padding on the right: a gap inside a completion is not allowed for.

    Args:
        rewards: (batch, time), of each token.
        next_values: (batch, time), the value of the state after token t; no gradient flows into it.
        mask: (batch, time) bool.
        gamma: discount.

    Returns:
        (batch, time), 0 where masked.

    Raises:
        ValueError: shapes differ.

    >>> rewards, next_values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[4.0, 7.0, 9.0]])
    >>> bellman_targets(rewards, next_values, torch.tensor([[True, True, False]]), gamma=0.5)
    tensor([[2., 1., 0.]])
    """
    same_shape(rewards=rewards, next_values=next_values, mask=mask)
    goes_on = torch.zeros_like(mask)
    goes_on[:, :-1] = mask[:, 1:]
    return zero_masked(as_float(rewards) + gamma * zero_masked(next_values.detach(), goes_on), mask)


def expectile_loss(values: Tensor, targets: Tensor, mask: Tensor, expectile: float) -> Tensor:
    """Asymmetric squared error (IQL, Kostrikov et al. 2021, arXiv:2110.06169, eq. 5).

    ``mean |tau - 1(u < 0)| u^2`` over the tokens that count, with ``u = target - value``. At tau = 0.5 it is half the
    squared error, whose minimum is the mean; towards 1 the minimum moves to the largest target that the data hold.

    Args:
        values: (batch, time).
        targets: (batch, time); no gradient flows into them.
        mask: (batch, time) bool.
        expectile: tau, in (0, 1).

    Raises:
        ValueError: shapes differ, or ``expectile`` is out of its range.

    >>> one = torch.ones(1, 2)
    >>> expectile_loss(0 * one, torch.tensor([[2.0, -2.0]]), one.bool(), expectile=0.75)  # (.75 * 4 + .25 * 4) / 2
    tensor(2.)
    """
    same_shape(values=values, targets=targets, mask=mask)
    if not 0 < expectile < 1:
        raise ValueError(f"expectile={expectile} must be above 0 and below 1")
    error = as_float(targets).detach() - as_float(values)
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return masked_mean(weight * error.square(), mask)


def conservative_loss(q_values: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """Conservative Q-learning's regulariser (Kumar et al. 2020, arXiv:2006.04779, eq. 4), for discrete actions.

    ``mean [log sum_a exp Q(s, a) - Q(s, a_data)]``, the cross-entropy of softmax(Q) on the data's actions: it lowers
    the values of tokens that the data do not hold.

    Args:
        q_values: (batch, time, vocabulary).
        actions: (batch, time) token ids.
        mask: (batch, time) bool.
    """
    return -masked_mean(selective_logprobs(q_values, actions), mask)
