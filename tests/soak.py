"""A long run in one process: does it keep what it has used up?

    python -m tests.soak                      500 iterations of experiment=tiny, W&B offline
    python -m tests.soak --iterations 2000 algorithm=grpo

Every ``EVERY`` iterations it notes resident memory, open file descriptors and threads of this process, and the memory
of the processes that it started (W&B's service). It prints them as a table, and exits with 1 where, from iteration
``SETTLED`` on, memory grows by ``MEMORY_SHARE`` or more, or descriptors or threads grow. Until then caches fill, and
the longest batch comes by, whose memory the process keeps (``lit_rlhf.machine.keep_freed_memory``).
"""

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import psutil

from lit_rlhf.pipeline import compose_stage
from lit_rlhf.train import train

EVERY, SETTLED = 10, 50  # iterations
MEMORY_SHARE = 0.05


@dataclass(frozen=True)
class Sample:
    """What a process holds at the end of an iteration; memory in MB."""

    iteration: int
    memory: float
    children: float
    descriptors: int
    threads: int


SAMPLES: list[Sample] = []


class Watch(L.Callback):
    """Takes a sample every ``EVERY`` iterations."""

    def on_row(self, _trainer: Any, _module: Any, row: dict[str, float]) -> None:
        if row["iteration"] % EVERY == 0:
            gc.collect()  # what only waits for the collector is no leak
            SAMPLES.append(take(int(row["iteration"])))


def take(iteration: int) -> Sample:
    """A sample of this process as it is now."""
    here = psutil.Process()
    children = [child.memory_info().rss for child in here.children(recursive=True) if child.is_running()]
    threads = len(os.listdir("/proc/self/task"))
    return Sample(iteration, here.memory_info().rss / 1e6, sum(children) / 1e6, here.num_fds(), threads)


def faults(samples: Sequence[Sample], settled: int = SETTLED) -> list[str]:
    """What grew after the iteration ``settled``, in words; memory of both, this process and those it started."""
    before, *after = [sample for sample in samples if sample.iteration >= settled]
    found = []
    for name in ("memory", "children"):
        first, most = getattr(before, name), max(getattr(sample, name) for sample in after)
        if first and most >= (1 + MEMORY_SHARE) * first:
            found.append(f"{name} grew by {most / first - 1:.1%}: {first:.1f} MB to {most:.1f} MB")
    for name in ("descriptors", "threads"):
        first, last = getattr(before, name), min(getattr(sample, name) for sample in after[-3:])  # some come and go
        if last > first:
            found.append(f"{name} grew from {first} to {last}")
    return found


def run(iterations: int, folder: Path, overrides: Sequence[str] = ()) -> list[Sample]:
    """Samples of a run of ``experiment=tiny`` with ``overrides``."""
    os.environ["WANDB_MODE"] = "offline"
    SAMPLES.clear()
    train(
        compose_stage([
            f"trainer.max_epochs={iterations}", "logger=csv_wandb", f"paths.output_dir={folder}",
            "+callbacks.soak._target_=tests.soak.Watch", *overrides,
        ], ["experiment=tiny"])
    )  # fmt: skip
    return list(SAMPLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=500)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = run(arguments.iterations, Path(folder) / "run", overrides)
    print(f"{'iteration':>9} {'memory, MB':>11} {'of children':>11} {'descriptors':>11} {'threads':>8}")
    for sample in samples:
        print("{:>9} {:>11.1f} {:>11.1f} {:>11} {:>8}".format(*astuple(sample)))
    found = faults(samples)
    print("\n".join(found) or f"after iteration {SETTLED}, nothing grew")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    from tests import soak  # the module whose list the callback fills: Hydra imports it by this name

    soak.main()
