"""The numbers in the experiments' headers, which open with the command that gives them:

    #   val/reward/verifier  0.42 -> 0.83 (0.70 to 0.96)

A held-out metric before training, after it, and where it should end with another seed or on another machine.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.metrics import lookup

NUMBER = r"(-?[\d.]+)"
LINE = re.compile(rf"#   (val/\S+)\s+{NUMBER} -> {NUMBER} \({NUMBER} to {NUMBER}\)")
WITH_NUMBERS = {"length", "human_ratings", "tweets", "arithmetic", "json", "detoxification", "helpfulness"}


class Expected(NamedTuple):
    before: float
    after: float
    low: float
    high: float


def header(name: str) -> tuple[list[str], dict[str, Expected]]:
    """The arguments of the command that opens an experiment, and what its header promises."""
    lines = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
    promised = {found[1]: Expected(*map(float, found.groups()[1:])) for line in lines if (found := LINE.match(line))}
    return shlex.split(lines[1].removeprefix("# lit-rlhf ")), promised


@pytest.mark.parametrize("name", sorted(WITH_NUMBERS))
def test_a_header_promises_numbers_that_mean_something(name):
    _, promised = header(name)
    assert promised
    for metric, numbers in promised.items():
        lookup(metric)
        assert numbers.low <= numbers.after <= numbers.high


@pytest.mark.real
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["arithmetic", "json"])
def test_a_command_gives_what_its_header_promises(name, seed, tmp_path):
    arguments, promised = header(name)
    given = [*arguments, f"seed={seed}", "logger=csv", f"paths.output_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-m", "lit_rlhf", *given], cwd=tmp_path, env=environment).returncode == 0
    after = json.loads((tmp_path / "summary.json").read_text())
    with open(tmp_path / "metrics.csv", newline="") as file:
        before = next(csv.DictReader(file))
    print({metric: (float(before[metric]), after[metric], numbers) for metric, numbers in promised.items()})
    for metric, numbers in promised.items():
        assert numbers.low <= after[metric] <= numbers.high
        if seed == 0:  # the same completions, up to rounding
            assert float(before[metric]) == pytest.approx(numbers.before, abs=0.05)
