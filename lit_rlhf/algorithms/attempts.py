"""Batches whose reward fails: they are left out, or the run stops and loses nothing."""

import copy
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from lit_rlhf.batch import Experience
from lit_rlhf.distributed import gather, rank
from lit_rlhf.rewards.failure import RewardFailure
from lit_rlhf.rollout.loader import RolledBack, RolloutLoader

log = logging.getLogger(__name__)

#: Batches in a row that are left out at most, by ``on_failure: skip_batch``.
MOST_SKIPPED = 5


class ScoreError(Exception):
    """Carries what a reward raised, a mistake in its code, past everything that handles other errors."""


class Patience:
    """Counts batches in a row whose reward failed, and says when there are too many.

    Args:
        most_spoiled: with scores that are not finite, of a reward that says nothing of failures.
    """

    def __init__(self, most_spoiled: int) -> None:
        self.most_spoiled = most_spoiled
        self.in_a_row = 0

    def leave_out(self, error: RewardFailure | ScoreError, where: str, save: Callable[[], str]) -> None:
        """Goes on without the batch that ``error`` is about, and warns of it, or ends the run.

        All processes come here with an error each, and all of them stay or go.

        Args:
            error: what ``raise_together`` raised.
            where: the place in the run.
            save: writes a checkpoint, and says so, or nothing.

        Raises:
            RewardFailure: ``error``, if its batch cannot be left out or is the last that may fail in a row.
            Exception: what the reward raised by mistake.
        """
        if isinstance(error, ScoreError):
            _give_up(error.__cause__, save)
        self.in_a_row += 1
        most = self.most_spoiled if error.spoiled else MOST_SKIPPED
        count = f"{self.in_a_row} batches in a row"
        if not error.skips or self.in_a_row >= most:
            limit = f", algorithm.max_skipped_steps={most}" if error.spoiled else ""
            told = f"{error} ({count}{limit})" if error.skips else str(error)
            raise RewardFailure(". ".join(filter(None, [f"{where}: {told}", save()]))) from error
        log.warning("%s: the batch is left out (%d of at most %d in a row): %s", where, self.in_a_row, most - 1, error)

    def reset(self) -> None:
        """Called after a batch that has scores."""
        self.in_a_row = 0


def _give_up(mistake: BaseException, save: Callable[[], str]) -> NoReturn:
    if said := save():
        mistake.add_note(said)
    raise mistake from None


class PatientLoader(RolloutLoader):
    """A RolloutLoader whose rollouts may fail in their rewards, or be taken back by a callback.

    A failure that ``Patience`` bears drops the completions, and the iteration is made of the next prompts, with the
    same random numbers. Any other one ends the run. The checkpoint that is written first holds nothing of the
    iteration: the prompts are those it began with.

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
        patience = Patience(self.algorithm.guard.limit)
        while True:
            try:
                experience = super().new_experience()
            except RolledBack:
                return self.new_experience()
            except (RewardFailure, ScoreError) as error:
                patience.leave_out(error, f"iteration {self.iteration + 1}", lambda: self._saved(before))
            else:
                self.algorithm.pending["rollout/skipped_batches"] = float(patience.in_a_row)
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
    own = None if error is None else (told, failure and error.skips, failure and error.spoiled)
    all_told = [part for part in gather(own) if part]
    if error is not None and not failure:
        raise ScoreError from error
    if all_told:
        texts, skips, spoiled = zip(*all_told, strict=True)
        raise RewardFailure(texts[0], skips=all(skips), spoiled=all(spoiled)) from error
