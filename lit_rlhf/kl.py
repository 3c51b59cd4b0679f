"""KL controllers: how strongly the policy is held to its reference, by which estimate of the KL."""

import math

from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError
from lit_rlhf.functional import KL_ESTIMATORS


class FixedKL:
    """A constant coefficient.

    Args:
        coef: weight of the KL, >= 0, in reward per nat.
        estimator: "k1", "k2", "k3" or "abs" (``functional.kl_estimate``).

    Raises:
        UserError: ``coef`` is negative or not finite, or the estimator is unknown.
    """

    def __init__(self, *, coef: float = 0.05, estimator: str = "k1"):
        self.coef = check_number("kl.coef", coef, at_least=0)
        self.estimator = _known(estimator)

    def update(self, kl: float, episodes: int) -> None:
        """Does nothing: the coefficient stays."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to load: on resume the config's coefficient holds."""


class NoKL(FixedKL):
    """No penalty. The KL is still measured, with k1."""

    def __init__(self) -> None:
        super().__init__(coef=0.0)


class AdaptiveKL:
    """A coefficient that follows a target KL (Ziegler et al., arXiv:1909.08593, section 2.2).

    After each iteration of ``n`` episodes: ``e = clip(KL / target - 1, -0.2, 0.2)`` and
    ``coef <- coef (1 + e n / horizon)``; ``n / horizon`` is the paper's K_beta (there 0.1).

    Args:
        init_coef: the first coefficient, > 0 (from 0 it could never grow), in reward per nat.
        target: KL per episode to hold, > 0, in nats.
        horizon: episodes in which the coefficient changes by the factor that ``e`` says, > 0.
        estimator: "k1", "k2", "k3" or "abs" (``functional.kl_estimate``).

    Raises:
        UserError: a number is out of its range or not finite, or the estimator is unknown.

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
    ):
        self.coef = check_number("kl.init_coef", init_coef, above=0)
        self.target = check_number("kl.target", target, above=0)
        self.horizon = check_number("kl.horizon", horizon, above=0)
        self.estimator = _known(estimator)

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
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def _known(estimator: str) -> str:
    if estimator not in KL_ESTIMATORS:
        raise UserError(f"kl.estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")
    return estimator
