"""Losses over completions that people, or a judge, preferred or not: in pairs, or one by one."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.functional.masked import as_float, masked_mean, same_shape


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry loss of a reward model (InstructGPT, Ouyang et al., arXiv:2203.02155, eq. 1).

    Equation: ``-mean log sigmoid(r_chosen - r_rejected - margin)``; the margin is Llama 2's
    (arXiv:2307.09288, eq. 2).

    Args:
        chosen_scores: (batch,).
        rejected_scores: (batch,).
        margin: by how much the scores should differ: one number, or (batch,).

    Returns:
        The loss, and stats: ``accuracy``, the fraction of pairs whose chosen score is higher (a tie is
        wrong); ``margin``, the mean of chosen minus rejected.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if isinstance(margin, Tensor) and margin.ndim:
        same_shape(chosen_scores=chosen_scores, margin=margin)
    difference = as_float(chosen_scores) - as_float(rejected_scores)
    return -logsigmoid(difference - margin).mean(), _pair_stats(difference)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290, eq. 7).

    With the implicit reward ``r = beta (log policy - log reference)`` and ``d = r_chosen - r_rejected``:
    ``-mean [(1 - e) log sigmoid(d) + e log sigmoid(-d)]``. With ``e = label_smoothing > 0`` it is conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences"), which takes a share e of the labels to be wrong and
    is least at ``d = log((1 - e) / e)`` instead of at infinity.

    Args:
        policy_chosen: log-probability of the whole chosen completion, summed over its tokens, (batch,).
        policy_rejected: the same of the rejected one, (batch,).
        ref_chosen: the reference's, (batch,).
        ref_rejected: the reference's, (batch,).
        beta: strength of the KL constraint, > 0.
        label_smoothing: e, in [0, 0.5).

    Returns:
        The loss, and stats: ``accuracy``, ``margin`` (as in ``preference_loss``, of the implicit rewards),
        ``chosen_reward``, ``rejected_reward``, their means.

    Raises:
        ValueError: shapes differ, ``beta`` is not above 0, or ``label_smoothing`` is out of its range.
    """
    difference, stats = _implicit_rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    _check_smoothing(label_smoothing)
    losses = -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)
    return losses.mean(), stats


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, section 3): unbiased where labels are flipped at random.

    With d as in ``dpo_loss`` and e the share of flipped labels:
    ``mean [-(1 - e) log sigmoid(d) + e log sigmoid(-d)] / (1 - 2 e)``; its mean over the flips is DPO's loss on the
    true labels. Arguments, results and errors as in ``dpo_loss``.
    """
    difference, stats = _implicit_rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    _check_smoothing(label_smoothing)
    losses = -(1 - label_smoothing) * logsigmoid(difference) + label_smoothing * logsigmoid(-difference)
    return losses.mean() / (1 - 2 * label_smoothing), stats


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17; its tau is ``beta``).

    With h the difference of the two log-ratios of policy to reference: ``mean (h - 1 / (2 beta))^2``. Unlike DPO's it
    has a minimum at a finite h however certain the preferences are.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: (batch,), log-probabilities, summed over tokens or
            averaged (see ``algorithms.IPO``).
        beta: strength of the KL constraint, > 0.

    Returns:
        As in ``dpo_loss``.

    Raises:
        ValueError: shapes differ, or ``beta`` is not above 0.
    """
    difference, stats = _implicit_rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return (difference / beta - 1 / (2 * beta)).square().mean(), stats


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7), from unpaired judgements.

    With the log-ratio ``l = log policy - log reference`` of a completion and the reference point ``z``, an estimate of
    KL(policy || reference): ``mean w (1 - sigmoid(beta (l - z)))`` for desirable completions, ``beta (z - l)`` for
    undesirable ones.

    Args:
        policy: log-probability of the whole completion, summed over its tokens, (batch,).
        ref: the reference's, (batch,).
        desirable: (batch,) bool.
        baseline: z, one number in nats, at least 0; no gradient flows into it.
        beta: > 0.
        desirable_weight, undesirable_weight: w; the paper's lambda_D and lambda_U.

    Returns:
        The loss, and stats: ``chosen_reward`` and ``rejected_reward``, the means of ``beta l`` over the desirable and
        over the undesirable rows (0 where there is none).

    Raises:
        ValueError: shapes differ, or ``beta`` is not above 0.
    """
    same_shape(policy=policy, ref=ref, desirable=desirable)
    _check_beta(beta)
    ratio = as_float(policy) - as_float(ref)
    distance = ratio - torch.as_tensor(baseline, device=ratio.device).detach()
    gain = torch.where(desirable, distance, -distance)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    rewards = beta * ratio.detach()
    stats = {"chosen_reward": masked_mean(rewards, desirable), "rejected_reward": masked_mean(rewards, ~desirable)}
    return (weight * torch.sigmoid(-beta * gain)).mean(), stats


def odds_ratio_loss(chosen_logprobs: Tensor, rejected_logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The preference part of ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 7); it needs no reference.

    With ``log odds(y) = log p - log(1 - p)`` and p the geometric mean of a completion's token probabilities (eq. 4):
    ``-mean log sigmoid(log odds(chosen) - log odds(rejected))``.

    Args:
        chosen_logprobs: log p, the mean log-probability of the chosen completion's tokens, (batch,), below 0.
        rejected_logprobs: the same of the rejected one, (batch,).

    Returns:
        The loss, and stats: ``log_odds_ratio``, its mean.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    log_odds_ratio = _log_odds(as_float(chosen_logprobs)) - _log_odds(as_float(rejected_logprobs))
    return -logsigmoid(log_odds_ratio).mean(), {"log_odds_ratio": log_odds_ratio.detach().mean()}


def _log_odds(logprobs: Tensor) -> Tensor:
    """log p - log(1 - p), without the cancellation of 1 - p for p near 1; p = 1 counts as the next number below."""
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return logprobs - torch.log(-torch.expm1(logprobs))


def _implicit_rewards(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(batch,) r_chosen - r_rejected with r = beta (log policy - log reference), and the stats."""
    same_shape(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    _check_beta(beta)
    chosen = beta * (as_float(policy_chosen) - as_float(ref_chosen))
    rejected = beta * (as_float(policy_rejected) - as_float(ref_rejected))
    stats = _pair_stats(chosen - rejected)
    stats |= {"chosen_reward": chosen.detach().mean(), "rejected_reward": rejected.detach().mean()}
    return chosen - rejected, stats


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 0.5")


def _pair_stats(difference: Tensor) -> dict[str, Tensor]:
    difference = difference.detach()
    return {"accuracy": (difference > 0).float().mean(), "margin": difference.mean()}
