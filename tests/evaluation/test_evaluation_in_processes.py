"""Metrics of two gloo processes, each with its share of what there is, say what one process with all of it says."""

import json

import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

from lit_rlhf.evaluation import (
    DistinctN,
    EmptyRate,
    PairAccuracy,
    PassAtK,
    Perplexity,
    RefusalRate,
    SelfBLEU,
    WinRate,
)

TEXTS = ["a fine film", "a fine film", "", "I'm sorry, no", "so dull a film", "naïve\n"]


def numbers(seed):
    return torch.randn(6, generator=torch.Generator().manual_seed(seed))


#: name -> the metric, and what updates it with some of the rows
MEASURED = {
    "distinct": (DistinctN, lambda rows: (TEXTS[rows],)),
    "self_bleu": (SelfBLEU, lambda rows: (TEXTS[rows],)),
    "empty": (EmptyRate, lambda rows: (TEXTS[rows],)),
    "refusals": (RefusalRate, lambda rows: (TEXTS[rows],)),
    "pass": (lambda: PassAtK(2), lambda rows: ((numbers(0) > 0).reshape(3, 2)[rows],)),
    "perplexity": (Perplexity, lambda rows: (numbers(1)[rows].exp(), *(torch.arange(n, n + 6)[rows] for n in (1, 2)))),
    "win_rate": (WinRate, lambda rows: (*(numbers(n)[rows] for n in (2, 3)), torch.arange(6)[rows],
                                        torch.full((6,), 3)[rows], torch.tensor([0, 1, 2, 0, 1, 2])[rows])),
    "pairs": (PairAccuracy, lambda rows: (numbers(4)[rows], numbers(5)[rows])),
}  # fmt: skip
#: The first process has one row, so the second one's states are longer.
SHARES = (slice(0, 1), slice(1, None))


def say_all(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, (make, rows) in MEASURED.items():
        metric = make()
        metric.update(*rows(SHARES[rank]))
        found[name] = said(metric)
        late = make()
        if rank == 1:
            late.update(*rows(slice(None)))
        found[f"{name}, of one process alone"] = said(late)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def said(metric):
    found = metric.compute()
    if isinstance(found, torch.Tensor):
        return float(found)
    return [x if isinstance(x, float | int) else list(x) for x in found]


def test_two_processes_together_say_what_one_says(tmp_path):
    processes = start_processes(say_all, args=(tmp_path,), nprocs=2, start_method="fork", join=False)
    ended = any(processes.join(timeout=30) for _ in range(4))  # each waits for the next one to end
    for process in processes.processes:
        process.kill()
    assert ended
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    for name, (make, rows) in MEASURED.items():
        metric = make()
        metric.update(*rows(slice(None)))
        compare(one[name], said(metric))
        compare(one[f"{name}, of one process alone"], said(metric))


def compare(found, expected):
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            compare(a, b)
    else:
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
