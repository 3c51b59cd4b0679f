"""Work that ran out of memory is done again in halves: once for each stage of a run."""

import gc
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from lit_rlhf.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
#: stage -> the config keys that make it take less memory
REMEDIES = {
    "rollout": "sampler.chunk_size",
    "anchor": "algorithm.minibatch_size of a new run",
    "update": "policy.gradient_checkpointing=true or, in a new run, trainer.accumulate_grad_batches or data.batch_size",
    "score": "reward.batch_size",
}
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class OutOfMemory(UserError):
    """Memory ran out, and halves would not help: what takes less is for the user to choose."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is a GPU's or the CPU allocator's lack of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class Halving:
    """Remembers which stages work in halves from now on.

    >>> halving = Halving()
    >>> def work(rows):
    ...     if rows > 4:
    ...         raise MemoryError
    ...     return rows
    >>> halving.run("rollout", 7, work), halving.size("rollout", 7), halving.size("update", 7)
    (4, 4, 7)
    """

    def __init__(self) -> None:
        self.stages: set[str] = set()

    def size(self, stage: str, full: int) -> int:
        """Rows that the stage takes at once where it would take ``full``."""
        return -(-full // 2) if stage in self.stages else full

    def run(self, stage: str, full: int, work: Callable[[int], T], *, allowed: bool = True) -> T:
        """``work(rows)``; where it runs out of memory it is done anew with half the rows, for the rest of the run.

        Raises:
            OutOfMemory: it runs out of memory with half of them as well, or with one, or may not be retried.
        """
        while True:
            try:
                return work(self.size(stage, full))
            except (RuntimeError, MemoryError) as error:
                self.halve(error, stage, full, allowed=allowed)  # raises the second time
            free()  # not within the except: there the error's frames hold what is to be freed

    def halve(self, error: Exception, stage: str, full: int, *, unit: int = 1, allowed: bool = True) -> None:
        """Lets the stage work in halves because of ``error``.

        Args:
            error: what was raised.
            stage: one of ``REMEDIES``.
            full: rows that it takes at once when it is not halved.
            unit: rows that stay together.
            allowed: whether this process can work in halves while the others do not.

        Raises:
            OutOfMemory: it does so already, or there is nothing to halve. Another error than a lack of memory is raised
                as it is.
        """
        if not out_of_memory(error):
            raise error
        rows, said = self.size(stage, full), (str(error).splitlines() or [repr(error)])[0]
        if stage in self.stages or full <= unit or not allowed:
            raise OutOfMemory(
                f"out of memory in stage '{stage}' with {rows} rows at once: {said}. Set {REMEDIES[stage]} so that it "
                "takes less"
            ) from error
        self.stages.add(stage)
        log.warning(
            "out of memory in stage '%s' with %d rows at once: %s. From now on it takes %d; set %s to begin so",
            stage, full, said, self.size(stage, full), REMEDIES[stage],
        )  # fmt: skip

    def state(self) -> list[str]:
        return sorted(self.stages)

    def load_state(self, stages: Iterable[str]) -> None:
        self.stages = set(stages)


def free() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
