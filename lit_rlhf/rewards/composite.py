"""A weighted sum of other rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.rewards.scoring import Reward, score, total


class CompositeReward:
    """Named rewards, each multiplied by its weight; the total is their sum.

    Args:
        rewards: name -> reward. A reward that itself returns several components counts with their sum.
        weights: name -> weight, one for each reward; a negative weight is a penalty.

    Raises:
        UserError: no rewards, a weight without a reward, a reward without a weight, or a weight that is no number.
    """

    name = "composite"

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if not rewards:
            raise UserError("reward.rewards is empty: a composite reward needs at least one")
        if unknown := set(weights) - set(rewards):
            raise UserError(f"reward.weights names {sorted(unknown)}, but the rewards are {sorted(rewards)}")
        if missing := set(rewards) - set(weights):
            raise UserError(f"reward.weights has no weight for {sorted(missing)}")
        self.rewards = dict(rewards)
        self.weights = {name: check_number(f"reward.weights.{name}", weights[name]) for name in rewards}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> dict[str, Tensor]:
        return {
            name: self.weights[name] * total(score(reward, prompts, completions, columns, completion_ids))
            for name, reward in self.rewards.items()
        }

    def to(self, device: Any) -> "CompositeReward":
        """Moves the rewards that have weights of their own."""
        for reward in self.rewards.values():
            if hasattr(reward, "to"):
                reward.to(device)
        return self
