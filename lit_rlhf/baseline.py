"""What REINFORCE subtracts from a return: it changes the variance of the gradient, not its mean."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_rlhf.checks import check_number
from lit_rlhf.functional import clipped_value_loss, masked_mean
from lit_rlhf.models.critic import ValueHead
from lit_rlhf.models.policy import Policy


class Baseline:
    """What all members share; tensors are (B, T), values (B, T + 1) or None."""

    #: Makes the critic whose values ``__call__`` gets; None for a baseline without one.
    critic: Callable[[Policy], nn.Module] | None = None

    def __call__(self, returns: Tensor, mask: Tensor, values: Tensor | None) -> Tensor:
        """The baseline of each token."""
        raise NotImplementedError

    def loss(self, values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """What the critic learns by; values here are (B, T)."""
        raise NotImplementedError


class NoBaseline(Baseline):
    """The return itself (Williams 1992)."""

    def __call__(self, returns: Tensor, mask: Tensor, values: Tensor | None) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(returns)


class BatchMeanBaseline(Baseline):
    """The mean return of the iteration's tokens.

    A completion's own return is in it, which shrinks the gradient by about 1 / (completions of the iteration).
    """

    def __call__(self, returns: Tensor, mask: Tensor, values: Tensor | None) -> Tensor:  # noqa: ARG002
        return masked_mean(returns, mask).expand_as(returns)


class ValueBaseline(Baseline):
    """A learned value V(s_t), with the squared error to the return as its loss.

    Args:
        critic: makes the critic from the policy; a value head on the policy's backbone by default.
        coef: weight of the value loss, >= 0.

    Raises:
        UserError: ``coef`` is negative.
    """

    def __init__(self, *, critic: Callable[[Policy], nn.Module] = ValueHead, coef: float = 0.1) -> None:
        self.critic = critic
        self.coef = check_number("baseline.coef", coef, at_least=0)

    def __call__(self, returns: Tensor, mask: Tensor, values: Tensor) -> Tensor:  # noqa: ARG002
        return values[:, :-1]

    def loss(self, values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        loss, _ = clipped_value_loss(values, values, returns, mask, None)
        return self.coef * loss
