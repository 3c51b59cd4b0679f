"""Repeatable passes over a user's own loader, with a place to resume from."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lit_rlhf.errors import UserError
from lit_rlhf.generators import get_generators, seed_generators, set_generators
from lit_rlhf.rollout.philox import derive_seed

log = logging.getLogger(__name__)

END_OF_PASS = object()


class SeededPasses:
    """Endless batches of ``loader``: pass after pass, each under random generators seeded from (seed, pass).

    A ``DataLoader(shuffle=True)`` draws its order from the global generator. Here every pass starts that generator from
    (seed, pass) and the outside keeps its own state, so the order is the same in every run with this seed, and a
    resumed run reaches the old place by skipping ``batch`` batches of pass ``number``. It warns if they are not
    what they were.

    Args:
        loader: any iterable of batches that can be iterated again.
        seed: the run's seed.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self.loader = loader
        self.seed = seed
        self.number = 0  # the pass
        self.batch = 0  # batches of it already handed out
        self._iterator: Iterator[Any] | None = None
        self._generators: Any = None
        self._drawn = [0, ""]  # batches drawn of this pass, and a hash of them all
        self._expected: list[Any] | None = None  # the same of a checkpoint, until as many are drawn again

    def one_pass(self) -> Iterator[Any]:
        """The batches that are left of the current pass; afterwards the next pass is current.

        Raises:
            UserError: the loader yields nothing.
        """
        while (batch := self.next_batch()) is not END_OF_PASS:
            yield batch

    def next_batch(self) -> Any:
        """The next batch, or END_OF_PASS once after each pass."""
        batch = self.draw()
        if batch is END_OF_PASS:
            if self.batch == 0:
                raise UserError(
                    "the train dataloader yields no batches: the dataset is empty"
                    if self.number == 0
                    else f"the train dataloader yields nothing in pass {self.number + 1}: it must be possible to "
                    "iterate over it again, as over a list or a DataLoader, and not once, as over a generator"
                )
            self.number, self.batch, self._iterator = self.number + 1, 0, None
            self._drawn = [0, ""]
        else:
            self.batch += 1
            self._note(batch)
        return batch

    def draw(self) -> Any:
        """A batch of the current pass, or END_OF_PASS."""
        with self._own_generators():
            if self._iterator is None:
                self._start()
            return next(self._iterator, END_OF_PASS)

    def _start(self) -> None:
        seed = derive_seed(self.seed, self.number)
        seed_generators(seed)
        for part in _parts(self.loader):  # a generator of the loader's own would go on from wherever it is
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(seed)
        if isinstance(self.loader, DataLoader):
            self.loader._iterator = None  # of persistent workers: it draws less than a new one, such as a resume makes
        self._iterator = iter(self.loader)
        self._drawn = [0, ""]
        for number in range(self.batch):
            if (batch := next(self._iterator, END_OF_PASS)) is END_OF_PASS:
                raise UserError(
                    f"the checkpoint was made at batch {self.batch} of a pass over the train dataloader, which ends "
                    f"after {number} now. Resume with the same data and batch size."
                )
            self._note(batch)

    def _note(self, batch: Any) -> None:
        self._drawn = [self._drawn[0] + 1, digest(batch, self._drawn[1])]
        if self._expected is not None and self._drawn[0] == self._expected[0]:
            if self._drawn != self._expected:
                log.warning(
                    "the data has changed since the checkpoint was written: the first %d batches of pass %d over the "
                    "train dataloader are not what they were. The run goes on, but not as it would have done",
                    self._drawn[0],
                    self.number + 1,
                )
            self._expected = None

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """Swaps the global generators for the pass's own while a batch is drawn."""
        outside = get_generators()
        if self._generators is not None:
            set_generators(self._generators)
        try:
            yield
        finally:
            self._generators = get_generators()
            set_generators(outside)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "batch": self.batch, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.batch, self._iterator = state["number"], state["batch"], None
        self._drawn = state.get("drawn", [0, ""])
        self._expected = self._drawn if self._drawn[0] else None


class SamePass:
    """``loader``, with the batches of its first seeded pass whenever it is iterated over.

    Completions of held-out prompts can only be compared if the prompts come in the same order each time.
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self.loader = loader
        self.seed = seed

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        passes = SeededPasses(self.loader, self.seed)
        while (batch := passes.draw()) is not END_OF_PASS:
            yield batch


@dataclass
class HeldOutSource(_DataLoaderSource):
    """Where a user's validation loaders come from, each of them in a ``SamePass``."""

    seed: int

    def dataloader(self) -> CombinedLoader:
        loaders = super().dataloader()
        loaders = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
        loaders.flattened = [self._same(loader) for loader in loaders.flattened]
        return loaders

    def _same(self, loader: Any) -> Any:
        if isinstance(loader, list | SamePass) or not isinstance(loader, Iterable):  # Lightning says what is no loader
            return loader
        return SamePass(loader, self.seed)


def digest(batch: Any, before: str = "") -> str:
    """A hash of the texts and numbers in a batch, whatever holds them, and of the hash ``before``.

    Of other things their kind counts.

    >>> digest({"prompt": ["a"], "n": torch.tensor([1])}) == digest({"prompt": ("a",), "n": [1]})
    True
    """
    content = before + json.dumps(batch, default=_plain, skipkeys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _plain(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return dict(thing)
    return thing.tolist() if hasattr(thing, "tolist") else type(thing).__qualname__


def _parts(loader: Any) -> Iterator[Any]:
    """A DataLoader and its samplers, each of which may draw from a generator of its own."""
    yield loader
    for name in ("sampler", "batch_sampler"):
        if (part := getattr(loader, name, None)) is not None:
            yield from _parts(part)
