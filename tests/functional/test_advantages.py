import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.functional import gae, group_advantages, leave_one_out_advantages, per_token


def run_gae(rewards, values, gamma, lam, mask=None):
    rewards, values = torch.tensor([rewards]), torch.tensor([values])
    mask = torch.tensor([mask]) if mask else torch.ones_like(values, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return advantages[0], returns[0]


def close(actual: torch.Tensor, expected: list[float], atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=0)


# ---- generalised advantage estimation ------------------------------------------------------------------------


def test_gae_without_lambda_is_the_td_error():
    # r_t + .5 V_{t+1} - V_t: 0 + .5 - 0,  0 + 1 - 1,  1 + 1.5 - 2,  0 + 0 - 3
    advantages, _ = run_gae([0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], gamma=0.5, lam=0.0)
    close(advantages, [0.5, 0.0, 0.5, -3.0])


def test_gae_of_a_final_reward():
    # 2 - 1, 3 - 2, 5 - 3; returns A + V
    advantages, returns = run_gae([0.0, 0.0, 5.0], [1.0, 2.0, 3.0], gamma=1.0, lam=0.0)
    close(advantages, [1.0, 1.0, 2.0])
    close(returns, [2.0, 3.0, 5.0])


def test_gae_returns_by_hand():
    # A3 = 1 - 1 = 0; A2 = .9 * 1 = .9; A1 = .9 * .95 * .9 = .7695; A0 = .855 * .7695 = .6579225
    _, returns = run_gae([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], gamma=0.9, lam=0.95)
    close(returns, [0.65792, 0.7695, 0.9, 1.0])


# gamma = .99, lam = .95, gamma lam = .9405, V = (.1, .2, .4, .5), reward 1 at the end:
# A3 = 1 - .5 = .5
# A2 = .99 * .5 - .4 + .9405 * .5      = .095 + .47025  = .56525
# A1 = .99 * .4 - .2 + .9405 * .56525  = .196 + .531618 = .727618
# A0 = .99 * .2 - .1 + .9405 * .727618 = .098 + .684324 = .782324
GAP_FREE = [0.78232, 0.72762, 0.56525, 0.5]


@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf])
def test_a_masked_token_changes_nothing(garbage):
    g = garbage
    for rewards, values, mask in (
        ([0.0, 0.0, 0.0, 1.0], [0.1, 0.2, 0.4, 0.5], "1111"),
        ([0.0, 0.0, g, 0.0, 1.0], [0.1, 0.2, g, 0.4, 0.5], "11011"),
        ([0.0, 0.0, 0.0, 1.0, g, g], [0.1, 0.2, 0.4, 0.5, g, g], "111100"),
        ([g, 0.0, g, g, 0.0, 0.0, 1.0, g], [g, 0.1, g, g, 0.2, 0.4, 0.5, g], "01001110"),
    ):
        counts = [digit == "1" for digit in mask]
        advantages, returns = run_gae(rewards, values, gamma=0.99, lam=0.95, mask=counts)
        keep = torch.tensor(counts)
        close(advantages[keep], GAP_FREE)
        close(returns[keep], [a + v for a, v in zip(GAP_FREE, [0.1, 0.2, 0.4, 0.5], strict=True)])
        assert (advantages[~keep] == 0).all()
        assert (returns[~keep] == 0).all()


rows = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(rows, st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_gae_equals_its_defining_sum(row, gamma, lam):
    rewards, values, mask = (torch.tensor([column]) for column in zip(*row, strict=True))
    advantages, _ = gae(rewards.double(), values.double(), mask, gamma, lam)
    r, v = rewards[mask].tolist(), [*values[mask].tolist(), 0.0]
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))]
    torch.testing.assert_close(advantages[mask], torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(rows, st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value(row, gamma):
    rewards, values, _ = (torch.tensor([column]) for column in zip(*row, strict=True))
    mask = torch.ones_like(rewards, dtype=torch.bool)
    advantages, returns = gae(rewards.double(), values.double(), mask, gamma, lam=1.0)
    steps = range(len(row))
    discounted = [sum(gamma ** (k - t) * rewards[0, k].item() for k in range(t, len(row))) for t in steps]
    expected = torch.tensor([discounted], dtype=torch.float64)
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages, expected - values, atol=1e-5, rtol=0)


def test_gae_bootstraps_a_truncated_sequence_through_its_last_reward():
    # adding gamma V_T to the last reward equals cutting a longer sequence whose next value is V_T, with lam = 0
    longer, _ = run_gae([0.0, 0.0, 9.0], [1.0, 2.0, 4.0], gamma=0.5, lam=0.0)
    cut, _ = run_gae([0.0, 0.5 * 4.0], [1.0, 2.0], gamma=0.5, lam=0.0)
    assert longer[:2].tolist() == cut.tolist()


def test_gae_runs_in_float32_and_passes_no_gradient():
    # 1 + 2^-9 is not a bf16 number
    values = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    rewards = torch.tensor([[2 + 2**-6]], dtype=torch.bfloat16)
    advantages, returns = gae(rewards, values, torch.tensor([[True]]), 1.0, 1.0)
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.item() == 1 + 2**-6
    assert not advantages.requires_grad
    assert not returns.requires_grad
    fine, _ = run_gae([0.0, 2**-9], [0.0, 1.0], 1.0, 1.0)
    low, _ = gae(
        torch.tensor([[0.0, 2**-9]]).bfloat16(), torch.tensor([[0.0, 1.0]]).bfloat16(), torch.ones(1, 2).bool(), 1, 1
    )
    assert low[0].tolist() == fine.tolist()


def test_gae_refuses_what_makes_no_sense():
    ones = torch.ones(2, 3)
    mask = ones.bool()
    with pytest.raises(ValueError, match=r"values has shape \(2, 4\), but rewards has shape \(2, 3\)"):
        gae(ones, torch.ones(2, 4), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\), but rewards has shape \(2, 3\)"):
        gae(ones, ones, mask[:1], 1.0, 1.0)
    with pytest.raises(TypeError, match="mask must be bool"):
        gae(ones, ones, ones, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"gamma=1.01 must lie in \[0, 1\]"):
        gae(ones, ones, mask, 1.01, 1.0)
    with pytest.raises(ValueError, match=r"lam=-0.1 must lie in \[0, 1\]"):
        gae(ones, ones, mask, 1.0, -0.1)


# ---- groups --------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    # sum 3: 1 - 2/3, 0 - 3/3, -3 - 6/3, 5 - (-2)/3; the second group 2 - 4, 4 - 2 in pairs below
    advantages = leave_one_out_advantages(torch.tensor([1.0, 0.0, -3.0, 5.0]), group_size=4)
    close(advantages, [1 / 3, -1.0, -5.0, 17 / 3])


def test_groups_are_neighbours_and_do_not_mix():
    scores = torch.tensor([2.0, 4.0, 100.0, 103.0])
    # pairs: the other one is the baseline
    close(leave_one_out_advantages(scores, group_size=2), [-2.0, 2.0, -3.0, 3.0])
    # means 3 and 101.5
    close(group_advantages(scores, group_size=2, normalize=False), [-1.0, 1.0, -1.5, 1.5])


def test_group_advantages_by_hand():
    # mean 3/4; deviations 1/4, -3/4, -15/4, 17/4 with squares 1/16, 9/16, 225/16, 289/16, sum 524/16 = 32.75;
    # std = sqrt(32.75/3) = 3.304038
    std = 3.304038 + 1e-4
    advantages = group_advantages(torch.tensor([1.0, 0.0, -3.0, 5.0]), group_size=4)
    close(advantages, [0.25 / std, -0.75 / std, -3.75 / std, 4.25 / std])


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e6])
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_a_constant_group_gives_exactly_zero(value, group_size):
    scores = torch.full((2 * group_size,), value)
    scores[group_size] += 1 + abs(value)  # the second group is not constant
    for advantages in (
        group_advantages(scores, group_size),
        group_advantages(scores, group_size, normalize=False),
        leave_one_out_advantages(scores, group_size),
    ):
        assert (advantages[:group_size] == 0).all()
        assert (advantages[group_size:] != 0).all()
        assert advantages.isfinite().all()


@pytest.mark.parametrize("function", [group_advantages, leave_one_out_advantages])
def test_groups_that_cannot_be_are_refused(function):
    with pytest.raises(ValueError, match=r"group_size=1: .* at least 2"):
        function(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="10 scores are not divisible by group_size=4"):
        function(torch.zeros(10), 4)
    with pytest.raises(ValueError, match=r"1-D.*\(5, 2\)"):
        function(torch.zeros(5, 2), 5)


def test_a_completions_number_goes_to_each_of_its_tokens_and_nowhere_else():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert per_token(torch.tensor([2.0, -1.0]), mask).tolist() == [[2.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]
