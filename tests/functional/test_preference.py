import math

import pytest
import torch
from torch.autograd import gradcheck

from lit_rlhf.functional import dpo_loss, preference_loss


def test_preference_loss_by_hand():
    # differences log 3, 0, -log 3: sigmoids 3/4, 1/2, 1/4; -log of their product 3/32, over 3
    chosen, rejected = torch.tensor([math.log(3), 1.0, 0.0]), torch.tensor([0.0, 1.0, math.log(3)])
    loss, stats = preference_loss(chosen, rejected)
    assert loss.item() == pytest.approx(-math.log(3 / 32) / 3, abs=1e-6)
    assert stats["accuracy"].item() == pytest.approx(1 / 3)  # a tie is no success
    assert stats["margin"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_margin_shifts_the_difference():
    # log 3 - log 3 = 0 and log 3 + log 3 = log 9 (sigmoid 9/10)
    chosen, rejected = torch.full((2,), math.log(3)), torch.zeros(2)
    loss, stats = preference_loss(chosen, rejected, margin=torch.tensor([math.log(3), -math.log(3)]))
    assert loss.item() == pytest.approx(-math.log(0.5 * 0.9) / 2, abs=1e-6)
    assert stats["margin"].item() == pytest.approx(math.log(3), abs=1e-6)
    loss, _ = preference_loss(chosen, rejected, margin=math.log(3))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_preference_loss_does_not_overflow():
    chosen = torch.tensor([-500.0], requires_grad=True)
    loss, _ = preference_loss(chosen, torch.tensor([500.0]))
    loss.backward()
    assert loss.item() == 1000
    assert chosen.grad.item() == -1


def test_dpo_loss_by_hand():
    # beta = .1; chosen reward .1 (-10 + 12) = .2, rejected .1 (-11 + 8) = -.3: -log sigmoid(.5)
    # second pair: .1 (-5 + 5) = 0 and .1 (-4 + 9) = .5: -log sigmoid(-.5)
    loss, stats = dpo_loss(
        policy_chosen=torch.tensor([-10.0, -5.0]),
        policy_rejected=torch.tensor([-11.0, -4.0]),
        ref_chosen=torch.tensor([-12.0, -5.0]),
        ref_rejected=torch.tensor([-8.0, -9.0]),
        beta=0.1,
    )
    expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["chosen_reward"].item() == pytest.approx(0.1)  # (.2 + 0)/2
    assert stats["rejected_reward"].item() == pytest.approx(0.1)  # (-.3 + .5)/2
    assert stats["margin"].item() == pytest.approx(0.0, abs=1e-6)  # (.5 - .5)/2
    assert stats["accuracy"].item() == 0.5


def test_dpo_starts_at_log_two_with_the_gradient_of_the_paper():
    # eq. 7's gradient: -beta sigmoid(r_l - r_w) on the chosen, + on the rejected; at the reference sigmoid(0) = 1/2
    logps = [torch.tensor([-3.0, -7.0], requires_grad=True) for _ in range(2)]
    chosen, rejected = logps
    loss, _ = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.4)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert chosen.grad.tolist() == pytest.approx([-0.1, -0.1])  # .4 / 2, over 2 pairs
    assert rejected.grad.tolist() == pytest.approx([0.1, 0.1])


def test_gradients_equal_finite_differences():
    generator = torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert gradcheck(lambda x, y: preference_loss(x, y, margin=0.3)[0], (a, b))
    assert gradcheck(lambda x, y: dpo_loss(x, y, c, d, beta=0.5)[0], (a, b))


def test_low_precision_scores_are_compared_in_float32():
    # 256 - .5 needs more than bf16's 8 bits: it would round to 256 and the margin with it
    _, stats = preference_loss(torch.tensor([256.0]).bfloat16(), torch.tensor([0.5]).bfloat16())
    assert stats["margin"].item() == 255.5
    _, stats = dpo_loss(*(torch.tensor([x]).bfloat16() for x in (-0.5, -1.0, -256.0, -1.0)), beta=1.0)
    assert stats["margin"].item() == 255.5


def test_stats_have_no_graph():
    x = torch.zeros(2, requires_grad=True)
    for _, stats in (preference_loss(x, x), dpo_loss(x, x, x, x, beta=1.0)):
        assert not any(value.requires_grad for value in stats.values())


def test_wrong_arguments_are_refused():
    two, column = torch.zeros(2), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"rejected_scores has shape \(2, 1\), but chosen_scores has shape \(2,\)"):
        preference_loss(two, column)
    with pytest.raises(ValueError, match=r"margin has shape \(2, 1\), but chosen_scores has shape \(2,\)"):
        preference_loss(two, two, margin=column)
    with pytest.raises(ValueError, match=r"ref_chosen has shape \(3,\), but policy_chosen has shape \(2,\)"):
        dpo_loss(two, two, torch.zeros(3), two, beta=0.1)
    with pytest.raises(ValueError, match="beta=0 must be above 0"):
        dpo_loss(two, two, two, two, beta=0)
