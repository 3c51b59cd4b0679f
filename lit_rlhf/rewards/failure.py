"""What becomes of a batch that a reward has no scores for."""

from types import TracebackType
from typing import Any

from lit_rlhf.errors import UserError

ON_FAILURE = ("stop", "skip_batch")


class RewardFailure(UserError):
    """A reward gave no usable scores, for good: whatever it does to try again it has done.

    Attributes:
        skips: whether the run may go on without the batch: ``on_failure: skip_batch``, or ``spoiled``.
        spoiled: whether a score was NaN or infinite, and the reward does not say by ``on_failure`` what is to happen.
    """

    def __init__(self, message: str, *, skips: bool = False, spoiled: bool = False) -> None:
        super().__init__(message)
        self.skips = skips
        self.spoiled = spoiled


class NotFinite(UserError):
    """A score is NaN or infinite."""


def check_on_failure(value: str) -> str:
    """``value``, if it is one of ``ON_FAILURE``; raises UserError if not."""
    if value not in ON_FAILURE:
        raise UserError(f"reward.on_failure must be one of {', '.join(ON_FAILURE)}, got {value!r}")
    return value


def sample_in_hand(traceback: TracebackType | None, completions: list[str]) -> int | None:
    """The number of the completion that a variable held where an exception was raised, or None.

    A reward gets a whole batch; which of it was under way can only be seen in the frames of the reward's own code,
    the innermost first.
    """
    numbers = {id(text): number for number, text in reversed(list(enumerate(completions)))}
    frames: list[dict[str, Any]] = []
    while traceback is not None:
        frames.append(traceback.tb_frame.f_locals)
        traceback = traceback.tb_next
    for variables in reversed(frames):
        for value in variables.values():
            if isinstance(value, str) and id(value) in numbers:
                return numbers[id(value)]
    return None
