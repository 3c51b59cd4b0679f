import math

import pytest

from lit_rlhf.student import half_width, t_quantile


@pytest.mark.parametrize(
    ("level", "freedom", "table"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 10, 2.228), (0.99, 4, 4.604), (0.95, 1001, 1.962)],
)
def test_students_t_is_that_of_the_tables(level, freedom, table):
    assert t_quantile(freedom, level) == pytest.approx(table, abs=5e-4)


def test_the_interval_of_a_mean_of_few_runs_is_students():
    assert half_width([0.0, 1.0]) == pytest.approx(12.706 * 0.5, rel=1e-4)
    assert math.isnan(half_width([1.0]))
    assert half_width([2.0, 2.0, 2.0]) == 0
