"""The global random generators, which users' own code draws from: datasets that shuffle, rewards that sample."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_generators() -> tuple[Any, ...]:
    """The states of torch's (CPU, and CUDA's where it is in use), numpy's and Python's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda


def set_generators(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    if states[3] is not None and torch.cuda.is_available():  # a checkpoint may come from a machine with a GPU
        torch.cuda.set_rng_state_all(states[3][: torch.cuda.device_count()])


def to_plain(states: tuple[Any, ...]) -> list[Any]:
    """The states as tensors and plain numbers, for a checkpoint."""
    cpu, (name, keys, *rest), python, cuda = states
    return [cpu, [name, torch.from_numpy(keys.astype(np.int64)), *rest], [python[0], list(python[1]), python[2]], cuda]


def from_plain(states: list[Any]) -> tuple[Any, ...]:
    """What ``to_plain`` was given."""
    cpu, (name, keys, *rest), (version, numbers, gauss), cuda = states
    return cpu, (name, keys.numpy().astype(np.uint32), *rest), (version, tuple(numbers), gauss), cuda


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators start from ``seed``; outside they go on as if nothing had happened.

    >>> with seeded(7):
    ...     first = torch.rand(1)
    >>> with seeded(7):
    ...     bool(torch.rand(1) == first)
    True
    """
    outside = get_generators()
    seed_generators(seed)
    try:
        yield
    finally:
        set_generators(outside)
