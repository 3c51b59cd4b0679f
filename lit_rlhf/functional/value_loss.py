"""PPO's clipped value loss."""

import torch
from torch import Tensor

from lit_rlhf.functional.masked import masked_mean, same_shape, zero_masked


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error, or the clipped one where it is larger, averaged over the tokens that count.

    ``L_t = max((V - R)^2, (V_old + clamp(V - V_old, -range, range) - R)^2) / 2``: the squared error of PPO's
    eq. 9 (arXiv:1707.06347) with the value clipping of OpenAI's code.

    Args:
        values: the critic's that is trained, (batch, time).
        old_values: those of the rollout, (batch, time). A constant: no gradient flows into it.
        returns: the targets, (batch, time). A constant too.
        mask: (batch, time), bool.
        clip_range: how far a value may move from its old one, > 0 and in units of the reward; None does not
            clip.

    Returns:
        The loss, and stats reduced with the same mask: ``clipfrac``, the fraction of tokens whose gradient
        the clipping has cut. Explained variance belongs to the whole batch, not to minibatches: take it from
        ``masked_var``.

    Raises:
        ValueError: shapes differ, or ``clip_range`` is not above 0.
        TypeError: ``mask`` is not bool.
    """
    same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"clip_range={clip_range} must be above 0, or None for no clipping")
    values = zero_masked(values, mask)
    old_values, returns = zero_masked(old_values.detach(), mask), zero_masked(returns.detach(), mask)
    plain = losses = (values - returns).square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        losses = torch.maximum(plain, (clipped - returns).square())
    stats = {"clipfrac": masked_mean(losses.detach() > plain.detach(), mask)}
    return masked_mean(losses, mask) / 2, stats
