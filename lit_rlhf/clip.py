"""How far an update may move the policy and the value: clip ranges, or PPO's penalty on the KL to the old policy."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.functional import clipped_surrogate, kl_estimate
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.schedule import linear


@dataclass(frozen=True, kw_only=True)
class ClipBounds:
    """What ``clipped_policy_loss`` and ``clipped_value_loss`` take; None does not clip.

    Args:
        low: the ratio counts down to ``1 - low``.
        high: the ratio counts up to ``1 + high``.
        value: a value may move this far from its old one, in units of the reward.
        dual: tokens of negative advantage ``A`` lose at most ``-dual * A``.
        penalty: weight of KL(old || new) in the loss, per nat.
    """

    low: float | None
    high: float | None
    value: float | None
    dual: float | None = None
    penalty: float = 0.0

    def surrogate(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses, not yet averaged, and where a bound has cut the gradient; see ``functional.clipped_surrogate``.

        All are (B, T), or (B, 1) where ratio and advantage are those of whole completions.
        """
        losses, clipped = clipped_surrogate(logprobs, old_logprobs, advantages, mask, self.low, self.high, self.dual)
        if self.penalty:
            old_to_new = kl_estimate(zero_masked(old_logprobs, mask), zero_masked(logprobs, mask), "k3")
            losses = losses + self.penalty * old_to_new
        return losses, clipped


class Clip:
    """What all members share: ``at(progress)`` gives the bounds for a point of the training.

    Args:
        value_range: > 0, how far a value may move from its old one, in units of the reward; None does not clip it.

    Raises:
        UserError: a value range that is not positive.
    """

    #: Whether ``update`` wants the KL that each iteration's updates made.
    follows_kl = False

    def __init__(self, value_range: float | None) -> None:
        self.value_range = None if value_range is None else check_number("clip.value_range", value_range, above=0)

    def at(self, progress: float) -> ClipBounds:
        """The bounds at ``progress``, from 0 at the start to 1 at the end of training."""
        raise NotImplementedError

    def update(self, kl: float) -> None:
        """Called after an iteration, where ``follows_kl``, with its mean KL(old || new) per token, in nats."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: on resume the config's ranges hold."""


class SymmetricClip(Clip):
    """Ratio within ``[1 - range, 1 + range]`` (PPO, arXiv:1707.06347, eq. 7).

    Args:
        range: in (0, 1); from 1 on, the lower bound of the ratio would not be positive.
        value_range: see ``Clip``.

    Raises:
        UserError: a range is out of its own range.

    >>> SymmetricClip(range=0.1, value_range=None).at(progress=0.5)
    ClipBounds(low=0.1, high=0.1, value=None, dual=None, penalty=0.0)
    """

    def __init__(self, *, range: float = 0.2, value_range: float | None = 0.2) -> None:
        super().__init__(value_range)
        self.range = check_number("clip.range", range, above=0, below=1)

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - constant
        return ClipBounds(low=self.range, high=self.range, value=self.value_range)


class AsymmetricClip(Clip):
    """Ratio within ``[1 - low, 1 + high]``: clip-higher (DAPO, arXiv:2503.14476, section 3.1).

    Args:
        low: in (0, 1).
        high: > 0.
        value_range: see ``Clip``.

    Raises:
        UserError: a bound is out of its range.
    """

    def __init__(self, *, low: float = 0.2, high: float = 0.28, value_range: float | None = 0.2) -> None:
        super().__init__(value_range)
        self.low = check_number("clip.low", low, above=0, below=1)
        self.high = check_number("clip.high", high, above=0)

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - constant
        return ClipBounds(low=self.low, high=self.high, value=self.value_range)


class LinearClip(Clip):
    """Symmetric, with a range that goes in a straight line over the run (PPO's Atari setting anneals it to 0).

    Args:
        start: the range at progress 0, in (0, 1).
        end: the range at progress 1, in [0, 1).
        value_range: see ``Clip``; constant.

    Raises:
        UserError: a range is out of its own range.

    >>> LinearClip(start=0.3, end=0.1).at(progress=1.0).low
    0.1
    """

    def __init__(self, *, start: float = 0.2, end: float = 0.0, value_range: float | None = 0.2) -> None:
        super().__init__(value_range)
        self.start = check_number("clip.start", start, above=0, below=1)
        self.end = check_number("clip.end", end, at_least=0, below=1)

    def at(self, progress: float) -> ClipBounds:
        range = linear(self.start, self.end, progress)
        return ClipBounds(low=range, high=range, value=self.value_range)


class DualClip(Clip):
    """Symmetric, and the loss of a token of negative advantage A is bounded by ``-dual * A`` (arXiv:1912.09729, eq. 5).

    Without that bound, a token that the new policy makes far likelier than the old one costs without limit.

    Args:
        range: in (0, 1).
        dual: > 1.
        value_range: see ``Clip``.

    Raises:
        UserError: a bound is out of its range.
    """

    def __init__(self, *, range: float = 0.2, dual: float = 3.0, value_range: float | None = 0.2) -> None:
        super().__init__(value_range)
        self.range = check_number("clip.range", range, above=0, below=1)
        self.dual = check_number("clip.dual", dual, above=1)

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - constant
        return ClipBounds(low=self.range, high=self.range, value=self.value_range, dual=self.dual)


class NoClip(Clip):
    """No bound on the ratio: the importance-weighted policy gradient (arXiv:1707.06347, eq. 6).

    Args:
        value_range: see ``Clip``.
    """

    def __init__(self, *, value_range: float | None = None) -> None:
        super().__init__(value_range)

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - constant
        return ClipBounds(low=None, high=None, value=self.value_range)


class AdaptiveKLPenalty(Clip):
    """No clipping, but a penalty on KL(old || new) whose weight follows a target: PPO's second variant (section 4).

    The loss gains ``weight * KL(old || new)`` per token (arXiv:1707.06347, eq. 8). After each iteration's updates, with
    d their mean KL per token: ``weight / 2`` if d < target / 1.5, ``weight * 2`` if d > target * 1.5; at least
    ``min_weight``, at most ``max_weight``.

    Args:
        target: KL of an iteration's updates, > 0, in nats per token.
        init_weight: from ``min_weight`` to ``max_weight``.
        min_weight: > 0. After many small updates, an unbounded weight would be 0, or too small to come back in time.
        max_weight: the other bound; at an infinite weight nothing would be learned again.
        value_range: see ``Clip``.

    Raises:
        UserError: a number is out of its range; in ``update``, a KL that is not finite.

    >>> penalty = AdaptiveKLPenalty(target=0.01)
    >>> penalty.update(0.1)
    >>> penalty.at(progress=0.0).penalty
    2.0
    """

    follows_kl = True

    def __init__(
        self,
        *,
        target: float = 0.01,
        init_weight: float = 1.0,
        min_weight: float = 1e-3,
        max_weight: float = 1e3,
        value_range: float | None = None,
    ) -> None:
        super().__init__(value_range)
        self.target = check_number("clip.target", target, above=0)
        self.min_weight = check_number("clip.min_weight", min_weight, above=0)
        self.max_weight = check_number("clip.max_weight", max_weight, above=self.min_weight)
        self.weight = check_number(
            "clip.init_weight", init_weight, at_least=self.min_weight, at_most=self.max_weight
        )

    def at(self, progress: float) -> ClipBounds:  # noqa: ARG002 - follows the KL
        return ClipBounds(low=None, high=None, value=self.value_range, penalty=self.weight)

    def update(self, kl: float) -> None:
        if not math.isfinite(kl):
            raise UserError(f"The KL of the last updates is {kl}: the policy's log-probabilities are non-finite.")
        if kl < self.target / 1.5:
            self.weight = max(self.weight / 2, self.min_weight)
        elif kl > self.target * 1.5:
            self.weight = min(self.weight * 2, self.max_weight)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]
