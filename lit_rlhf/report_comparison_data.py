"""What a comparison of several runs shows, before anything is drawn: their evaluations, curves, results, completions.

Runs that differ only in their seed are one setting. What names a setting is what the runs vary.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.report_comparison_charts import Band, Look, looks
from lit_rlhf.report_section import Run, is_run, load_runs, main_panels
from lit_rlhf.report_settings import Member, Setting, group

_PROMPTS = 8
_POINTS = 100  # of a run without validation
Point = tuple[float, float]


# --- which runs ---


def is_multirun(path: Path) -> bool:
    """Whether a folder is that of a Hydra multirun: it holds the table of its jobs, or will."""
    return not is_run(path) and any((path / name).is_file() for name in ("sweep.csv", "multirun.yaml"))


def collect(paths: Iterable[Path]) -> list[Member]:
    """The runs in these folders: of a pipeline its last stage, of a multirun every job, also those that failed.

    Raises:
        UserError: a folder holds no run, or a file in it cannot be read.
    """
    members: dict[Path, Member] = {}
    for path in paths:
        for member in _jobs(path) if is_multirun(path) else [Member(path, load_runs(path)[-1])]:
            members.setdefault(member.folder.absolute(), member)
    return list(members.values())


def _jobs(path: Path) -> list[Member]:
    from lit_rlhf.sweep import TABLE, read_jobs  # here, because a sweep writes reports

    try:
        jobs = read_jobs(path)
        members = []
        for job in jobs:
            folder, status = job["folder"], job["status"]
            found = is_run(folder) or any(map(is_run, folder.glob("[!.]*")))
            if status == "interrupted" and not (path / TABLE).is_file():
                status = "in progress"  # what a job notes when it begins
            run = load_runs(folder)[-1] if found else None
            members.append(Member(folder, run, dict(job["overrides"]), status, str(job["error"])))
    except UserError:  # that names its file
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no readable multirun: one of its job.json files is broken: {error!r}") from None
    if not members:
        raise UserError(f"{path} is the folder of a multirun, but no job has begun in it.")
    return members


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the page shows, before anything is drawn.

    Attributes:
        members: the runs, and the jobs that left none.
        keys: what they vary.
        settings: the runs by what they vary.
        titles: metric -> title, of those that are compared.
    """

    members: list[Member]
    keys: list[str]
    settings: list[Setting]
    titles: dict[str, str]

    @property
    def runs(self) -> list[Run]:
        return [member.run for member in self.members if member.run is not None]


def compare(paths: Sequence[Path]) -> Comparison:
    """The runs in these folders, by what they vary.

    Raises:
        UserError: a folder holds no run, or a file cannot be read.
    """
    members = collect(paths)
    keys, settings = group(members)
    for setting, look in zip(settings, looks([list(one.values.values()) for one in settings]), strict=True):
        setting.look = look
    titles = _metrics([member.run for member in members if member.run is not None])
    return Comparison(members=members, keys=keys, settings=settings, titles=titles)


def _metrics(runs: list[Run]) -> dict[str, str]:
    """The main metrics of any of the runs, each with its title."""
    titles: dict[str, str] = {}
    for run in runs:
        for panel in main_panels(run):
            titles.setdefault(panel.metric, panel.title)  # those against KL come last, with a metric that is there
    return titles


# --- numbers ---


def is_reward(metric: str) -> bool:
    """Whether a metric is drawn against the KL."""
    return metric == "objective/scores" or metric.startswith("gold/")


def evaluations(run: Run, metric: str) -> tuple[list[Point], bool]:
    """(KL, metric) at every validation, and True; without any, at the iterations of training, and False.

    What an iteration trained on was sampled by the policy as it then was, so it measures that policy. Of a long run
    these are evenly spread iterations, the last of them among them.
    """
    points = _against_kl(run, metric, "val/")
    if points:
        return points, True
    points = _against_kl(run, metric, "")
    step = -(-len(points) // _POINTS) or 1
    return points[::-step][::-1], False


def _against_kl(run: Run, metric: str, prefix: str) -> list[Point]:
    points = [(row.get(f"{prefix}objective/kl", math.nan), row.get(prefix + metric, math.nan)) for row in run.rows]
    return [point for point in points if all(map(math.isfinite, point))]


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats with at most their KL, by KL.

    >>> frontier([(2.0, 1.0), (1.0, 0.5), (3.0, 0.9), (1.0, 0.2)])
    [(1.0, 0.5), (2.0, 1.0)]
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def last(run: Run, metric: str) -> float | None:
    """The final value, on held-out data where there is one."""
    points = run.column(f"val/{metric}") or run.column(metric)
    return points[-1][1] if points else None


def band(runs: Sequence[Run], metric: str, axis: str, look: Look) -> Band | None:
    """The mean over the seeds, from the lowest to the highest, wherever at least one of them has the metric."""
    columns: dict[float, list[float]] = {}
    trained = any(run.column(metric) for run in runs)
    for run in runs:
        for row in run.rows:
            value = row.get(metric if trained else f"val/{metric}")
            if value is not None and axis in row:
                columns.setdefault(row[axis], []).append(value)
    if not columns:
        return None
    x = sorted(columns)
    finite = [[v for v in columns[place] if math.isfinite(v)] or [math.nan] for place in x]
    mean, low, high = map(statistics.fmean, finite), map(min, finite), map(max, finite)
    return Band(x=x, mean=list(mean), low=list(low), high=list(high), look=look)


def x_axis(settings: list[Setting]) -> str:
    """What the curves are drawn over."""
    rows = [row for setting in settings for run in setting.runs for row in run.rows]
    return "episode" if all("episode" in row for row in rows) else "iteration"


# --- completions ---


def samples(settings: list[Setting]) -> tuple[list[Setting], list[dict[str, Any]]]:
    """The newest completions of the same prompts, one column for every setting: the first of its seeds that has any."""
    columns = {}
    for setting in settings:
        found = [newest for run in setting.runs if (newest := _newest(run))]
        if found:
            columns[setting.number] = found[0]
    if not columns:
        return [], []
    everywhere = [prompt for prompt in next(iter(columns.values())) if all(prompt in one for one in columns.values())]
    rows = [
        {"prompt": prompt, "cells": [_cell(one[prompt]) for one in columns.values()]}
        for prompt in everywhere[:_PROMPTS]
    ]
    return [setting for setting in settings if setting.number in columns], rows


def _newest(run: Run) -> dict[str, dict[str, Any]]:
    """The newest sample of each prompt, of validation if there is any; those of the last iteration come first."""
    rows = [row for row in run.samples if "prompt" in row and "completion" in row]
    rows = [row for row in rows if row.get("split") == "validation"] or rows
    newest = {str(row["prompt"]): row for row in sorted(rows, key=lambda row: row["iteration"])}
    return dict(sorted(newest.items(), key=lambda item: -item[1]["iteration"]))


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    values = {"score": row.get("score"), **(row.get("gold") or {}), "KL": row.get("kl"), "length": row.get("length")}
    return {
        "text": str(row["completion"]).removeprefix(" "),
        "values": [(name, value) for name, value in values.items() if isinstance(value, int | float)],
    }
