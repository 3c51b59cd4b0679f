"""A small part of the campaign (``python -m tests.faults`` is the whole), and that it would find what it looks for."""

import csv
import json
import random
import shutil
import subprocess
import sys

import torch
from command_line import ROOT, TINY, environment, run_here
from safetensors.torch import load_file, save_file

from tests.faults.campaign import FAULTS, FAULTS_OF_SEVERAL, plan
from tests.faults.comparison import compare
from tests.faults.tasks import algorithms, command, is_meant, is_offline, is_several, joins


def test_runs_that_are_killed_preempted_and_damaged_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, "-m", "tests.faults", "--algorithms", "grpo+guard", "sft", "--faults", "1"]
    result = subprocess.run(command, cwd=ROOT, env=environment(TMPDIR=tmp_path), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (total,) = [line.split() for line in result.stdout.splitlines() if line.startswith("all ")]
    assert total == ["all", "2", "2", "0", "0"]


def test_an_update_that_finds_no_memory_is_halved_in_the_run_that_is_about_it(tmp_path):
    result = run_here(*command("grpo+memory", tmp_path / "run", tmp_path))
    assert result.code == 0, result.err
    assert is_meant("grpo+memory", tmp_path / "run")


def test_every_algorithm_and_every_fault_has_its_turn():
    chosen = plan(algorithms(), 5, random.Random(0))
    assert list(chosen) == algorithms()
    assert {len(faults) for faults in chosen.values()} == {5}
    assert {fault for faults in chosen.values() for fault in faults} == set(FAULTS)
    assert sum(fault.startswith("kill") for faults in chosen.values() for fault in faults) >= 50
    offline = {name for name in algorithms() if is_offline(name)}
    assert {"sft", "reward_model", "dpo", "cdpo", "dqn"} <= offline
    assert not {"ppo", "trpo", "online_dpo"} & offline
    assert not any("kill in rollout" in chosen[name] for name in offline)
    several = {name for name in joins() if is_several(name)}
    assert {fault for name in several for fault in plan([name], 2, random.Random(0))[name]} == set(FAULTS_OF_SEVERAL)
    assert {name.partition("+")[0] for name in joins()} <= set(algorithms())


def weight(run):
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(torch.int32).reshape(-1)[0] ^= 5  # two bits
    save_file(tensors, file, {"format": "pt"})
    return 2, 0


def moment(run):
    file = run / "checkpoints" / "last.ckpt"
    stored = torch.load(file, weights_only=True)
    stored["optimizer_states"][0]["state"][0]["exp_avg"].view(torch.int32).reshape(-1)[0] ^= 1
    torch.save(stored, file)
    return 1, 0


def tokens(run):
    file = run / "checkpoints" / "last.ckpt"
    stored = torch.load(file, weights_only=True)
    stored["lit_rlhf"]["tokens"] += 1
    torch.save(stored, file)
    return 1, 0


def row(run):
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:-1]))
    return 0, 1


def doubled(run):
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join([*lines, lines[-1]]))
    return 0, 1


def change(run, column):
    """Another digit at the end of the last row's value."""
    with open(run / "metrics.csv", newline="") as file:
        found = list(csv.reader(file))
    found[-1][found[0].index(column)] += "1"
    with open(run / "metrics.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(found)


def value(run):
    change(run, "objective/kl")
    return 0, 1


def clock(run):
    change(run, "time/iteration")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"wall_seconds": 1.0}))
    return 0, 0


def best(run):
    """Another one is the best, and it is not the newest."""
    checkpoints = run / "checkpoints"
    newest = (checkpoints / "last.ckpt").resolve()
    (other,) = [path for path in checkpoints.glob("step=*.ckpt") if path.resolve() != newest]
    (checkpoints / "best.ckpt").unlink()
    (checkpoints / "best.ckpt").symlink_to(other.name)
    return None, 0  # its name, and all that differs in it


def test_the_comparison_counts_bits_and_rows_that_differ_but_not_times(tmp_path):
    whole = tmp_path / "whole"
    assert run_here("train", *TINY, "trainer.max_epochs=2", f"paths.output_dir={whole}").code == 0
    (whole / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
    (whole / "checkpoints" / "best.ckpt").symlink_to((whole / "checkpoints" / "last.ckpt").readlink())
    for change in (weight, moment, tokens, row, doubled, value, clock, best):
        cut = tmp_path / change.__name__
        shutil.copytree(whole, cut, symlinks=True)
        bits, rows = change(cut)
        found = compare(whole, cut)
        assert found.bits == bits if bits is not None else found.bits > 0, change.__name__
        assert found.rows == rows, change.__name__
        assert bool(found.where) == (bits != 0 or rows != 0), change.__name__
