import math

import pytest
import torch
from torch.autograd import gradcheck

from lit_rlhf.functional import clipped_value_loss

NAN, INF = math.nan, math.inf


def loss_of(values, old, returns, clip_range, mask=None):
    values = torch.tensor([values], requires_grad=True)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor([mask])
    loss, stats = clipped_value_loss(values, torch.tensor([old]), torch.tensor([returns]), mask, clip_range)
    (grad,) = torch.autograd.grad(loss, values)
    return loss.item(), stats["clipfrac"].item(), grad[0].tolist()


def test_without_clipping_it_is_half_the_squared_error():
    # (1^2 + 3^2)/2/2; gradient (V - R)/2
    loss, clipfrac, grad = loss_of([2.0, 5.0], [0.0, 0.0], [1.0, 2.0], clip_range=None)
    assert loss == 2.5
    assert clipfrac == 0
    assert grad == [0.5, 1.5]


def test_clipped_loss_by_hand():
    # range .5 around the old value 0:
    # V = 1 towards R = 2:    max((1 - 2)^2, (.5 - 2)^2) = 2.25, clipped
    # V = 1 away from R = -2: max((1 + 2)^2, (.5 + 2)^2) = 9, not bound
    # V = .2 within:          (.2 - 1)^2 = .64 both ways
    loss, clipfrac, grad = loss_of([1.0, 1.0, 0.2], [0.0, 0.0, 0.0], [2.0, -2.0, 1.0], clip_range=0.5)
    assert loss == pytest.approx((2.25 + 9 + 0.64) / 6, abs=1e-6)
    assert clipfrac == pytest.approx(1 / 3)
    assert grad == pytest.approx([0.0, 3 / 3, -0.8 / 3], abs=1e-6)


@pytest.mark.parametrize("garbage", [999.0, NAN, INF, -INF])
def test_masked_tokens_reach_neither_loss_nor_stats_nor_gradient(garbage):
    g = garbage
    clean = loss_of([1.0, 1.0, 0.2], [0.0, 0.0, 0.0], [2.0, -2.0, 1.0], clip_range=0.5)
    mask = [True, False, True, True, False]
    loss, clipfrac, grad = loss_of(
        [1.0, g, 1.0, 0.2, g], [0.0, g, 0.0, 0.0, -g], [2.0, g, -2.0, 1.0, g], clip_range=0.5, mask=mask
    )
    assert loss == pytest.approx(clean[0], abs=1e-6)
    assert clipfrac == pytest.approx(clean[1])
    assert [grad[0], grad[2], grad[3]] == pytest.approx(clean[2], abs=1e-6)
    assert grad[1] == grad[4] == 0


def test_without_tokens_that_count_loss_and_gradient_are_zero():
    assert loss_of([1.0], [0.0], [2.0], clip_range=0.5, mask=[False]) == (0, 0, [0])


def test_old_values_and_returns_are_constants():
    values, old, returns = (torch.ones(1, 2, requires_grad=True) for _ in range(3))
    loss, stats = clipped_value_loss(values, old * 2, returns * 3, torch.ones(1, 2).bool(), 0.1)
    loss.backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None
    assert not stats["clipfrac"].requires_grad


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_gradient_equals_finite_differences(clip_range):
    generator = torch.manual_seed(0)
    values, old, returns = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 6, generator=generator) > 0.3
    values.requires_grad_()
    assert gradcheck(lambda v: clipped_value_loss(v, old, returns, mask, clip_range)[0], values)


def test_low_precision_is_computed_in_float32():
    # (1 + 2^-7)^2/2 = .50784, between the bf16 numbers .5078 and .5117
    values = torch.tensor([[1 + 2**-7]]).bfloat16()
    zero = torch.zeros(1, 1).bfloat16()
    loss, _ = clipped_value_loss(values, zero, zero, torch.ones(1, 1).bool(), None)
    assert loss.dtype == torch.float32
    assert loss.item() == (1 + 2**-7) ** 2 / 2


def test_wrong_arguments_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"returns has shape \(2, 4\), but values has shape \(2, 3\)"):
        clipped_value_loss(x, x, torch.zeros(2, 4), mask, 0.2)
    with pytest.raises(ValueError, match=r"old_values has shape \(3,\), but values has shape \(2, 3\)"):
        clipped_value_loss(x, x[0], x, mask, 0.2)
    with pytest.raises(TypeError, match="mask must be bool"):
        clipped_value_loss(x, x, x, mask.int(), 0.2)
    with pytest.raises(ValueError, match="clip_range=0 must be above 0"):
        clipped_value_loss(x, x, x, mask, 0)
