"""Weight c2 of the entropy bonus (PPO, arXiv:1707.06347, eq. 9)."""

import math
from typing import Any

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.errors import UserError
from lit_rlhf.schedule import linear


class EntropyBonus:
    """What all members share.

    Args:
        top_k: the entropy is that of the ``top_k`` likeliest tokens, renormalised. In a vocabulary of tens of
            thousands, most of the full entropy's gradient goes to raising tokens that fit nowhere. None takes all.

    Raises:
        UserError: ``top_k`` is below 2, where the entropy would always be 0.
    """

    def __init__(self, top_k: int | None = None) -> None:
        self.top_k = None if top_k is None else check_int("entropy.top_k", top_k, at_least=2)

    def at(self, progress: float) -> float:
        """The weight at ``progress``, from 0 at the start to 1 at the end of training."""
        raise NotImplementedError

    def update(self, entropy: float) -> None:
        """Called after an iteration with its mean entropy per token, in nats, as this bonus counts it."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: on resume the config's weights hold."""


class NoEntropy(EntropyBonus):
    """No bonus. The entropy is still measured."""

    def __init__(self) -> None:
        super().__init__()

    def at(self, progress: float) -> float:  # noqa: ARG002 - constant
        return 0.0


class ConstantEntropy(EntropyBonus):
    """The same weight throughout.

    Args:
        coef: >= 0, in loss per nat.
        top_k: see ``EntropyBonus``.

    Raises:
        UserError: ``coef`` is negative or not finite, or ``top_k`` is too small.
    """

    def __init__(self, *, coef: float = 0.01, top_k: int | None = None) -> None:
        super().__init__(top_k)
        self.coef = check_number("entropy.coef", coef, at_least=0)

    def at(self, progress: float) -> float:  # noqa: ARG002 - constant
        return self.coef


class LinearEntropy(EntropyBonus):
    """A weight that goes in a straight line from the start to the end of training.

    Args:
        start: the weight at progress 0, >= 0, in loss per nat.
        end: the weight at progress 1, >= 0, in loss per nat.
        top_k: see ``EntropyBonus``.

    Raises:
        UserError: a weight is negative or not finite, or ``top_k`` is too small.

    >>> LinearEntropy(start=0.02, end=0.0).at(progress=0.5)
    0.01
    """

    def __init__(self, *, start: float, end: float, top_k: int | None = None) -> None:
        super().__init__(top_k)
        self.start = check_number("entropy.start", start, at_least=0)
        self.end = check_number("entropy.end", end, at_least=0)

    def at(self, progress: float) -> float:
        return linear(self.start, self.end, progress)


class TargetEntropy(EntropyBonus):
    """A weight that holds the entropy at a target, as SAC's temperature does (arXiv:1812.05905, section 5).

    After each iteration ``log weight <- log weight + lr * (target - entropy)``, between ``min_coef`` and ``max_coef``.

    Args:
        target: entropy per token to hold, > 0, in nats.
        init_coef: the first weight, from ``min_coef`` to ``max_coef``.
        lr: > 0, per nat.
        min_coef: > 0, the lower bound: from far below, the weight would take as long to come back as it took to get
            there.
        max_coef: the upper bound: a weight that is too large drives the policy to noise before the next measurement.
        top_k: see ``EntropyBonus``.

    Raises:
        UserError: a number is out of its range; in ``update``, an entropy that is not finite.

    >>> entropy = TargetEntropy(target=2.0, init_coef=0.01, lr=1.0)
    >>> entropy.update(1.0)
    >>> round(entropy.at(progress=0.0), 4)
    0.0272
    """

    def __init__(
        self,
        *,
        target: float,
        init_coef: float = 0.001,
        lr: float = 0.1,
        min_coef: float = 1e-5,
        max_coef: float = 0.1,
        top_k: int | None = None,
    ) -> None:
        super().__init__(top_k)
        self.target = check_number("entropy.target", target, above=0)
        self.min_coef = check_number("entropy.min_coef", min_coef, above=0)
        self.max_coef = check_number("entropy.max_coef", max_coef, above=self.min_coef)
        self.coef = check_number("entropy.init_coef", init_coef, at_least=self.min_coef, at_most=self.max_coef)
        self.lr = check_number("entropy.lr", lr, above=0)

    def at(self, progress: float) -> float:  # noqa: ARG002 - follows the entropy
        return self.coef

    def update(self, entropy: float) -> None:
        if not math.isfinite(entropy):
            raise UserError(f"The measured entropy is {entropy}: the policy's logits have become non-finite.")
        step = self.lr * (self.target - entropy)
        bounds = math.log(self.min_coef), math.log(self.max_coef)
        self.coef = math.exp(min(max(math.log(self.coef) + step, bounds[0]), bounds[1]))

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]
