import pytest
import torch

from lit_rlhf.functional import conjugate_gradient


def test_a_system_by_hand():
    # [[4, 1], [1, 3]] x = [1, 2]: determinant 11, x = ((3 - 2) / 11, (8 - 1) / 11)
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    x = conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0], dtype=torch.float64), steps=2)
    torch.testing.assert_close(x, torch.tensor([1 / 11, 7 / 11], dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 5, 20])
def test_it_is_exact_after_as_many_steps_as_dimensions(size):
    torch.manual_seed(size)
    root = torch.randn(size, size, dtype=torch.float64)
    # So well conditioned that rounding, which differs between processors, stays small in every direction.
    matrix = root @ root.T + size * torch.eye(size, dtype=torch.float64)
    vector = torch.randn(size, dtype=torch.float64)
    x = conjugate_gradient(lambda v: matrix @ v, vector, steps=size)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, vector), atol=1e-5, rtol=1e-5)


def test_nothing_to_solve_takes_no_product():
    zero = torch.zeros(3)
    assert torch.equal(conjugate_gradient(lambda _: pytest.fail("a product"), zero, steps=10), zero)


def test_it_stops_after_the_steps_it_is_given():
    calls = []
    conjugate_gradient(lambda v: calls.append(1) or torch.arange(1.0, 9.0) * v, torch.ones(8), steps=3)
    assert len(calls) == 3
