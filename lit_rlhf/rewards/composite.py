"""A weighted sum of other rewards."""

from collections.abc import Mapping

from torch import Tensor

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.rewards.group import RewardGroup
from lit_rlhf.rewards.scoring import Reward, Scores


class CompositeReward(RewardGroup):
    """Named rewards, each multiplied by its weight; the total is their sum. Each is logged raw and weighted.

    Args:
        rewards: name -> reward. A reward that itself has several components counts with their total.
        weights: name -> weight, one for each reward; a negative weight is a penalty. A reward whose node and weight are
            null is left out: so an experiment takes one away that the config has.

    Raises:
        UserError: no rewards, a weight without a reward, a reward without a weight, or a weight that is no number.
    """

    name = "composite"

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if not isinstance(weights, Mapping):
            raise UserError(f"reward.weights must give every reward its weight, got {weights!r}")
        if isinstance(rewards, Mapping):
            for name, reward in rewards.items():
                if reward is None and weights.get(name) is not None:
                    raise UserError(f"reward.rewards.{name} is null: set reward.weights.{name} to null, too")
            left_out = {name for name, reward in rewards.items() if reward is None}
            rewards = {name: reward for name, reward in rewards.items() if name not in left_out}
            weights = {name: weight for name, weight in weights.items() if name not in left_out}
        super().__init__(rewards)
        if unknown := sorted(set(weights) - set(rewards)):
            raise UserError(f"reward.weights.{unknown[0]}: there is no such reward; they are {', '.join(rewards)}")
        if missing := sorted(set(rewards) - set(weights)):
            raise UserError(f"reward.weights.{missing[0]} is missing: every reward needs a weight")
        self._weights = {name: check_number(f"reward.weights.{name}", weights[name]) for name in rewards}
        self.weights = dict(self._weights)

    def components_of(self, scored: dict[str, Scores], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        self.weights = {**self._weights, **dict.fromkeys(parts, 0.0)}
        components = {}
        for name, scores in scored.items():
            dense = [x for x in scores.components.values() if x.ndim == 2]
            if len(dense) < len(scores.components):
                components[name] = scores.whole
            if dense:
                # Only where a reward has both: what it says of tokens stays apart from what it says of the whole.
                tokens = f"{name}.tokens" if name in components else name
                components[tokens], self.weights[tokens] = scores.dense, self._weights[name]
        return {**components, **parts}
