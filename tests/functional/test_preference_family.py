"""The siblings of DPO's loss and the losses of Q-learning: hand vectors, limiting cases, gradients, refusals."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lit_rlhf.functional import (
    bellman_targets,
    conservative_loss,
    dpo_loss,
    expectile_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    robust_dpo_loss,
)

# beta = .5: chosen rewards .5 * 2 = 1 and 0, rejected -1 and .5 * 2 = 1: d = 2 and -1
LOGPS = {
    "policy_chosen": torch.tensor([-10.0, -5.0]), "policy_rejected": torch.tensor([-9.0, -4.0]),
    "ref_chosen": torch.tensor([-12.0, -5.0]), "ref_rejected": torch.tensor([-7.0, -6.0]),
}  # fmt: skip
D = (2.0, -1.0)


def softplus(x):
    return math.log1p(math.exp(x))


def test_label_smoothing_by_hand_and_where_it_is_least():
    loss, stats = dpo_loss(**LOGPS, beta=0.5, label_smoothing=0.25)
    assert loss.item() == pytest.approx(sum(0.75 * softplus(-d) + 0.25 * softplus(d) for d in D) / 2, abs=1e-6)
    assert stats["margin"].item() == pytest.approx(0.5)
    zero = torch.zeros(1)
    best = torch.tensor([math.log(3)], requires_grad=True)  # log((1 - .25) / .25)
    dpo_loss(best, zero, zero, zero, beta=1.0, label_smoothing=0.25)[0].backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-6)


def test_robust_dpo_by_hand_and_its_mean_over_flips_is_dpo():
    loss, _ = robust_dpo_loss(**LOGPS, beta=0.5, label_smoothing=0.25)
    assert loss.item() == pytest.approx(sum(0.75 * softplus(-d) - 0.25 * softplus(d) for d in D) / 2 / 0.5, abs=1e-6)
    flipped = {
        "policy_chosen": LOGPS["policy_rejected"], "policy_rejected": LOGPS["policy_chosen"],
        "ref_chosen": LOGPS["ref_rejected"], "ref_rejected": LOGPS["ref_chosen"],
    }  # fmt: skip
    other, _ = robust_dpo_loss(**flipped, beta=0.5, label_smoothing=0.25)
    assert 0.75 * loss.item() + 0.25 * other.item() == pytest.approx(dpo_loss(**LOGPS, beta=0.5)[0].item(), abs=1e-6)


@pytest.mark.parametrize("loss", [dpo_loss, robust_dpo_loss])
def test_without_smoothing_both_are_dpo(loss):
    assert loss(**LOGPS, beta=0.5, label_smoothing=0.0)[0].item() == dpo_loss(**LOGPS, beta=0.5)[0].item()


def test_ipo_by_hand():
    # h = d / beta = 4 and -2; 1 / (2 beta) = 1: squares 9 and 9
    loss, stats = ipo_loss(**LOGPS, beta=0.5)
    assert loss.item() == pytest.approx(9.0)
    assert stats["accuracy"].item() == 0.5
    assert stats["chosen_reward"].item() == pytest.approx(0.5)


def test_kto_by_hand():
    # log-ratios 2, 0, -2 against a reference point of 1, beta .5: gains .5, -.5 (desirable), 1.5 (undesirable)
    policy, ref = torch.tensor([-10.0, -5.0, -9.0]), torch.tensor([-12.0, -5.0, -7.0])
    desirable = torch.tensor([True, True, False])
    loss, stats = kto_loss(policy, ref, desirable, 1.0, 0.5, 2.0, 3.0)
    expected = (2 / (1 + math.exp(0.5)) + 2 / (1 + math.exp(-0.5)) + 3 / (1 + math.exp(1.5))) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["chosen_reward"].item() == pytest.approx(0.5)  # (1 + 0) / 2
    assert stats["rejected_reward"].item() == pytest.approx(-1.0)


def test_no_gradient_flows_into_ktos_reference_point():
    policy, point = torch.zeros(2, requires_grad=True), torch.ones((), requires_grad=True)
    kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), point, 1.0)[0].backward()
    assert point.grad is None
    assert policy.grad[0].item() < 0 < policy.grad[1].item()


def test_the_odds_ratio_by_hand_and_at_the_ends_of_its_range():
    # p = 3/4 and 1/4: odds 3 and 1/3, ratio 9, -log(9/10)
    chosen, rejected = torch.tensor([math.log(0.75)]), torch.tensor([math.log(0.25)])
    loss, stats = odds_ratio_loss(chosen, rejected)
    assert loss.item() == pytest.approx(-math.log(0.9), abs=1e-6)
    assert stats["log_odds_ratio"].item() == pytest.approx(math.log(9), abs=1e-5)
    ends = torch.tensor([0.0, -1e-9, -80.0], requires_grad=True)
    loss, _ = odds_ratio_loss(ends, torch.tensor([-80.0, -1.0, 0.0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(ends.grad).all()


def test_gradients_equal_finite_differences():
    generator = torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    good = torch.tensor([True, False, True, True, False])
    assert gradcheck(lambda x, y: dpo_loss(x, y, c, d, 0.5, 0.2)[0], (a, b))
    assert gradcheck(lambda x, y: robust_dpo_loss(x, y, c, d, 0.5, 0.2)[0], (a, b))
    assert gradcheck(lambda x, y: ipo_loss(x, y, c, d, 0.5)[0], (a, b))
    assert gradcheck(lambda x: kto_loss(x, c, good, 0.3, 0.5, 0.7, 1.3)[0], (a,))
    assert gradcheck(lambda x, y: odds_ratio_loss(-x.exp(), -y.exp())[0], (a, b))


def test_bellman_targets_stop_at_each_rows_own_end():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.0, 0.0, 2.0], [3.0, 9.0, 9.0]])
    values = torch.tensor([[4.0, 5.0, 9.0], [9.0, 9.0, 9.0]], requires_grad=True)
    targets = bellman_targets(rewards, values, mask, gamma=0.5)
    assert targets.tolist() == [[2.0, 2.5, 2.0], [3.0, 0.0, 0.0]]
    assert not targets.requires_grad


def test_the_expectile_is_the_mean_at_one_half_and_nears_the_largest():
    targets = torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for tau, best in ((0.5, 1.0), (0.75, 2.0), (0.99, 99 * 4 / 102)):  # tau (4 - v) = 3 (1 - tau) v
        v = torch.full((1, 4), best, requires_grad=True)
        expectile_loss(v, targets, mask, tau).backward()
        assert v.grad.sum().item() == pytest.approx(0, abs=1e-5)


def test_the_conservative_loss_by_hand_and_masked():
    # log(e^0 + e^log 3) - log 3 = log(4/3); the second token is masked
    q_values = torch.tensor([[[0.0, math.log(3)], [math.nan, math.nan]]])
    loss = conservative_loss(q_values, torch.tensor([[1, 0]]), torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-6)


def test_wrong_arguments_are_refused():
    two = torch.zeros(2)
    for loss in (dpo_loss, robust_dpo_loss):
        with pytest.raises(ValueError, match=r"label_smoothing=0\.5 must be at least 0 and below 0\.5"):
            loss(two, two, two, two, 0.1, 0.5)
    for loss in (robust_dpo_loss, ipo_loss):
        extra = (0.1,) if loss is robust_dpo_loss else ()
        with pytest.raises(ValueError, match="beta=0 must be above 0"):
            loss(two, two, two, two, 0, *extra)
    with pytest.raises(ValueError, match=r"desirable has shape \(3,\)"):
        kto_loss(two, two, torch.ones(3, dtype=torch.bool), 0.0, 0.1)
    with pytest.raises(ValueError, match="expectile=1 must be above 0 and below 1"):
        expectile_loss(two[None], two[None], torch.ones(1, 2, dtype=torch.bool), 1)
