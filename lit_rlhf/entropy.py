"""Weight c2 of the entropy bonus (PPO, arXiv:1707.06347, eq. 9), as a function of the training's progress."""

from lit_rlhf.checks import check_number


class ConstantEntropy:
    """The same weight throughout.

    Args:
        coef: >= 0, in loss per nat.

    Raises:
        UserError: ``coef`` is negative or not finite.
    """

    def __init__(self, *, coef: float = 0.01):
        self.coef = check_number("entropy.coef", coef, at_least=0)

    def at(self, progress: float) -> float:  # noqa: ARG002 - constant
        """The weight, the same at any ``progress`` (0 the start, 1 the end of training)."""
        return self.coef


class NoEntropy(ConstantEntropy):
    """No bonus. The entropy is still measured."""

    def __init__(self) -> None:
        super().__init__(coef=0.0)


class LinearEntropy:
    """A weight that goes in a straight line from the start to the end of training.

    Args:
        start: the weight at progress 0, >= 0, in loss per nat.
        end: the weight at progress 1, >= 0, in loss per nat.

    Raises:
        UserError: a weight is negative or not finite.

    >>> LinearEntropy(start=0.02, end=0.0).at(progress=0.5)
    0.01
    """

    def __init__(self, *, start: float, end: float):
        self.start = check_number("entropy.start", start, at_least=0)
        self.end = check_number("entropy.end", end, at_least=0)

    def at(self, progress: float) -> float:
        """The weight at ``progress``, which runs from 0 to 1.

        Raises:
            ValueError: ``progress`` lies outside [0, 1], where the line would go on beyond ``end``.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress} must lie in [0, 1]")
        return self.start + (self.end - self.start) * progress
