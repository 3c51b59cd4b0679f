"""Several rewards that judge the same thing, as one that is harder to fool."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.rewards.group import RewardGroup
from lit_rlhf.rewards.model import ModelReward
from lit_rlhf.rewards.scoring import Reward, Scores

COMBINATIONS = ("mean", "min", "mean_minus_std")


class EnsembleReward(RewardGroup):
    """The mean, the minimum, or the mean minus ``k`` standard deviations of several rewards (Coste et al. 2023,
    arXiv:2310.02743, section 3: mean, worst-case and uncertainty-weighted optimisation; the last with the standard
    deviation where they take the variance).

    The members' own scores and their standard deviation, population, are logged but do not count.

    Args:
        rewards: name -> reward.
        combine: "mean", "min" or "mean_minus_std".
        k: standard deviations to subtract, >= 0; read by "mean_minus_std" alone.

    Raises:
        UserError: fewer than two rewards, an unknown combination, a negative ``k``, or one that is not read.
    """

    name = "ensemble"
    reserved = ("ensemble", "std")

    def __init__(self, *, rewards: Mapping[str, Reward], combine: str = "mean", k: float | None = None) -> None:
        super().__init__(rewards)
        if len(rewards) < 2:
            raise UserError(f"reward.rewards holds {list(rewards)}: an ensemble needs at least two")
        self.combine, self.k = _check_combination(combine, k)
        self.weights = {}

    @classmethod
    def from_paths(cls, *, paths: Sequence[str], combine: str = "mean", k: float | None = None) -> "EnsembleReward":
        """An ensemble of reward models, ``model_0``, ``model_1``, ..., each as in ``ModelReward``."""
        if not isinstance(paths, Sequence) or isinstance(paths, str) or len(paths) < 2:
            raise UserError(f"reward.paths must be a list of at least two models, got {paths!r}")
        _check_combination(combine, k)  # before they are loaded
        return cls(rewards={f"model_{i}": ModelReward(path=path) for i, path in enumerate(paths)}, combine=combine, k=k)

    def components_of(self, scored: dict[str, Scores], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        members = {name: scores.total for name, scores in scored.items()}
        table = torch.stack(list(members.values()))
        mean, std = table.mean(0), table.std(0, correction=0)
        combined = {"mean": mean, "min": table.min(0).values, "mean_minus_std": mean - (self.k or 0.0) * std}
        logged = {**members, "std": std, **parts}
        self.weights = {"ensemble": 1.0, **dict.fromkeys(logged, 0.0)}
        return {"ensemble": combined[self.combine], **logged}


def _check_combination(combine: str, k: float | None) -> tuple[str, float | None]:
    if combine not in COMBINATIONS:
        raise UserError(f"reward.combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    if (k is None) == (combine == "mean_minus_std"):
        raise UserError(f"reward.k={k} with reward.combine={combine}: k is for mean_minus_std, and needed there")
    return combine, None if k is None else check_number("reward.k", k, at_least=0)
