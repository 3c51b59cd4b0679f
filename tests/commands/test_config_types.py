"""Values of configs against the annotations of what they make."""

import pytest

from lit_rlhf.config_types import check_types
from lit_rlhf.errors import UserError


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "lightning.Trainer", "max_epochs": True}, "k.max_epochs must be a whole .* or null, got True"),
        ({"_target_": "torch.optim.SGD", "nesterov": "yes"}, "k.nesterov must be true or false, got 'yes'"),
        ({"_target_": "torch.optim.SGD", "lr": float("nan")}, "k.lr must be a number, got nan"),
        ({"part": {"_target_": "torch.optim.Adam", "betas": 1}}, "k.part.betas must be a list, got 1"),
        ({"_target_": "my_pkg.Mine", "inner": {"x": float("nan")}}, "k.inner.x must be a number, got nan"),
    ],
)
def test_another_type_is_refused_with_its_full_key(node, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check_types(node, "k")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "lightning.Trainer", "devices": "auto", "limit_val_batches": 0.5, "callbacks": {"_target_": "x"}},
        {"_target_": "torch.optim.SGD", "lr": 1},
        {"_target_": "subprocess.run", "args": 3, "timeout": "long"},  # not ours to know
        {"_target_": "lightning.Nothing", "x": "y"},
        [1, "a"],
        None,
    ],
)
def test_what_may_be_meant_passes(node):
    check_types(node, "k")
