"""Losses over pairs of completions, one preferred to the other."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlhf.functional.masked import as_float, same_shape


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
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290, eq. 7).

    With the implicit reward ``r = beta (log policy - log reference)``: ``-mean log sigmoid(r_chosen -
    r_rejected)``.

    Args:
        policy_chosen: log-probability of the whole chosen completion, summed over its tokens, (batch,).
        policy_rejected: the same of the rejected one, (batch,).
        ref_chosen: the reference's, (batch,).
        ref_rejected: the reference's, (batch,).
        beta: strength of the KL constraint, > 0.

    Returns:
        The loss, and stats: ``accuracy``, ``margin`` (as in ``preference_loss``, of the implicit rewards),
        ``chosen_reward``, ``rejected_reward``, their means.

    Raises:
        ValueError: shapes differ, or ``beta`` is not above 0.
    """
    same_shape(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    chosen = beta * (as_float(policy_chosen) - as_float(ref_chosen))
    rejected = beta * (as_float(policy_rejected) - as_float(ref_rejected))
    stats = _pair_stats(chosen - rejected)
    stats |= {"chosen_reward": chosen.detach().mean(), "rejected_reward": rejected.detach().mean()}
    return -logsigmoid(chosen - rejected).mean(), stats


def _pair_stats(difference: Tensor) -> dict[str, Tensor]:
    difference = difference.detach()
    return {"accuracy": (difference > 0).float().mean(), "margin": difference.mean()}
