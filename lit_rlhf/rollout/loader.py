"""Stage 6: the loader that the fit loop iterates. One pass = one iteration: a rollout phase, then its minibatches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lit_rlhf.batch import Experience
from lit_rlhf.data.tokenize import PromptRows, Row
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.philox import derive_seed

PROCESSES = "the number of processes (trainer.devices * trainer.num_nodes)"


class RolledBack(Exception):
    """A callback has put the run back to an earlier iteration's beginning: the rollout under way is void."""


def exact_div(number: int, divisor: int, number_name: str, divisor_name: str) -> int:
    """``number / divisor`` where it divides.

    >>> exact_div(32, 8, "rollout_batch_size", "minibatch_size")
    4
    """
    if divisor < 1 or number < 1 or number % divisor:
        raise UserError(f"{number_name}={number} is not divisible by {divisor_name}={divisor}")
    return number // divisor


class RolloutLoader:
    """Turns prompts into experience and hands it out in shuffled micro-batches, ``epochs`` times over.

    Each ``iter()`` is one iteration: ``collect`` makes the experience of ``rollout_batch_size`` prompts (stages 1 to
    5). It is cut into minibatches (one optimiser step each) and those into micro-batches (one forward pass each). The
    order of epoch k of iteration i is a function of (seed, i, k). It is a plain sized iterable, not a ``DataLoader``,
    because Lightning fetches a batch ahead from an unsized one, and the rollout would be one step stale.

    Of several processes each hands out its share of every micro-batch, of the same experience.

    Every micro-batch carries its weight, n_micro * micro-batches * processes / n_minibatch in tokens: the fit loop
    divides the loss by the number of micro-batches and takes the mean of the processes' gradients, so the gradient is
    that of the minibatch's mean over tokens, however it is split.

    Args:
        prompts: where prompts come from.
        collect: (iteration, rows) -> Experience on the CPU.
        rollout_batch_size: completions of one iteration.
        experience_size: those that ``collect`` keeps to learn from; None is all.
        minibatch_size: completions of one optimiser step.
        micro_batches: forward passes of one optimiser step (the trainer's ``accumulate_grad_batches``).
        epochs: passes over the experience.
        unit: rows next to each other in the experience that stay together, such as the two of a pair.
        seed: the run's seed.
        rank, world: the number of this process, and of all.
    """

    def __init__(
        self,
        *,
        prompts: PromptRows,
        collect: Callable[[int, list[Row]], Experience],
        rollout_batch_size: int,
        minibatch_size: int,
        micro_batches: int,
        epochs: int,
        seed: int,
        experience_size: int | None = None,
        unit: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.experience_size = experience_size or rollout_batch_size
        self.minibatches = exact_div(
            self.experience_size, minibatch_size, "algorithm.rollout_batch_size", "algorithm.minibatch_size"
        )
        self.micro_batch_size = exact_div(
            minibatch_size, micro_batches, "algorithm.minibatch_size", "trainer.accumulate_grad_batches"
        )
        micro = "algorithm.minibatch_size / trainer.accumulate_grad_batches"
        exact_div(self.micro_batch_size, unit, micro, "the rows that stay together")
        exact_div(self.micro_batch_size // unit, world, micro if unit == 1 else f"{micro} / {unit}", PROCESSES)
        self.unit = unit
        self.rank, self.world = rank, world
        self.prompts = prompts
        self.collect = collect
        self.rollout_batch_size = rollout_batch_size
        self.minibatch_size = minibatch_size
        self.micro_batches = micro_batches
        self.epochs = epochs
        self.seed = seed
        self.iteration = 0  # the iteration that the buffer belongs to
        self.position = 0  # micro-batches of it already handed out
        self.experience: Experience | None = None  # None between iterations

    def __len__(self) -> int:
        return self.epochs * self.minibatches * self.micro_batches

    def __iter__(self) -> Iterator[Experience]:
        if self.experience is None:
            self.experience = self.new_experience()
            self.position = 0
        while self.experience is not None and self.position < len(self):
            batch = self._micro_batch(self.position)
            self.position += 1  # before the yield: a checkpoint made during the step resumes after it
            yield batch

    def new_experience(self) -> Experience:
        """Stages 1 to 5 with the next prompts."""
        return self.collect(self.iteration, self.prompts.draw(self.rollout_batch_size))

    def _micro_batch(self, position: int) -> Experience:
        step, micro = divmod(position, self.micro_batches)
        epoch, minibatch = divmod(step, self.minibatches)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.iteration, epoch))
        order = torch.randperm(self.experience_size // self.unit, generator=generator)
        units = order[minibatch * self.minibatch_size // self.unit :][: self.minibatch_size // self.unit]
        # Rows of similar length share a micro-batch, so that trimming removes more; the minibatch is the same set.
        lengths = self.experience.response_mask.sum(-1).reshape(-1, self.unit).amax(-1)
        units = units[lengths[units].argsort(stable=True)]
        part = units[micro * self.micro_batch_size // self.unit :][: self.micro_batch_size // self.unit]
        part = part[self.rank :: self.world]
        rows, part = ((u.unsqueeze(1) * self.unit + torch.arange(self.unit)).flatten() for u in (units, part))
        tokens = self.experience.response_mask[rows].sum()
        share = self.experience.response_mask[part].sum() * self.micro_batches * self.world / tokens
        batch = self.experience[part].trim()
        return Experience(**{**vars(batch), "weight": share.float()})

    def step_batches(self) -> list[Experience]:
        """The micro-batches handed out so far of the optimiser step under way."""
        first = (self.position - 1) // self.micro_batches * self.micro_batches
        return [self._micro_batch(position) for position in range(first, self.position)]

    def finish(self) -> None:
        """Ends the iteration: its experience is dropped, the next ``iter()`` makes a new rollout."""
        self.experience = None
        self.position = 0
        self.iteration += 1

    def stop(self) -> None:
        """Hands out nothing more of this iteration (early stop on the target KL)."""
        self.position = len(self)

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.state_dict(),
            "iteration": self.iteration,
            "position": self.position,
            "experience": None if self.experience is None else dict(vars(self.experience)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.iteration, self.position = state["iteration"], state["position"]
        self.experience = None if state["experience"] is None else Experience(**state["experience"])
