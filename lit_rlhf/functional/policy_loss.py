"""PPO's clipped policy loss, whole and before its mean, and how far a policy has moved."""

import torch
from torch import Tensor

from lit_rlhf.functional.masked import masked_mean, same_shape, zero_masked


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses of single tokens that ``clipped_policy_loss`` is the mean of; arguments as there.

    How they are averaged differs between algorithms. Log-probabilities (batch, 1) of whole completions, sums (RLOO) or
    means over tokens (GSPO), make the ratio that of the completion.

    Returns:
        The losses, 0 where masked, and bool where a bound has cut the gradient; both of ``logprobs``' shape.

    Raises:
        ValueError, TypeError: as ``clipped_policy_loss``.
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None and not bound >= 0:
            raise ValueError(f"{name}={bound} must be >= 0, or None for no bound")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None for no bound")

    # Masked before exp: there, an overflow's gradient would be 0 * inf.
    log_ratio = zero_masked(logprobs, mask) - zero_masked(old_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    advantages = zero_masked(advantages.detach(), mask)
    plain = losses = -advantages * ratio
    if clip_low is not None or clip_high is not None:
        low = None if clip_low is None else 1 - clip_low
        high = None if clip_high is None else 1 + clip_high
        losses = torch.maximum(plain, -advantages * ratio.clamp(low, high))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, losses.detach() != plain.detach()


def ratio_stats(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled the tokens, (batch, time) each.

    Returns:
        ``approxkl``, ``mean((logprobs - old_logprobs)^2) / 2``, as TRL has it; ``ratio``, the mean ratio;
        ``ratio_max``, the largest. All are 0 if no token counts; no gradient flows.
    """
    log_ratio = (zero_masked(logprobs, mask) - zero_masked(old_logprobs, mask)).detach()
    ratio = log_ratio.exp()
    return {
        "approxkl": masked_mean(log_ratio.square(), mask) / 2,
        "ratio": masked_mean(ratio, mask),
        "ratio_max": zero_masked(ratio, mask).max(),
    }


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss (PPO, Schulman et al., arXiv:1707.06347, eq. 7), averaged over counted tokens.

    With ``ratio = exp(logprobs - old_logprobs)``: ``L_t = -min(ratio A, clamp(ratio, 1 - low, 1 + high) A)``.
    Equal bounds are the paper's; a wider upper one is DAPO's clip-higher (arXiv:2503.14476, sec. 3.1). None
    (or inf) takes a bound away; without both, the loss is the importance-weighted policy gradient of eq. 6.
    With ``dual_clip = c``, tokens of negative advantage lose at most ``-c A`` (Ye et al., arXiv:1912.09729,
    eq. 5).

    Args:
        logprobs: the policy's that is trained, (batch, time).
        old_logprobs: the policy's that sampled the tokens, (batch, time). A constant: no gradient flows into
            it.
        advantages: (batch, time). A constant too.
        mask: (batch, time), bool.
        clip_low: how far below 1 the ratio counts, >= 0, or None.
        clip_high: how far above 1 the ratio counts, >= 0, or None.
        dual_clip: the bound c > 1, or None.

    Returns:
        The loss, and stats reduced with the same mask: ``clipfrac``, the fraction of tokens whose gradient a
        bound has cut; ``approxkl``, ``mean((logprobs - old_logprobs)^2) / 2``, as TRL has it; ``ratio``, the
        mean ratio; ``ratio_max``, the largest. All are 0 if no token counts.

    Raises:
        ValueError: shapes differ, a clip bound is negative, or ``dual_clip`` is not above 1.
        TypeError: ``mask`` is not bool.
    """
    losses, clipped = clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, dual_clip)
    stats = {"clipfrac": masked_mean(clipped, mask), **ratio_stats(logprobs, old_logprobs, mask)}
    return masked_mean(losses, mask), stats
