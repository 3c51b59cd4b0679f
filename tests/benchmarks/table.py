"""The results as one Markdown table, and as JSON with the machine that they come from."""

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from tests.benchmarks.host import ROOT
from tests.benchmarks.works import Plan, Row

HEADER = ("work", "ours", "peer", "ratio", "of the limit", "memory, GB", "targets")
LIBRARIES = ("torch", "transformers", "lightning", "peft", "accelerate", "datasets")


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 10.0], " s")
    '3.00 s (2.00-4.00)'
    """
    if not values:
        return ""
    middle = f"{_short(statistics.median(values))}{unit}"
    if len(values) == 1:
        return middle
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def markdown(rows: Sequence[Row]) -> str:
    """Seconds as median (quartiles); a ratio's spread is that of the rounds."""
    lines = [HEADER]
    for row in rows:
        targets = [
            f"{t.name} {t.value:.2f} {'>=' if t.at_least else '<='} {t.bound:g}: {'yes' if t.met else 'NO'}"
            for t in row.targets
        ]
        lines.append((
            row.work,
            spread(row.ours, " s"),
            spread(row.peer, " s"),
            f"{row.ratio:.2f}" + spread(row.ratios).removeprefix(_short(statistics.median(row.ratios)))
            if row.peer and row.ours else "",
            "" if row.limit is None else f"{row.limit:.0%}",
            " / ".join(f"{memory:.2f}" for memory in row.memory),
            "; ".join(targets),
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])


def to_json(rows: Sequence[Row], plan: Plan) -> dict[str, Any]:
    results = []
    for row in rows:
        targets = [{**asdict(target), "met": target.met} for target in row.targets]
        results.append({**asdict(row), "ratio": row.ratio if row.ours else None, "targets": targets})
    return {"machine": machine(), "plan": asdict(plan), "results": results}


def machine() -> dict[str, Any]:
    """Processor, cores, versions, commit, day."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        model = next(iter(re.findall(r"model name\s*: (.+)", info.read_text())), model)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,  # of other work, when this is written
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": commit or None,
        "date": date.today().isoformat(),
    }
