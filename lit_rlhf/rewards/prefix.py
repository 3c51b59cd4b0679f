"""Any reward, token by token."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.checks import check_int
from lit_rlhf.rewards.group import RewardGroup
from lit_rlhf.rewards.scoring import Reward


class PrefixReward(RewardGroup):
    """Pays each token for the change of another reward's score that it made: a dense reward from a sparse one.

    With s_t the score of the completion's first t tokens, token t gets ``s_t - s_{t-1}``; s_0 = 0, so the sum over the
    tokens is the score of the whole completion and the best policy stays the same (potential-based shaping without
    discount, Ng, Harada & Russell 1999). Only the credit comes earlier. It costs a score for every ``every`` tokens.

    Args:
        reward: the reward of whole completions.
        every: score after every so many tokens, at least 1, and after the last; the change lands on that token.

    Raises:
        UserError: ``every`` is out of its range.
    """

    name = "prefix"
    key = "reward."

    def __init__(self, *, reward: Reward, every: int = 1) -> None:
        super().__init__({"reward": reward})
        self.every = check_int("reward.every", every, at_least=1)
        self.weights = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        **columns: Any,
    ) -> dict[str, list[list[float]] | Tensor]:
        places = [
            (row, end)
            for row, ids in enumerate(completion_ids)
            if len(ids)  # else there is no token to pay
            for end in sorted({*range(self.every, len(ids), self.every), len(ids)})
        ]
        # The whole completion as it is: a tokenizer may decode a part of it with other blanks.
        texts = [
            completions[row]
            if end == len(completion_ids[row])
            else tokenizer.decode(completion_ids[row][:end], skip_special_tokens=True)
            for row, end in places
        ]
        repeated = {name: [values[row] for row, _ in places] for name, values in columns.items()}
        tokens = {"completion_ids": [completion_ids[row][:end] for row, end in places], "tokenizer": tokenizer}
        scored, parts = self.score_all([prompts[row] for row, _ in places], texts, {**repeated, **tokens})
        rewards = [[0.0] * len(ids) for ids in completion_ids]
        before = dict.fromkeys(range(len(completions)), 0.0)
        for (row, end), value in zip(places, scored["reward"].total.tolist(), strict=True):
            rewards[row][end - 1] = value - before[row]
            before[row] = value
        whole = [end == len(completion_ids[row]) for row, end in places]
        self.weights = dict.fromkeys(parts, 0.0)
        return {self.name: rewards, **{name: values[whole] for name, values in parts.items()}}
