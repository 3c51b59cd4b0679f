"""Stage 4, the score's part: scale, clip, normalise, and charge for a missing end."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.checks import check_bool, check_number


class RunningMoments:
    """Mean and variance of everything seen, merged batch by batch (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0  # sum of squared distances from the mean

    def update(self, x: Tensor) -> None:
        values = x.double()
        count, mean = x.numel(), float(values.mean())
        delta, whole = mean - self.mean, self.count + count
        self.squares += float((values - mean).square().sum()) + delta**2 * self.count * count / whole
        self.mean += delta * count / whole
        self.count = whole

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 until there are two values or while all are equal."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0


class ScoreShaper:
    """What a score goes through before it becomes the reward of the last token, in this order.

    Args:
        normalize: divide by the running standard deviation of all scores so far, after subtracting their running mean
            (Zheng et al. 2023, arXiv:2307.04964, section 5.3.1).
        scale: multiplies the score.
        clip: bounds its absolute value; None leaves it.
        missing_eos_penalty: subtracted, last, from a completion that the length limit cut off.

    Raises:
        UserError: a clip that is not positive, a negative penalty, or a number that is not finite.
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        scale: float = 1.0,
        clip: float | None = None,
        missing_eos_penalty: float = 0.0,
    ) -> None:
        key = "algorithm.scores"
        self.normalize = check_bool(f"{key}.normalize", normalize)
        self.scale = check_number(f"{key}.scale", scale)
        self.clip = None if clip is None else check_number(f"{key}.clip", clip, above=0)
        self.missing_eos_penalty = check_number(f"{key}.missing_eos_penalty", missing_eos_penalty, at_least=0)
        self.moments = RunningMoments()

    def __call__(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Scores (B,) and finished (B,) bool -> shaped scores (B,); the running moments take these scores in first."""
        if self.normalize:
            self.moments.update(scores)
            scores = (scores - self.moments.mean) / self.moments.std
        scores = scores * self.scale
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return scores - self.missing_eos_penalty * (~finished).to(scores.dtype)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.moments))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.moments).update(state)


def place_scores(scores: Tensor, response_mask: Tensor) -> Tensor:
    """(B,) scores to (B, T) token rewards: everything on the last token that counts, 0 elsewhere.

    >>> place_scores(torch.tensor([5.0]), torch.tensor([[True, True, False]]))
    tensor([[0., 5., 0.]])
    """
    last = response_mask.sum(-1, keepdim=True) - 1
    rewards = torch.zeros(response_mask.shape, dtype=scores.dtype, device=scores.device)
    return rewards.scatter(1, last.clamp(min=0), scores.unsqueeze(1))
