import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.functional import masked_mean, masked_var, masked_whiten

NAN, INF = math.nan, math.inf


def mask_of(digits: str) -> torch.Tensor:
    return torch.tensor([[digit == "1" for digit in row] for row in digits.split()])


def test_only_elements_that_count_enter_mean_and_variance():
    x = torch.tensor([[1.0, 999.0, 2.0], [6.0, 999.0, 999.0]])
    mask = mask_of("101 100")
    # 1, 2, 6: mean 9/3 = 3; squared deviations 4 + 1 + 9 = 14; with Bessel's correction 14/2 = 7
    assert masked_mean(x, mask) == 3
    assert masked_var(x, mask) == 7


def test_mean_over_time_gives_one_mean_per_sequence():
    x = torch.tensor([[1.0, 3.0, 999.0], [5.0, 999.0, 999.0], [999.0, 999.0, 999.0]])
    means = masked_mean(x, mask_of("110 100 000"), dim=1)
    assert means.tolist() == [2, 5, 0]  # (1 + 3)/2, 5/1, nothing


def test_an_empty_mask_gives_zero_and_no_nan():
    x, mask = torch.tensor([[NAN, 2.0]]), mask_of("00")
    assert masked_mean(x, mask) == 0
    assert masked_var(x, mask) == 0
    assert masked_whiten(x, mask).tolist() == [[0, 0]]


def test_a_single_element_has_variance_zero_and_whitens_to_zero():
    x, mask = torch.tensor([[7.0, NAN]]), mask_of("10")
    assert masked_var(x, mask) == 0
    assert masked_whiten(x, mask).tolist() == [[0, 0]]
    assert masked_whiten(x, mask, shift_mean=False).tolist() == [[7, 0]]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
def test_garbage_at_masked_places_reaches_neither_result_nor_gradient(function, garbage):
    mask = mask_of("1101")
    x = torch.tensor([[1.0, 2.0, garbage, 4.0]], requires_grad=True)
    clean = torch.tensor([[1.0, 2.0, 0.0, 4.0]], requires_grad=True)
    weights = torch.tensor([[1.0, -2.0, 5.0, 3.0]])
    for tensor in (x, clean):
        (function(tensor, mask) * weights).sum().backward()
    torch.testing.assert_close(function(x, mask), function(clean, mask))
    torch.testing.assert_close(x.grad, clean.grad)
    assert x.grad.isfinite().all()
    assert x.grad[0, 2] == 0


def test_whitening_by_hand():
    # 1, 2, 6: mean 3, variance 7 (above); whitened (-2, -1, 3)/sqrt(7)
    x, mask = torch.tensor([[1.0, 2.0, 999.0, 6.0]]), mask_of("1101")
    root = math.sqrt(7)
    expected = torch.tensor([[-2 / root, -1 / root, 0, 3 / root]])
    torch.testing.assert_close(masked_whiten(x, mask), expected)
    kept = torch.tensor([[3 - 2 / root, 3 - 1 / root, 0, 3 + 3 / root]])
    torch.testing.assert_close(masked_whiten(x, mask, shift_mean=False), kept)


def test_extra_pad_columns_leave_whitened_elements_unchanged():
    x, mask = torch.randn(3, 5, generator=torch.manual_seed(0)), mask_of("11111 11100 11110")
    padded = torch.cat([torch.full((3, 2), 999.0), x, torch.full((3, 4), -999.0)], dim=1)
    no = torch.zeros(3, 4, dtype=torch.bool)
    padded_mask = torch.cat([no[:, :2], mask, no], dim=1)
    for shift_mean in (True, False):
        whitened = masked_whiten(padded, padded_mask, shift_mean)
        torch.testing.assert_close(whitened[:, 2:7], masked_whiten(x, mask, shift_mean))
        assert (whitened[~padded_mask] == 0).all()


@settings(deadline=None, max_examples=100)
@given(
    data=st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=3, max_size=24),
    shift=st.sampled_from([0.0, 50.0, -1000.0]),
)
def test_whitened_elements_have_mean_zero_and_variance_one(data, shift):
    x = torch.tensor([[value + shift for value, _ in data]])
    mask = torch.tensor([[counts for _, counts in data]])
    counted = x[mask].double()
    whitened = masked_whiten(x, mask)
    assert (whitened[~mask] == 0).all()
    if len(counted) >= 2 and counted.std() > 0.1:
        # torch on the selected elements is the oracle; 1e-8 in the denominator is below 1e-6 of this spread
        assert abs(whitened[mask].double().mean()) < 1e-4
        assert abs(whitened[mask].double().var() - 1) < 1e-4
        kept = masked_whiten(x, mask, shift_mean=False)
        assert abs(kept[mask].double().mean() - counted.mean()) < 1e-3
        assert abs(kept[mask].double().var() - 1) < 1e-2


@pytest.mark.parametrize("value", [0.1, 1000.1, -3e7])
def test_equal_elements_whiten_to_zero_wherever_they_lie(value):
    # The mean of seven equal numbers need not be that number; whitening must not blow its rounding up.
    x, mask = torch.full((1, 8), value), mask_of("11111110")
    assert masked_whiten(x, mask).tolist() == [[0] * 8]


def test_low_precision_is_summed_in_float32():
    # In bf16, 256 + 1 = 256: a running sum of 512 ones would stop at 256, and the mean at 0.5.
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    x[0, 0] = 3
    mean = masked_mean(x, torch.ones(1, 512, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert mean == 514 / 512
    assert masked_mean(x.double(), torch.ones(1, 512, dtype=torch.bool)).dtype == torch.float64


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
def test_wrong_masks_are_refused(function):
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\), but x has shape \(2, 3\)"):
        function(torch.zeros(2, 3), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool.*float32"):
        function(torch.zeros(2, 3), torch.ones(2, 3))
