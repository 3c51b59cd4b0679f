import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.functional import KL_ESTIMATORS, full_kl, kl_estimate

INF = math.inf

# A vocabulary of four: the policy's logits and the reference's distribution.
LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


def test_estimators_by_hand():
    # log-probability -1 against a reference's 0, -15, -30: d = -1, 14, 29.
    # k2 = d^2/2 = 1/2, 196/2, 841/2.  k3 = e^-d - 1 + d = e - 2 = .71828, e^-14 + 13, e^-29 + 28.
    logprobs, reference = torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0])
    for estimator, expected in (
        ("k1", [-1.0, 14.0, 29.0]),
        ("k2", [0.5, 98.0, 420.5]),
        ("k3", [math.e - 2, 13.0, 28.0]),
        ("abs", [1.0, 14.0, 29.0]),
    ):
        estimate = kl_estimate(logprobs, reference, estimator)
        torch.testing.assert_close(estimate, torch.tensor(expected), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=300)
@given(st.floats(-80, 0, width=32), st.one_of(st.floats(-80, 80, width=32), st.floats(-(2**-10), 2**-10, width=32)))
def test_k2_k3_and_abs_are_nowhere_negative(logprob, difference):
    logprobs = torch.tensor([logprob])
    reference = logprobs - torch.tensor([difference])
    for estimator in ("k2", "k3", "abs"):
        assert kl_estimate(logprobs, reference, estimator) >= 0


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_identical_policies_have_exactly_zero_kl(estimator):
    logits = torch.randn(2, 5, 50, generator=torch.manual_seed(0))
    logprobs = logits.log_softmax(-1)[..., 0]
    assert (kl_estimate(logprobs, logprobs.clone(), estimator) == 0).all()
    assert (full_kl(logits, logits.clone()) == 0).all()


def test_k3_keeps_its_digits_for_nearly_equal_policies():
    # k3 is about d^2/2; with exp(-d) - 1 in float32 all digits of 5e-9 would be rounding
    d = torch.tensor([1e-4])
    assert kl_estimate(d, torch.zeros(1), "k3").item() == pytest.approx(5e-9, rel=1e-3)


def test_k1_and_k3_are_unbiased_and_full_kl_is_their_expectation():
    logp = LOGITS.log_softmax(-1)
    exact = sum(p * (math.log(p) - math.log(q)) for p, q in zip(logp.exp().tolist(), REFERENCE.tolist(), strict=True))
    assert full_kl(LOGITS, REFERENCE.log()).item() == pytest.approx(exact, abs=1e-12)
    for estimator in ("k1", "k3"):
        expectation = (logp.exp() * kl_estimate(logp, REFERENCE.log(), estimator)).sum().item()
        assert expectation == pytest.approx(exact, abs=1e-12)


def expected_loss_gradient(estimator: str) -> torch.Tensor:
    """The mean over tokens drawn from the policy of the gradient of the estimate as a loss: p is not
    differentiated, as samples are not."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.detach().exp() * kl_estimate(logp, REFERENCE.log(), estimator)).sum().backward()
    return logits.grad


def reverse_kl_gradient() -> torch.Tensor:
    """d KL(p || q) / d z_v = p_v (log p_v - log q_v - KL), from d p_u / d z_v = p_u ([u = v] - p_v)."""
    p = LOGITS.softmax(-1)
    ratio = p.log() - REFERENCE.log()
    return p * (ratio - (p * ratio).sum())


def test_gradient_of_k1_as_a_loss_has_zero_mean():
    # E_p[d log p / d z] = sum_u p_u ([u = v] - p_v) = 0
    torch.testing.assert_close(expected_loss_gradient("k1"), torch.zeros(4, dtype=torch.float64))


def test_k2_as_a_loss_descends_the_reverse_kl():
    torch.testing.assert_close(expected_loss_gradient("k2"), reverse_kl_gradient())


def test_k3_as_a_loss_descends_the_forward_kl():
    # d KL(q || p) / d z_v = p_v - q_v, from KL(q || p) = const - sum_u q_u log p_u
    torch.testing.assert_close(expected_loss_gradient("k3"), LOGITS.softmax(-1) - REFERENCE)


def test_straight_through_k3_has_its_own_value_and_k2s_gradient():
    torch.testing.assert_close(expected_loss_gradient("k3_st"), reverse_kl_gradient())
    logp = LOGITS.log_softmax(-1)
    torch.testing.assert_close(kl_estimate(logp, REFERENCE.log(), "k3_st"), kl_estimate(logp, REFERENCE.log(), "k3"))


def test_k1_in_the_reward_descends_the_reverse_kl():
    # the score-function gradient E_p[k1 * d log p / d z], k1 a constant
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    k1 = kl_estimate(logp, REFERENCE.log(), "k1").detach()
    (logp.detach().exp() * k1 * logp).sum().backward()
    torch.testing.assert_close(logits.grad, reverse_kl_gradient())


def test_full_kl_has_the_gradient_of_the_reverse_kl():
    logits = LOGITS.clone().requires_grad_()
    full_kl(logits, REFERENCE.log()).backward()
    torch.testing.assert_close(logits.grad, reverse_kl_gradient())
    assert torch.autograd.gradgradcheck(full_kl, (logits, REFERENCE.log()))


def test_full_kl_moves_no_policy_that_is_its_reference():
    # float32, where the gradient that autograd derives is some 1e-9, which Adam would make a full step of
    logits = torch.randn(4, 1000, generator=torch.manual_seed(0)).requires_grad_()
    reference = logits.detach().clone().requires_grad_()
    full_kl(logits, reference).sum().backward()
    assert (logits.grad == 0).all()
    assert (reference.grad == 0).all()


def test_full_kl_with_banned_tokens():
    banned = torch.tensor([0.0, 0.0, -INF], requires_grad=True)
    # (1/2, 1/2, 0) against (1/4, 1/4, 1/2): log 2; the other way round inf
    reference = torch.log(torch.tensor([0.25, 0.25, 0.5]))
    kl = full_kl(banned, reference)
    assert kl.item() == pytest.approx(math.log(2), abs=1e-6)
    kl.backward()
    assert banned.grad.isfinite().all()
    assert full_kl(reference, banned.detach()) == INF
    assert full_kl(banned.detach(), banned.detach()) == 0


def test_low_precision_is_computed_in_float32():
    logits = torch.randn(3, 100, generator=torch.manual_seed(0)).bfloat16()
    reference = torch.randn(3, 100).bfloat16()
    kl = full_kl(logits, reference)
    p, q = (torch.distributions.Categorical(logits=z.double()) for z in (logits, reference))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(kl.double(), expected, atol=1e-5, rtol=1e-6)
    # -1 - 2^-7 is the next bf16 number to -1; its difference to 1e-3 would be lost in bf16
    estimate = kl_estimate(torch.tensor([-1.0]).bfloat16(), torch.tensor([-1e-3]).bfloat16(), "k1")
    assert estimate.dtype == torch.float32
    assert estimate.item() == pytest.approx(-1 + 1e-3, abs=1e-5)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="estimator='k4' is unknown, choose one of k1, k2, k3, abs"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(2, 1\), but logprobs has shape \(2, 3\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 1), "k1")
    with pytest.raises(ValueError, match=r"ref_logits has shape \(2, 4\), but logits has shape \(2, 3\)"):
        full_kl(torch.zeros(2, 3), torch.zeros(2, 4))
