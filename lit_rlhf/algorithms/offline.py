"""The base of every algorithm that learns from fixed data: a user's loader of texts in, optimiser steps out."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.data.passes import END_OF_PASS, SeededPasses
from lit_rlhf.distributed import rank, split_batch, world_size
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy, disable_dropout
from lit_rlhf.models.reference import make_reference, require_same_reference
from lit_rlhf.rollout.philox import derive_seed


class MicroBatch(NamedTuple):
    """A tokenised batch, the input of one forward pass.

    Attributes:
        inputs: what the algorithm's ``loss`` takes: a batch type or a dict of tensors.
        terms: the number of terms that the loss is a mean over (target tokens, or pairs); at least 1, but 0 in a share
            of a batch that only keeps its process in step.
        sequences: texts in the batch.
        tokens: tokens in the batch, padding excluded.
        weight: factor of the loss, see ``WindowLoader``.
        source: the user's rows that it was made from.
        number: its place in the pass, from 1.
        part: 0 for a whole one, 1 and 2 for its halves.
    """

    inputs: Any
    terms: int
    sequences: int
    tokens: int
    weight: float = 1.0
    source: Any = None
    number: int = 0
    part: int = 0


class WindowLoader:
    """The train loader that the fit loop sees: the user's batches, tokenised and weighted, with a place to resume from.

    One ``iter()`` is what is left of one pass over the user's loader. Batches are fetched a window at a time, the
    ``micro_batches`` of one optimiser step, so that each can carry the weight

        terms of the batch * micro_batches * processes / terms of the window.

    The fit loop divides every loss by ``micro_batches`` and takes the mean over the processes, so the gradient is that
    of the mean over the window's terms, however the window is split. Each process gets its share of every batch's rows,
    and tokenises all of them, to count the terms. The fit loop also steps on the last batch of an epoch; that window
    may be shorter, and its weights are right all the same.

    Args:
        loader: the user's train loader.
        length: its number of batches.
        epoch_batches: how many of them are one epoch (``trainer.limit_train_batches``).
        micro_batches: the trainer's ``accumulate_grad_batches``.
        collate: a user's batch -> this process's share of it and the terms of the whole.
        seed: the run's seed.

    Raises:
        UserError: at iteration, the loader ends before ``length``.
    """

    def __init__(
        self,
        *,
        loader: Iterable[Any],
        length: int,
        epoch_batches: int,
        micro_batches: int,
        collate: Callable[[Any], tuple[MicroBatch, int]],
        seed: int,
    ) -> None:
        self.passes = SeededPasses(loader, seed)
        self.length = length
        self.epoch_batches = epoch_batches
        self.micro_batches = micro_batches
        self.collate = collate
        self.position = 0  # batches of the pass already handed out
        self.window: list[MicroBatch] = []  # of the optimiser step under way
        self._left = 0  # of them, not yet handed out

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.position >= self.epoch_batches:
            self._start_at(self.passes.number + 1, 0)
        while self.position < self.epoch_batches:
            if not self._left:
                self._fetch()
            self._left -= 1
            self.position += 1  # before the yield: a checkpoint made during the step resumes after it
            yield self.handed_out()[-1]

    def handed_out(self) -> list[MicroBatch]:
        """The micro-batches of the step under way, so far."""
        return self.window[: len(self.window) - self._left]

    def _fetch(self) -> None:
        window, whole = [], 0
        for number in range(self.position, min(self.position + self.micro_batches, self.epoch_batches)):
            batch = self.passes.next_batch()
            if batch is END_OF_PASS:
                raise UserError(f"the train dataloader has a length of {self.length}, but ended after {number} batches")
            own, terms = self.collate(batch)
            window.append(own._replace(number=number + 1))
            whole += terms
        scale = self.micro_batches * world_size() / whole
        self.window = [batch._replace(weight=batch.terms * scale) for batch in window]
        self._left = len(window)

    def _start_at(self, number: int, position: int) -> None:
        self.passes.load_state_dict({"number": number, "batch": position})
        self.position, self.window, self._left = position, [], 0

    def state_dict(self) -> dict[str, int]:
        return {"pass": self.passes.number, "position": self.position, "epoch_batches": self.epoch_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the place of ``state``: a window that was cut is fetched again, for its weights.

        Raises:
            UserError: the epoch of the checkpoint's run had another number of batches.
        """
        if state["epoch_batches"] != self.epoch_batches:
            raise UserError(
                f"the checkpoint belongs to a run with {state['epoch_batches']} batches an epoch, but here the train "
                f"dataloader gives {self.epoch_batches}. Resume with the same data and batch size."
            )
        handed_out = state["position"] % self.micro_batches
        self._start_at(state["pass"], state["position"] - handed_out)
        if handed_out and state["position"] < self.epoch_batches:
            self._fetch()
            self._left -= handed_out
        self.position = state["position"]


class OfflineAlgorithm(Algorithm):
    """Learns from batches of texts; one Lightning epoch is one pass over the train loader.

    A subclass gives ``collate`` and ``loss``. A row of metrics is written every ``log_every_n_steps`` optimiser steps,
    at the end of an epoch and of the run, and whenever validation ran (its metrics have the prefix ``val/``). A
    training metric in a row is a mean over everything since the row before. Dropout is active in training; its mask is
    a function of the seed and the place in the data, so a resumed run draws the same.

    Args:
        log_every_n_steps: optimiser steps from one row to the next.
        **common: see ``Algorithm``.
    """

    online = False

    def __init__(self, *, log_every_n_steps: int = 10, **common: Any) -> None:
        super().__init__(**common)
        if log_every_n_steps < 1:
            raise UserError(f"algorithm.log_every_n_steps must be at least 1, got {log_every_n_steps}")
        self.log_every_n_steps = log_every_n_steps
        self.loader: WindowLoader | None = None
        self._loader_state: dict[str, int] | None = None
        self.steps = 0
        self.sequences = 0
        self.tokens = 0
        self.rate = 0.0  # learning rate of the newest step
        self.awaits_validation = False  # the newest step's validation is still to come
        self.validation: dict[str, MeanMetric] = {}
        self.reference_id: str | None = None

    def anchor(self, policy: Policy) -> None:
        """Keeps ``policy`` as it is now as the reference, for a subclass that compares with it.

        Dropout is off from here on: policy and reference are compared token by token.
        """
        disable_dropout(policy)
        self.reference = make_reference(policy)
        self.reference_id = self.reference.fingerprint()

    # ---- what a subclass gives ------------------------------------------------------------------------------------

    def collate(self, batch: Any) -> MicroBatch:
        """A batch of the user's loader, checked and tokenised, on the CPU. Used for training and validation."""
        raise NotImplementedError

    def loss(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and metrics, each a mean over the terms of the MicroBatch."""
        raise NotImplementedError

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics that are functions of means, such as a perplexity."""
        return means

    def collate_share(self, batch: Any) -> tuple[MicroBatch, int]:
        """This process's share of a batch, which counts the sequences and tokens of the whole, and the whole's terms.

        A process without a row takes the first one's share, of which no term counts.
        """
        sources = split_batch(batch, world_size())
        parts = [rows if rows is None else self.collate(rows)._replace(source=rows) for rows in sources]
        there = [part for part in parts if part is not None]
        own = parts[rank()] or there[0]._replace(terms=0)
        whole = {name: sum(getattr(part, name) for part in there) for name in ("sequences", "tokens")}
        return own._replace(**whole), sum(part.terms for part in there)

    def export(self, folder: Path) -> None:
        """Writes the policy in Hugging Face format; every process must call it.

        Overridden where another model, or more than the policy, is trained.
        """
        self.policy.save(folder)

    # ---- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        self.sequences += batch.sequences
        self.tokens += batch.tokens
        return super().training_step(batch, batch_idx)

    def batch_loss(self, batch: MicroBatch, share: float = 1.0) -> Tensor:
        # Other processes have other rows, which are to have other dropout masks.
        process = [rank()] if rank() else []
        half = [world_size() + batch.part] if batch.part else []
        torch.manual_seed(derive_seed(self.seed, self.loader.passes.number, batch.number, *process, *half))
        loss, metrics = self.loss(batch.inputs)
        loss = self.guard.spoiled(loss, {})
        self.step_means.add({**metrics, "loss/total": loss.detach()}, batch.terms)
        return loss * batch.weight * share

    def step_batches(self) -> list[MicroBatch]:
        return [self.transfer_batch_to_device(batch, self.device, 0) for batch in self.loader.handed_out()]

    def rows_of(self, batch: MicroBatch) -> int:
        return len(next(iter(batch.source.values())))

    def halves_of(self, batch: MicroBatch) -> tuple[tuple[MicroBatch, float], ...]:
        halves = []
        for part, rows in enumerate(split_batch(batch.source, 2), start=1):
            half = self.collate(rows)
            own = half._replace(weight=batch.weight, source=rows, number=batch.number, part=part)
            halves.append((self.transfer_batch_to_device(own, self.device, 0), half.terms / batch.terms))
        return tuple(halves)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Counting is not in on_train_batch_end: a checkpoint callback's own hook of that name runs before the module's.
        self.rate = self.learning_rate
        super().optimizer_step(*args, **kwargs)
        self.steps += 1
        loop = self.trainer.fit_loop
        self.awaits_validation = loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and self._validates
        due = self.steps % self.log_every_n_steps == 0 or self.loader.position >= self.loader.epoch_batches
        if due and not self.awaits_validation:
            self.write_row()

    @property
    def _validates(self) -> bool:
        return self.trainer.enable_validation and sum(self.trainer.num_val_batches) > 0

    def write_row(self, validation: dict[str, float] | None = None) -> None:
        row = {**self.derived(self.means.compute()), "optim/lr": self.rate}
        row["optim/skipped_steps"] = self.guard.take_skipped()
        self.log_row({**row, **(validation or {})})

    def on_train_end(self) -> None:
        if self.means.sums:  # the run ends within an epoch
            self.write_row()

    # ---- validation -----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Measures a batch; those of several validation loaders count together."""
        micro = self.transfer_batch_to_device(self.collate_share(batch)[0], self.device, 0)
        loss, metrics = self.loss(micro.inputs)
        for name, value in {**metrics, "loss/total": loss}.items():
            self.validation.setdefault(name, MeanMetric().to(self.device)).update(value, micro.terms)

    def on_validation_epoch_end(self) -> None:
        metrics = self.derived({name: float(metric.compute()) for name, metric in self.validation.items()})
        self.validation = {}
        if self.trainer.sanity_checking or not metrics:
            return
        self.awaits_validation = False
        row = {f"val/{name}": value for name, value in metrics.items()}
        self.write_row(row) if self.trainer.state.fn == "fit" else self.log_row(row)

    # ---- Lightning ------------------------------------------------------------------------------------------------

    @property
    def axes(self) -> dict[str, int]:
        return {"iteration": self.steps, "episode": self.sequences, "tokens": self.tokens}

    @property
    def within_epoch(self) -> bool:
        return self.loader is not None and 0 < self.loader.position < self.loader.epoch_batches

    def steps_per_epoch(self) -> int:
        return math.ceil(self.window_loader().epoch_batches / self.trainer.accumulate_grad_batches)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.take_over_loader()
            self.loader = None
            self.train()  # transformers loads models in eval mode, without dropout

    def train_dataloader(self) -> WindowLoader:
        return self.window_loader()

    def window_loader(self) -> WindowLoader:
        """The train loader, made at its first use in a fit: the scheduler asks for its length before the fit loop does.

        Raises:
            UserError: the user's loader has no length, or is empty.
        """
        if self.loader is None:
            loader = self.user_loader()
            length = _length(loader)
            limit = self.trainer.limit_train_batches
            self.loader = WindowLoader(
                loader=loader,
                length=length,
                epoch_batches=min(length, limit) if isinstance(limit, int) else int(length * limit),
                micro_batches=self.trainer.accumulate_grad_batches,
                collate=self.collate_share,
                seed=self.seed,
            )
            if self._loader_state is not None:
                self.loader.load_state_dict(self._loader_state)
                self._loader_state = None
        return self.loader

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.awaits_validation:  # the checkpoint was made between a step and its validation
            self.run_validation()
        self.catch_up()

    def state(self) -> dict[str, Any]:
        return {
            "loader": None if self.loader is None else self.loader.state_dict(),
            "steps": self.steps,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "rate": self.rate,
            "awaits_validation": self.awaits_validation,
            "reference": self.reference_id,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        require_same_reference(state.get("reference"), self.reference_id)
        self._loader_state = state["loader"]
        self.steps, self.sequences, self.tokens = state["steps"], state["sequences"], state["tokens"]
        self.rate, self.awaits_validation = state["rate"], state["awaits_validation"]


def _length(loader: Any) -> int:
    try:
        length = len(loader)
    except TypeError as error:
        raise UserError(
            f"the train dataloader ({type(loader).__name__}) has no length, so the place to resume from is unknown; "
            "give its dataset a __len__"
        ) from error
    if length == 0:
        raise UserError(
            "the train dataloader yields no batches: the dataset is empty, or smaller than a batch with drop_last"
        )
    return length
