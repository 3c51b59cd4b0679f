"""Two rewards at once: the most of one while the other stays above a threshold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.checks import check_number
from lit_rlhf.rewards.group import RewardGroup
from lit_rlhf.rewards.scoring import Reward, Scores


class ConstrainedReward(RewardGroup):
    """Maximises ``objective`` subject to a mean of ``constraint`` of at least ``threshold``, by a Lagrange multiplier.

    The score is the Lagrangian, rescaled so that its size does not grow with the multiplier (Stooke et al. 2020,
    arXiv:2007.03964, section 5; Safe RLHF, Dai et al. 2023, arXiv:2310.12773, section 3.3):

        (objective + multiplier * constraint) / (1 + multiplier),

    and after each iteration  multiplier <- clip(multiplier + lr * (threshold - mean constraint), 0, max_multiplier).

    Args:
        objective: what is maximised, e.g. helpfulness.
        constraint: what must stay above the threshold, e.g. harmlessness.
        threshold: of the constraint's mean over an iteration's completions, in its own units.
        lr: step of the multiplier per iteration and unit of the constraint, > 0.
        init_multiplier: from 0 to ``max_multiplier``.
        max_multiplier: > 0; beyond it the constraint counts that much more than the objective and no more.

    Raises:
        UserError: a number is out of its range.
    """

    name = "constrained"
    learns = True
    key = "reward."

    def __init__(
        self,
        *,
        objective: Reward,
        constraint: Reward,
        threshold: float,
        lr: float = 0.1,
        init_multiplier: float = 0.0,
        max_multiplier: float = 100.0,
    ) -> None:
        super().__init__({"objective": objective, "constraint": constraint})
        self.threshold = check_number("reward.threshold", threshold)
        self.lr = check_number("reward.lr", lr, above=0)
        self.max_multiplier = check_number("reward.max_multiplier", max_multiplier, above=0)
        bounds = {"at_least": 0, "at_most": self.max_multiplier}
        self.multiplier = check_number("reward.init_multiplier", init_multiplier, **bounds)
        self.weights = {}

    def components_of(self, scored: dict[str, Scores], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = 1 + self.multiplier
        multiplier = torch.full_like(scored["objective"].total, self.multiplier)
        self.weights = {
            "objective": 1 / whole,
            "constraint": self.multiplier / whole,
            **dict.fromkeys(["multiplier", *parts], 0.0),
        }
        return {**{name: scores.total for name, scores in scored.items()}, "multiplier": multiplier, **parts}

    def learn_from(self, scores: Scores) -> None:
        """Moves the multiplier after an iteration's completions were scored."""
        super().learn_from(scores)
        missing = self.threshold - float(scores.components["constraint"].mean())
        self.multiplier = min(max(0.0, self.multiplier + self.lr * missing), self.max_multiplier)

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "rewards": super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multiplier = state["multiplier"]
        super().load_state_dict(state["rewards"])
