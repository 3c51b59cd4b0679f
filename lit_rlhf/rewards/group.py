"""Several named rewards that are called together: what composite, ensemble and constraint share."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.scoring import Reward, Scores, freeze, required_columns, score


class RewardGroup:
    """Named rewards; a subclass makes their scores into components and says in ``weights`` what each counts.

    Of a reward that itself has several components, or learns from its own, each is logged, as ``name/part``. So groups
    may hold groups: by these names what was scored finds its way back to the reward that it came from.

    Args:
        rewards: name -> reward.

    Raises:
        UserError: no rewards, or a name that could be mistaken for that of a part.
    """

    weights: dict[str, float]
    #: Names that the group's own components have.
    reserved: tuple[str, ...] = ()
    #: What stands before a reward's name in its config key.
    key = "reward.rewards."

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        if not isinstance(rewards, Mapping) or not rewards:
            raise UserError(f"reward.rewards must be a mapping of at least one name to its reward, got {rewards!r}")
        for name, reward in rewards.items():
            if not isinstance(name, str) or {"/", "."} & set(name) or name in self.reserved:
                raise UserError(
                    f"{self.key}{name}: a reward of {type(self).__name__} must have another name, a text without '/' "
                    f"and '.'{''.join(f', not {taken}' for taken in self.reserved)}"
                )
            if not callable(reward):
                raise UserError(f"{self.key}{name} must be a reward, got {reward!r}")
        self.rewards = dict(rewards)

    @property
    def learns(self) -> bool:
        """Whether something in it takes up what was scored in training."""
        return any(map(learns, self.rewards.values()))

    @property
    def columns(self) -> list[str]:
        return sorted({column for reward in self.rewards.values() for column in required_columns(reward)})

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        tokenizer: Any = None,
        **columns: Any,
    ) -> Any:
        columns = {"completion_ids": completion_ids, "tokenizer": tokenizer, **columns}
        return self.components_of(*self.score_all(prompts, completions, columns))

    def components_of(self, scored: dict[str, Scores], parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every reward's scores, and the parts of those that have several, to components; sets ``weights``."""
        raise NotImplementedError

    def score_all(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]
    ) -> tuple[dict[str, Scores], dict[str, Tensor]]:
        """Every reward's scores, and the parts (raw, as ``name/part``) of those that have several."""
        tokens = {name: columns[name] for name in ("completion_ids", "tokenizer") if name in columns}
        others = {name: values for name, values in columns.items() if name not in tokens}
        scored = {name: score(reward, prompts, completions, others, **tokens) for name, reward in self.rewards.items()}
        parts = {
            f"{name}/{part}": values
            for name, scores in scored.items()
            if len(scores.components) > 1 or learns(self.rewards[name])
            for part, values in scores.components.items()
        }
        return scored, parts

    def learn_from(self, scores: Scores) -> None:
        """Passes what was scored in training on to the rewards that learn from it, to each its own components."""
        for name, reward in self.rewards.items():
            if learns(reward):
                prefix = f"{name}/"
                own = {key.removeprefix(prefix): x for key, x in scores.components.items() if key.startswith(prefix)}
                reward.learn_from(Scores(own, dict(getattr(reward, "weights", {}))))

    def state_dict(self) -> dict[str, Any]:
        return {name: reward.state_dict() for name, reward in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, reward in self._stateful().items():
            reward.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        return {
            name: reward
            for name, reward in self.rewards.items()
            if hasattr(reward, "load_state_dict") and not isinstance(reward, nn.Module)
        }

    def place(self, device: Any, cast: Any) -> None:
        """Moves the rewards that have weights of their own, see ``freeze``."""
        for reward in self.rewards.values():
            freeze(reward, device, cast)


def learns(reward: Reward) -> bool:
    """Whether a reward takes up what was scored in training; of a group, whether one of its rewards does."""
    return reward.learns if isinstance(reward, RewardGroup) else hasattr(reward, "learn_from")
