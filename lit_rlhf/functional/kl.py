"""KL divergence of the policy from a reference: sampled estimators, and the exact sum over the vocabulary."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lit_rlhf.functional.masked import as_float, same_shape

KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k3_st")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token from tokens that the policy sampled.

    With ``d = log policy(a) - log reference(a)`` (http://joschu.net/blog/kl-approx.html, where r = exp(-d)):

    ========  ===================  =========================================================================
    ``k1``    ``d``                unbiased, of either sign
    ``k2``    ``d^2 / 2``          biased, >= 0
    ``k3``    ``exp(-d) - 1 + d``  unbiased, >= 0
    ``abs``   ``|d|``              biased, >= 0
    ``k3_st`` value of k3          gradient of k2 (straight through)
    ========  ===================  =========================================================================

    These are estimates of the *value*, to be used in the reward. As a loss on sampled tokens, their gradients
    differ: k1's has mean zero, k2's is that of KL(policy || reference), k3's that of KL(reference || policy).
    ``k3_st`` joins k3's low variance of the value with k2's gradient, which is the one wanted.

    Args:
        logprobs: the policy's, any shape.
        ref_logprobs: the reference's, same shape.
        estimator: "k1", "k2", "k3", "abs" or "k3_st".

    Returns:
        Same shape, nats per token, float32 (float64 stays). There is no mask: where the result is used as a
        loss, zero the masked log-probabilities first, as an overflow of exp(-d) would turn their zero
        gradient into NaN.

    Raises:
        ValueError: shapes differ, or the estimator is unknown.

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-15.0]), "k1")
    tensor([14.])
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = as_float(logprobs) - as_float(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        # expm1 keeps the digits that exp(-d) - 1 loses for small d, where its rounding would go below 0.
        return torch.expm1(-d) + d
    if estimator == "abs":
        return d.abs()
    if estimator == "k3_st":
        k2 = d.square() / 2
        return (torch.expm1(-d) + d).detach() + (k2 - k2.detach())
    raise ValueError(f"estimator={estimator!r} is unknown, choose one of {', '.join(KL_ESTIMATORS)}")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(policy || reference) at each position.

    Equation: ``sum_v p_v (log p_v - log q_v)``, p the policy, q the reference. A token with ``p_v = 0`` adds
    0; one with ``q_v = 0 < p_v`` makes it inf.

    Args:
        logits: the policy's, (..., vocabulary).
        ref_logits: the reference's, same shape.

    Returns:
        (...), nats, float32 (float64 stays).

    Raises:
        ValueError: shapes differ.
    """
    same_shape(logits=logits, ref_logits=ref_logits)
    return _FullKL.apply(as_float(logits), as_float(ref_logits))


class _FullKL(torch.autograd.Function):
    """The gradients in closed form, which are exactly 0 between equal policies.

    Those that autograd derives are 1e-8 there, from rounding, and Adam makes a full step of any gradient, however
    small.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, ref_logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ref_logits)
        p, _, difference = _FullKL.terms(logits, ref_logits)
        return (p * difference).sum(-1)

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, q, difference = _FullKL.terms(*ctx.saved_tensors)
        to_policy, to_reference = ctx.needs_input_grad
        upstream = upstream.unsqueeze(-1)
        kl = (p * difference).sum(-1, keepdim=True)
        return (
            upstream * p * (difference - kl) if to_policy else None,
            upstream * (q - p) if to_reference else None,
        )

    @staticmethod
    def terms(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, q, and log p - log q, which is 0 where p is."""
        logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        p = logp.exp()
        return p, logq.exp(), torch.where(p > 0, logp - logq, 0)
