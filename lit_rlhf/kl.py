"""The penalty on the KL to the reference: how much it counts, by which estimate, and where it is charged."""

import math

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.schedule import linear

#: Where a penalty is charged, and the estimates that are right there.
PLACES = {
    "reward": ("k1", "k2", "k3", "abs", "full"),
    "loss": ("k2", "k3", "k3_st", "full"),
}
_UNFIT = {
    "k1": "its gradient has mean zero",
    "abs": "its gradient is no KL's",
    "k3_st": "it differs from k3 in its gradient alone",
}


class KLPenalty:
    """What all penalties share.

    Args:
        estimator: an estimate of the KL per token: "k1", "k2", "k3", "abs" or, in the loss, "k3_st"
            (``functional.kl_estimate``); or "full", the exact sum over the vocabulary (``functional.full_kl``), which
            keeps the logits of a minibatch and its reference in memory.
        place: "reward" takes ``coef * KL`` from each token's reward (stage 4; InstructGPT). "loss" adds the mean of
            ``coef * KL`` over tokens to the loss (stage 7; GRPO, arXiv:2402.03300, eq. 3). There k1 is refused, whose
            gradient has mean zero, and abs, whose gradient is no KL's.
        budget: once an iteration's KL per completion exceeds this, in nats, the run stops after it; None never stops.

    Raises:
        UserError: an unknown place, an estimator that is unknown or wrong there, or a budget that is not positive.
    """

    coef: float

    def __init__(self, *, estimator: str = "k1", place: str = "reward", budget: float | None = None) -> None:
        if place not in PLACES:
            raise UserError(f"kl.place must be one of {', '.join(PLACES)}, got {place!r}")
        if estimator not in PLACES[place]:
            why = f" ({_UNFIT[estimator]})" if estimator in _UNFIT else ""
            raise UserError(
                f"kl.estimator={estimator!r} cannot be used with kl.place={place}{why}; choose one of "
                f"{', '.join(PLACES[place])}"
            )
        self.estimator = estimator
        self.in_loss = place == "loss"
        self.scale = 1.0  # of the coefficient; what has raised it in the run so far
        self.budget = None if budget is None else check_number("kl.budget", budget, above=0)

    def at(self, progress: float) -> float:  # noqa: ARG002 - only a schedule reads it
        """The coefficient at ``progress``, the share of the run that is done."""
        return self.scale * self.coef

    def raise_by(self, factor: float) -> None:
        """Multiplies the coefficient by ``factor`` for the rest of the run, also after a resume.

        A schedule goes on times the factor, an adaptive coefficient follows its target from there.
        """
        self.scale *= factor

    def update(self, kl: float, episodes: int) -> None:
        """Called after each iteration with its mean KL per episode, in nats, and its number of episodes."""

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """On resume the config's coefficient holds, times what had raised it."""
        self.scale = state.get("scale", 1.0)


class FixedKL(KLPenalty):
    """A constant coefficient.

    Args:
        coef: weight of the KL, >= 0, in reward (or loss) per nat.
        estimator, place, budget: see ``KLPenalty``.

    Raises:
        UserError: ``coef`` is negative or not finite; or as in ``KLPenalty``.
    """

    def __init__(
        self, *, coef: float = 0.05, estimator: str = "k1", place: str = "reward", budget: float | None = None
    ) -> None:
        super().__init__(estimator=estimator, place=place, budget=budget)
        self.coef = check_number("kl.coef", coef, at_least=0)


class NoKL(KLPenalty):
    """No penalty. The KL is still measured, and the budget still holds."""

    coef = 0.0

    def __init__(self, *, estimator: str = "k1", budget: float | None = None) -> None:
        super().__init__(estimator=estimator, budget=budget)


class LinearKL(KLPenalty):
    """A coefficient that goes in a straight line from the start to the end of the run.

    Args:
        start: the coefficient at progress 0, >= 0, in reward per nat.
        end: the coefficient at progress 1, >= 0.
        estimator, place, budget: see ``KLPenalty``.

    Raises:
        UserError: a coefficient is negative or not finite; or as in ``KLPenalty``.

    >>> LinearKL(start=0.2, end=0.1).at(progress=0.5)
    0.15000000000000002
    """

    def __init__(
        self,
        *,
        start: float,
        end: float,
        estimator: str = "k1",
        place: str = "reward",
        budget: float | None = None,
    ) -> None:
        super().__init__(estimator=estimator, place=place, budget=budget)
        self.start = check_number("kl.start", start, at_least=0)
        self.end = check_number("kl.end", end, at_least=0)

    def at(self, progress: float) -> float:
        return self.scale * linear(self.start, self.end, progress)


class AdaptiveKL(KLPenalty):
    """A coefficient that follows a target KL (Ziegler et al., arXiv:1909.08593, section 2.2).

    After each iteration of ``n`` episodes: ``e = clip(KL / target - 1, -0.2, 0.2)`` and
    ``coef <- coef (1 + e n / horizon)``; ``n / horizon`` is the paper's K_beta (there 0.1).

    Args:
        init_coef: the first coefficient, > 0 (from 0 it could never grow), in reward per nat.
        target: KL per episode to hold, > 0, in nats.
        horizon: episodes in which the coefficient changes by the factor that ``e`` says, > 0.
        estimator, place, budget: see ``KLPenalty``.

    Raises:
        UserError: a number is out of its range or not finite; or as in ``KLPenalty``.

    >>> kl = AdaptiveKL(init_coef=0.2, target=6.0, horizon=10_000)
    >>> kl.update(kl=60.0, episodes=1_000)  # far above the target: 2 % up
    >>> round(kl.coef, 6)
    0.204
    """

    def __init__(
        self,
        *,
        init_coef: float = 0.2,
        target: float = 6.0,
        horizon: float = 10_000,
        estimator: str = "k1",
        place: str = "reward",
        budget: float | None = None,
    ) -> None:
        super().__init__(estimator=estimator, place=place, budget=budget)
        self.coef = check_number("kl.init_coef", init_coef, above=0)
        self.target = check_number("kl.target", target, above=0)
        self.horizon = check_number("kl.horizon", horizon, above=0)

    def update(self, kl: float, episodes: int) -> None:
        """Move the coefficient after an iteration.

        Args:
            kl: mean KL per episode, measured with ``estimator``, in nats.
            episodes: episodes of the iteration.

        Raises:
            UserError: ``episodes`` reaches 5 horizons, where one step could make the coefficient 0 or
                negative; or ``kl`` is not finite, which would stay in the coefficient for good.
        """
        if episodes >= 5 * self.horizon:
            raise UserError(
                f"kl.horizon={self.horizon:g} is too short for {episodes} episodes per iteration: "
                f"one step could turn the coefficient negative. Set it above {episodes / 5:g}."
            )
        if not math.isfinite(kl):
            raise UserError(f"The measured KL is {kl}: the policy's log-probabilities have become non-finite.")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {**super().state_dict(), "coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.coef = state["coef"]
