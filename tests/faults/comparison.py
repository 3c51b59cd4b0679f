"""What two finished runs have in common, to the bit."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_rlhf.distributed import SHARDED_META
from lit_rlhf.sharded_reader import load_shards
from tests.wandb_file import WandbFile, records


@dataclass
class Difference:
    """Of two runs: bits of tensors and numbers that differ, rows that one has and the other has not, and where."""

    bits: int = 0
    rows: int = 0
    where: list[str] = field(default_factory=list)


def compare(whole: Path, cut: Path) -> Difference:
    """Weights of ``model/``, the newest and the best checkpoint, metrics but for times, samples, and rows in W&B."""
    found = Difference()
    names = [sorted(str(p.relative_to(run)) for p in (run / "model").rglob("*") if p.is_file()) for run in (whole, cut)]
    _same("files of model/", *names, found)
    for name in names[0]:
        if name in names[1]:
            if name.endswith(".safetensors"):
                _same(name, load_file(whole / name), load_file(cut / name), found)
            elif (whole / name).read_bytes() != (cut / name).read_bytes():
                _note(name, 1, found)
    for name in ("last.ckpt", "best.ckpt"):
        stored = [_checkpoint(run / "checkpoints" / name) for run in (whole, cut)]
        for key in ("name", "state_dict", "optimizer_states", "lr_schedulers", "global_step", "lit_rlhf"):
            _same(f"{name} {key}", stored[0].get(key), stored[1].get(key), found)
        if all(len({(run / "checkpoints" / link).resolve() for link in ("last.ckpt", "best.ckpt")}) == 1
               for run in (whole, cut)):  # fmt: skip
            break  # the newest is the best
    for path, read in (("metrics.csv", _metrics), ("samples.jsonl", _lines), ("wandb", _wandb)):
        one, two = read(whole / path), read(cut / path)
        if one != two:
            lost = abs(len(one) - len(two)) or sum(a != b for a, b in zip(one, two, strict=True))
            found.rows += lost
            found.where.append(f"{path}: {len(one)} rows and {len(two)}, {lost} lost, doubled or changed")
    return found


def _clock(name: str) -> bool:
    return name.startswith("time/") or "per_second" in name


def _metrics(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if not _clock(k)} for row in csv.DictReader(file)]


def _checkpoint(link: Path) -> dict[str, Any]:
    """What it holds, and the name that the link leads to; nothing if there is none."""
    if link.is_dir():
        shards: dict[str, Any] = {}
        load_shards(shards, link.resolve(), whole=True)
        optimizers = [shards[name] for name in sorted(shards) if name.startswith("optimizer_")]
        rest = torch.load(link / SHARDED_META, weights_only=True)
        return {**rest, "name": link.resolve().name, "state_dict": shards["state_dict"], "optimizer_states": optimizers}
    return {"name": link.resolve().name, **torch.load(link, weights_only=True)} if link.exists() else {}


def _wandb(folder: Path) -> list[dict[str, Any]]:
    """Of the rows of all runs, for every iteration the one that counts, without its attempt."""
    if not folder.is_dir():
        return []
    # A kill can come before a run's first record.
    files = [path for path in folder.glob("*run-*/*.wandb") if any(record.HasField("run") for record in records(path))]
    rows = [row for path in files for row in WandbFile(path).history if "policy/updates" in row]
    last = {row["iteration"]: row for row in sorted(rows, key=lambda row: row["attempt"])}
    left_out = ("attempt", "_step", "_runtime", "_timestamp")
    return [{k: v for k, v in last[number].items() if k not in left_out and not _clock(k)} for number in sorted(last)]


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n") if path.exists() else []


def _note(where: str, bits: int, found: Difference) -> None:
    found.bits += bits
    found.where.append(where)


def _same(where: str, one: Any, two: Any, found: Difference) -> None:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in {**one, **two}:
            if not _clock(str(key)):
                _same(f"{where}.{key}", one.get(key), two.get(key), found)
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            _same(f"{where}[{number}]", a, b, found)
    elif isinstance(one, Tensor) and isinstance(two, Tensor) and (one.shape, one.dtype) == (two.shape, two.dtype):
        bits = one.reshape(-1).view(torch.uint8) ^ two.reshape(-1).view(torch.uint8)
        if count := sum(int((bits >> n & 1).sum()) for n in range(8)):
            _note(where, count, found)
    elif type(one) is not type(two) or isinstance(one, Tensor) or one != two:
        _note(where, 1, found)
