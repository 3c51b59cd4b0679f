"""Advantages, over time from a value function or over the completions of one prompt. No whitening here."""

import torch
from torch import Tensor

from lit_rlhf.functional.masked import as_float, same_shape, zero_masked


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, the equations' infinite
    sum written as a recursion; the return, the value function's target, is ``A_t + V_t``. ``t + 1`` is the
    next token that counts, and after the last one V and A are 0. So a masked token, in a gap or at either
    end, changes nothing. To bootstrap a truncated sequence, add ``gamma V`` of the state behind its last
    token to that token's reward.

    Args:
        rewards: (..., time), ``rewards[t]`` is paid for the token at ``t``.
        values: (..., time), ``values[t]`` is the value of the state in which token ``t`` is chosen.
        mask: (..., time), bool.
        gamma: discount per token, in [0, 1].
        lam: weight of longer returns, in [0, 1]: 0 gives the one-step TD error (eq. 17), 1 the discounted
            return minus V (eq. 18).

    Returns:
        Advantages and returns, both (..., time), float32 (float64 stays), 0 where masked. They are constants:
        no gradient flows through them.

    Raises:
        ValueError: shapes differ, or gamma or lam lies outside [0, 1].
        TypeError: ``mask`` is not bool.

    >>> values, rewards = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 5.0]])
    >>> gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.0)
    (tensor([[1., 1., 2.]]), tensor([[2., 3., 5.]]))
    """
    same_shape(rewards=rewards, values=values, mask=mask)
    for name, weight in (("gamma", gamma), ("lam", lam)):
        if not 0 <= weight <= 1:
            raise ValueError(f"{name}={weight} must lie in [0, 1]")
    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)
    advantages = torch.zeros_like(rewards + values)
    next_value = next_advantage = torch.zeros_like(advantages[..., 0])
    for t in reversed(range(mask.shape[-1])):
        counts, value = mask[..., t], values[..., t]
        advantage = rewards[..., t] + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, value, next_value)
        advantages[..., t] = torch.where(counts, advantage, 0)
    return advantages, advantages + values


def group_advantages(scores: Tensor, group_size: int, normalize: bool = True) -> Tensor:
    """Score of a completion relative to its group (GRPO, Shao et al., arXiv:2402.03300, sec. 4.1.2).

    Equation: ``A_i = (s_i - mean(s)) / (std(s) + 1e-4)``, std with Bessel's correction, both as TRL has them.
    The 1e-4 keeps groups that differ by rounding alone small; a constant group gives exactly 0.
    ``normalize=False`` leaves out the division (Dr. GRPO, arXiv:2503.20783).

    Args:
        scores: (batch,); the completions of one prompt stand next to each other.
        group_size: completions per prompt, at least 2.
        normalize: divide by the standard deviation.

    Returns:
        (batch,), float32 (float64 stays).

    Raises:
        ValueError: ``scores`` is not 1-D, ``group_size`` is below 2 or does not divide the batch.
    """
    centred = _centred_groups(scores, group_size)
    if normalize:
        centred = centred / (centred.std(dim=1, keepdim=True) + 1e-4)
    return centred.flatten()


def leave_one_out_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Score minus the mean of the others in its group (RLOO, Ahmadian et al., arXiv:2402.14740).

    Equation: ``A_i = s_i - sum_{j != i} s_j / (k - 1)``, which equals ``(s_i - mean(s)) k / (k - 1)``.

    Args:
        scores: (batch,); the completions of one prompt stand next to each other.
        group_size: completions per prompt ``k``, at least 2.

    Returns:
        (batch,), float32 (float64 stays). A constant group gives exactly 0.

    Raises:
        ValueError: ``scores`` is not 1-D, ``group_size`` is below 2 or does not divide the batch.

    >>> leave_one_out_advantages(torch.tensor([1.0, 0.0, -3.0, 5.0]), group_size=4)
    tensor([ 0.3333, -1.0000, -5.0000,  5.6667])
    """
    return _centred_groups(scores, group_size).flatten() * (group_size / (group_size - 1))


def per_token(x: Tensor, mask: Tensor) -> Tensor:
    """(batch,) numbers of completions to (batch, time), the same for every token that counts and 0 elsewhere.

    >>> per_token(torch.tensor([5.0]), torch.tensor([[True, True, False]]))
    tensor([[5., 5., 0.]])
    """
    return zero_masked(x.unsqueeze(-1).expand(mask.shape), mask)


def _centred_groups(scores: Tensor, group_size: int) -> Tensor:
    if scores.ndim != 1:
        raise ValueError(f"scores must be 1-D, one score per completion, but has shape {tuple(scores.shape)}")
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a baseline from the group needs at least 2 completions")
    if len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores are not divisible by group_size={group_size}")
    groups = as_float(scores).reshape(-1, group_size)
    # Measured from the group's first score, a constant group is exactly 0, without rounding of its mean.
    groups = groups - groups[:, :1]
    return groups - groups.mean(dim=1, keepdim=True)
