import math

import pytest
import torch
from torch.autograd import gradcheck

from lit_rlhf.functional import clipped_policy_loss, clipped_surrogate, ratio_stats

NAN, INF = math.nan, math.inf


def loss_of(ratios, advantages, low=0.2, high=0.2, dual=None, mask=None):
    new = torch.tensor([ratios]).log().requires_grad_()
    mask = torch.ones_like(new, dtype=torch.bool) if mask is None else torch.tensor([mask])
    loss, stats = clipped_policy_loss(
        new, torch.zeros_like(new), torch.tensor([advantages]), mask, low, high, dual_clip=dual
    )
    (grad,) = torch.autograd.grad(loss, new)
    return loss.item(), stats, grad[0].tolist()


def test_clipped_loss_by_hand():
    # objectives: min(.5, .8) = .5;  -1;  min(1.5, 1.2) * 2 = 2.4.  -(.5 - 1 + 2.4)/3 = -1.9/3
    loss, stats, grad = loss_of([0.5, 1.0, 1.5], [1.0, -1.0, 2.0])
    assert loss == pytest.approx(-1.9 / 3, abs=1e-6)
    # Only the third token is clipped: the first one's bound is passed on the side that eq. 7 does not bind.
    # d(-r A)/d log r = -r A, over 3 tokens
    assert grad == pytest.approx([-0.5 / 3, 1 / 3, 0], abs=1e-6)
    assert stats["clipfrac"].item() == pytest.approx(1 / 3)
    assert stats["ratio"].item() == pytest.approx(1.0)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    # (log(.5)^2 + 0 + log(1.5)^2)/6
    assert stats["approxkl"].item() == pytest.approx((math.log(0.5) ** 2 + math.log(1.5) ** 2) / 6, abs=1e-6)


def test_dual_clip_by_hand():
    # -min(.5, .8) = -.5;  1;  max(40, 4.8) = 40, cut to 3 * 4 = 12.  12.5/3
    loss, stats, grad = loss_of([0.5, 1.0, 10.0], [1.0, -1.0, -4.0], dual=3.0)
    assert loss == pytest.approx(12.5 / 3, abs=1e-5)
    assert grad == pytest.approx([-0.5 / 3, 1 / 3, 0], abs=1e-6)
    assert stats["clipfrac"].item() == pytest.approx(1 / 3)
    without, *_ = loss_of([0.5, 1.0, 10.0], [1.0, -1.0, -4.0])
    assert without == pytest.approx(40.5 / 3, abs=1e-5)


def test_dual_clip_leaves_positive_advantages_alone():
    # 1.2 * 4, not bounded by 3 * 4 from the wrong side; ratio .1 of advantage 1 stays .1
    loss, *_ = loss_of([10.0, 0.1], [4.0, 1.0], dual=3.0)
    assert loss == pytest.approx(-(4.8 + 0.1) / 2, abs=1e-6)


def test_the_two_bounds_are_apart():
    # upper: min(1.5, 1.28) = 1.28 for A = 1; lower: max(.5, 1 - .1) = .9 for A = -1
    loss, *_ = loss_of([1.5, 0.5], [1.0, -1.0], low=0.1, high=0.28)
    assert loss == pytest.approx((-1.28 + 0.9) / 2, abs=1e-6)


@pytest.mark.parametrize(("low", "high"), [(None, None), (None, INF)])
def test_no_bounds_give_the_importance_weighted_policy_gradient(low, high):
    # eq. 6: -(0.01 * -1 + 100 * 2)/2
    loss, stats, grad = loss_of([0.01, 100.0], [-1.0, 2.0], low=low, high=high)
    assert loss == pytest.approx(-(-0.01 + 200) / 2, rel=1e-5)
    assert grad == pytest.approx([0.01 / 2, -200 / 2], rel=1e-5)
    assert stats["clipfrac"] == 0


def test_one_bound_alone():
    # high=None: 1.5 * 1 unclipped; low=.2: .8 for A = -1.  low=None: .5 for A = -1; high=.2: 1.2
    loss, *_ = loss_of([1.5, 0.5], [1.0, -1.0], low=0.2, high=None)
    assert loss == pytest.approx((-1.5 + 0.8) / 2, abs=1e-6)
    loss, *_ = loss_of([1.5, 0.5], [1.0, -1.0], low=None, high=0.2)
    assert loss == pytest.approx((-1.2 + 0.5) / 2, abs=1e-6)


def test_at_ratio_one_it_is_the_plain_policy_gradient():
    generator = torch.manual_seed(0)
    logprobs = (-torch.rand(3, 4, generator=generator)).requires_grad_()
    advantages = torch.randn(3, 4, generator=generator)
    mask = torch.rand(3, 4, generator=generator) > 0.3
    loss, stats = clipped_policy_loss(logprobs, logprobs, advantages, mask, 0.2, 0.2, dual_clip=3.0)
    loss.backward()
    # -A log p, averaged over the tokens that count: the gradient is -A/n
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0))
    assert loss.item() == pytest.approx(-advantages[mask].mean().item(), abs=1e-6)
    assert stats["ratio"] == stats["ratio_max"] == 1
    assert stats["clipfrac"] == stats["approxkl"] == 0


@pytest.mark.parametrize("garbage", [999.0, -999.0, NAN, INF, -INF])
def test_masked_tokens_reach_neither_loss_nor_stats_nor_gradient(garbage):
    ratios, advantages = [0.5, 1.0, 1.5], [1.0, -1.0, 2.0]
    clean, clean_stats, clean_grad = loss_of(ratios, advantages)
    new = torch.tensor([[math.log(ratio) for ratio in ratios[:2]] + [garbage, math.log(1.5), garbage]])
    new.requires_grad_()
    old = torch.tensor([[0.0, 0.0, -garbage, 0.0, garbage]])
    scores = torch.tensor([[1.0, -1.0, garbage, 2.0, garbage]])
    mask = torch.tensor([[True, True, False, True, False]])
    loss, stats = clipped_policy_loss(new, old, scores, mask, 0.2, 0.2, dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(clean, abs=1e-6)
    assert new.grad[mask].tolist() == pytest.approx(clean_grad, abs=1e-6)
    assert (new.grad[~mask] == 0).all()
    for name, value in clean_stats.items():
        assert stats[name].item() == pytest.approx(value.item(), abs=1e-6), name


def test_a_masked_token_does_not_hide_a_small_largest_ratio():
    _, stats, _ = loss_of([0.5, 2.0, 0.25], [1.0, 1.0, 1.0], mask=[True, False, True])
    assert stats["ratio_max"].item() == pytest.approx(0.5)


def test_without_tokens_that_count_loss_and_gradient_are_zero():
    loss, stats, grad = loss_of([0.5, 2.0], [1.0, 1.0], mask=[False, False])
    assert loss == 0
    assert grad == [0, 0]
    assert all(value == 0 for value in stats.values())


def test_old_logprobs_and_advantages_are_constants_and_stats_have_no_graph():
    new, old, advantages = (torch.zeros(1, 2, requires_grad=True) for _ in range(3))
    loss, stats = clipped_policy_loss(new, old, advantages + 1, torch.ones(1, 2).bool(), 0.2, 0.2)
    loss.backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.28, 3.0), (0.2, 0.2, None), (None, None, None)])
def test_gradient_equals_finite_differences(low, high, dual):
    generator = torch.manual_seed(3)
    new, old, advantages = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, generator=generator) > 0.3
    new.requires_grad_()
    assert gradcheck(lambda x: clipped_policy_loss(x, old, advantages, mask, low, high, dual)[0], new)


def test_low_precision_ratios_are_computed_in_float32():
    # exp(-1.0078125 + 1) = .99222 lies between the bf16 numbers .98828 and .9922
    new, old = torch.tensor([[-1.0078125]]).bfloat16(), torch.tensor([[-1.0]]).bfloat16()
    loss, stats = clipped_policy_loss(new, old, torch.ones(1, 1).bfloat16(), torch.ones(1, 1).bool(), 0.2, 0.2)
    assert loss.dtype == stats["ratio"].dtype == torch.float32
    assert stats["ratio"].item() == pytest.approx(math.exp(-0.0078125), abs=1e-6)


def test_wrong_arguments_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"advantages has shape \(2, 1\), but logprobs has shape \(2, 3\)"):
        clipped_policy_loss(x, x, x[:, :1], mask, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(2, 4\), but logprobs has shape \(2, 3\)"):
        clipped_policy_loss(x, torch.zeros(2, 4), x, mask, 0.2, 0.2)
    with pytest.raises(TypeError, match="mask must be bool"):
        clipped_policy_loss(x, x, x, mask.float(), 0.2, 0.2)
    with pytest.raises(ValueError, match=r"clip_low=-0\.1 must be >= 0"):
        clipped_policy_loss(x, x, x, mask, -0.1, 0.2)
    with pytest.raises(ValueError, match="clip_high=nan must be >= 0"):
        clipped_policy_loss(x, x, x, mask, 0.1, NAN)
    with pytest.raises(ValueError, match=r"dual_clip=1\.0 must be above 1"):
        clipped_policy_loss(x, x, x, mask, 0.2, 0.2, dual_clip=1.0)


# ---- the surrogate before its mean ---------------------------------------------------------------------------


def test_the_surrogate_of_single_tokens_by_hand():
    # ratios .5, 1, 1.5 with A = 1, -1, 2 and eps .2: -.5, 1, -2.4 (cut); their mean is the loss's -.6333
    logprobs = torch.tensor([[0.5, 1.0, 1.5]]).log().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    losses, clipped = clipped_surrogate(logprobs, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 2.0]]), mask, 0.2, 0.2)
    torch.testing.assert_close(losses, torch.tensor([[-0.5, 1.0, -2.4]]))
    assert clipped.tolist() == [[False, False, True]]
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 1.0, 0.0]]))


def test_ratio_stats_by_hand_skip_what_does_not_count():
    new, old = torch.tensor([[0.5, 2.0, 9e9]]).log(), torch.zeros(1, 3)
    stats = ratio_stats(new, old, torch.tensor([[True, True, False]]))
    assert float(stats["ratio"]) == pytest.approx(1.25)
    assert float(stats["ratio_max"]) == pytest.approx(2.0)
    assert float(stats["approxkl"]) == pytest.approx(0.480453 / 2, abs=1e-5)  # log(2)^2 of both
