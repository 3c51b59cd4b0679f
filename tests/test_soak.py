"""A short slice of `python -m tests.soak`, and that it notices what leaks."""

import importlib
from dataclasses import replace

import pytest

from tests.soak import SETTLED, Sample, faults, run

QUIET = [
    "trainer.limit_val_batches=0", "~callbacks.progress", "+trainer.enable_progress_bar=false",
    "algorithm.rollout_batch_size=16", "algorithm.minibatch_size=16",
]  # fmt: skip


def test_a_run_gives_back_descriptors_threads_and_memory(tmp_path):
    samples = run(40, tmp_path / "run", QUIET)
    assert [sample.iteration for sample in samples] == [10, 20, 30, 40]
    assert faults(samples, settled=20) == []
    assert min(samples[0].memory, samples[0].descriptors, samples[0].threads) > 0


opened = []


def leaky(prompts, completions, **columns):
    opened.append(open("/dev/null"))
    return [0.0] * len(completions)


def test_a_reward_that_keeps_files_open_is_found_out(tmp_path):
    opened = importlib.import_module("test_soak").opened  # as Hydra imports it
    try:
        samples = run(20, tmp_path / "run", [*QUIET, "reward=function", "reward.function=test_soak.leaky"])
    finally:
        for file in opened:
            file.close()
    (found,) = faults(samples, settled=10)
    assert found.startswith("descriptors grew from")


STEADY = [Sample(iteration, 600.0, 50.0, 11, 6) for iteration in range(0, 501, 10)]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"memory": 629.9}, []),
        ({"memory": 630.0}, ["memory grew by 5.0%: 600.0 MB to 630.0 MB"]),
        ({"children": 60.0}, ["children grew by 20.0%: 50.0 MB to 60.0 MB"]),
        ({"descriptors": 12}, ["descriptors grew from 11 to 12"]),
        ({"threads": 7}, ["threads grew from 6 to 7"]),
    ],
)
def test_what_has_grown_since_the_run_has_settled_is_named(changes, found):
    samples = [replace(s, **changes) if s.iteration > 250 else s for s in STEADY]
    assert faults(samples) == found
    assert faults([replace(s, **changes) if s.iteration < SETTLED else s for s in STEADY]) == []


def test_a_file_that_is_open_at_one_sample_is_no_leak():
    assert faults([*STEADY[:-2], replace(STEADY[-2], descriptors=12), STEADY[-1]]) == []
