"""An iteration's rollout, tried again where a reward fails: without the batch, or after a stop that loses nothing."""

import copy
import logging
from typing import Any

from lit_rlhf.batch import Experience
from lit_rlhf.distributed import gather, rank
from lit_rlhf.rewards.failure import RewardFailure
from lit_rlhf.rollout.loader import RolledBack, RolloutLoader

log = logging.getLogger(__name__)

#: Batches in a row that are left out at most.
MOST_SKIPPED = 5


class ScoreError(Exception):
    """Carries what a reward raised, a mistake in its code, past everything that handles other errors."""


class PatientLoader(RolloutLoader):
    """A RolloutLoader whose rollouts may fail in their rewards, or be taken back by a callback.

    A failure with ``on_failure: skip_batch`` drops the completions, and the iteration is made of the next prompts, with
    the same random numbers. Any other one, and the last of ``MOST_SKIPPED`` in a row, ends the run. The checkpoint that
    is written first holds nothing of the iteration: the prompts are those it began with.

    Args:
        algorithm: the online algorithm whose loader this is.
        **loader: see ``RolloutLoader``.
    """

    def __init__(self, *, algorithm: Any, **loader: Any) -> None:
        super().__init__(**loader)
        self.algorithm = algorithm

    def new_experience(self) -> Experience:
        self.algorithm.call_hook("on_rollout_start")
        before = copy.deepcopy(self.algorithm.state())
        skipped = 0
        while True:
            try:
                experience = super().new_experience()
            except RolledBack:
                return self.new_experience()
            except RewardFailure as failure:
                skipped += 1
                if not failure.skips or skipped == MOST_SKIPPED:
                    given_up = f" ({skipped} batches in a row)" if failure.skips else ""
                    raise RewardFailure(f"{failure}{given_up}. {self._saved(before)}") from failure
                log.warning(
                    "iteration %d: the batch is left out, the next prompts take its place (%d of at most %d in a row): "
                    "%s", self.iteration + 1, skipped, MOST_SKIPPED - 1, failure,
                )  # fmt: skip
            except ScoreError as error:
                cause = error.__cause__
                cause.add_note(self._saved(before))
                raise cause from None
            else:
                self.algorithm.pending["rollout/skipped_batches"] = float(skipped)
                return experience

    def _saved(self, before: dict[str, Any]) -> str:
        self.algorithm.load_state(before)
        self.load_state_dict(before["loader"])
        return self.algorithm.save_state()


def raise_together(error: Exception | None) -> None:
    """Raises in every process what the scoring of any of them raised; all of them must call this.

    Raises:
        RewardFailure: scores are missing; the batch is skipped only if every process that failed would skip it.
        ScoreError: from what the reward of this process raised by mistake.
    """
    failure = isinstance(error, RewardFailure)
    told = f"{error}" if failure else f"process {rank()}: {type(error).__name__}: {error}"
    all_told = [part for part in gather(None if error is None else (told, failure and error.skips)) if part]
    if error is not None and not failure:
        raise ScoreError from error
    if all_told:
        raise RewardFailure(all_told[0][0], skips=all(skips for _, skips in all_told)) from error
