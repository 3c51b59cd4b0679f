"""The comparison of several runs on one page: the frontier of reward against KL, curves, results, completions.

Runs that differ only in their seed are one setting. What names a setting is what the runs vary.
"""

import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lit_rlhf.errors import UserError
from lit_rlhf.report_charts import MANY, Band, Cloud, draw_bands, draw_clouds, drawn_twice, setting_colours
from lit_rlhf.report_section import Run, definition, is_run, load_runs, main_panels
from lit_rlhf.report_settings import Member, Setting, group
from lit_rlhf.report_text import render
from lit_rlhf.run_folder import replace_file

REPORT, PICTURES = "report.html", "pictures"
_PROMPTS = 8
Point = tuple[float, float]


# --- which runs ---


def is_multirun(path: Path) -> bool:
    """Whether a folder is that of a Hydra multirun: it holds the table of its jobs, or will."""
    return not is_run(path) and any((path / name).is_file() for name in ("sweep.csv", "multirun.yaml"))


def common_folder(paths: Sequence[Path]) -> Path:
    """Where the comparison of these folders goes: `comparison/` in the folder that holds all of them."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths])) / "comparison"


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
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no readable multirun: one of its job.json files is broken: {error!r}") from None
    if not members:
        raise UserError(f"{path} is the folder of a multirun, but no job has begun in it.")
    return members


# --- numbers ---


def evaluations(run: Run, metric: str) -> tuple[list[Point], bool]:
    """(KL, metric) at every validation, and True; without any, at the end of training, and False."""
    points = _against_kl(run, metric, "val/")
    return (points, True) if points else (_against_kl(run, metric, "")[-1:], False)


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


def band(runs: Sequence[Run], metric: str, axis: str, colour: str) -> Band | None:
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
    return Band(x=x, mean=list(mean), low=list(low), high=list(high), colour=colour)


# --- the page ---


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
    for setting, colour in zip(settings, setting_colours(len(settings)), strict=True):
        setting.colour = colour
    titles = _metrics([member.run for member in members if member.run is not None])
    return Comparison(members=members, keys=keys, settings=settings, titles=titles)


def build_comparison(paths: Sequence[Path], folder: Path) -> Path:
    """Writes `<folder>/report.html`, its pictures also as PNG into `<folder>/pictures/`, and returns the page's path.

    Raises:
        UserError: a folder holds no run, a file cannot be read, or nothing can be written there.
    """
    comparison = compare(paths)
    members, settings, titles, runs = comparison.members, comparison.settings, comparison.titles, comparison.runs
    pictures = [*_frontiers(settings, titles), *_curves(settings, titles)]
    columns, prompts = samples(settings)
    page = render(
        "report_comparison.html.jinja",
        title=folder.absolute().name if len(paths) == 1 else f"{len(members)} runs",
        facts=_facts(members, settings),
        settings=settings,
        keys=comparison.keys if len(comparison.keys) <= 4 else [],
        many=len(settings) > MANY,
        seeds=any(len(setting.members) > 1 for setting in settings),
        hollow=any(not evaluations(run, "objective/scores")[1] for run in runs if run.online),
        held_out=[run for run in runs if any(name.startswith("val/") for row in run.rows for name in row)] == runs,
        metrics=[{"title": title, "unit": _unit(name)} for name, title in titles.items()],
        table=table(settings, titles, folder),
        pictures=pictures,
        columns=columns,
        prompts=prompts,
    )
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / PICTURES / picture["file"]).write_bytes(picture["png"])
        replace_file(folder / REPORT, page)
    except OSError as error:
        raise UserError(f"The comparison cannot be written to {folder}: {error}") from None
    return folder / REPORT


def _facts(members: list[Member], settings: list[Setting]) -> list[str]:
    counts = {state: [m.state for m in members].count(state) for state in dict.fromkeys(m.state for m in members)}
    what = f"{len(members)} {'run' if len(members) == 1 else 'runs'}"
    groups = f"{len(settings)} {'setting' if len(settings) == 1 else 'settings'}"
    return [what, groups, *(f"{count} {state}" for state, count in counts.items())]


def _metrics(runs: list[Run]) -> dict[str, str]:
    """The main metrics of any of the runs, each with its title."""
    titles: dict[str, str] = {}
    for run in runs:
        for panel in main_panels(run):
            titles.setdefault(panel.metric, panel.title)  # those against KL come last, with a metric that is there
    return titles


def _unit(metric: str) -> str:
    unit = definition(metric).unit
    return unit if unit.startswith(("nats", "tokens")) else ""


def _picture(file: str, draw: Any, settings: list[Setting], *, title: str, under: str, size: Point) -> dict[str, Any]:
    many = len(settings) > MANY
    legend = [(f"{one.number}  {one.brief if many else one.label}", one.colour) for one in settings]
    keys = list(dict.fromkeys(key for one in settings for key in one.values)) if many else []
    svg, png = drawn_twice(draw, size=size, label=title, title=title, legend=legend, legend_title=" · ".join(keys))
    return {"file": file, "title": title, "under": under, "svg": svg, "png": png, "wide": size[0] > 5}


def is_reward(metric: str) -> bool:
    """Whether a metric is drawn against the KL."""
    return metric == "objective/scores" or metric.startswith("gold/")


def _frontiers(settings: list[Setting], titles: dict[str, str]) -> Iterable[dict[str, Any]]:
    for metric in filter(is_reward, titles):
        clouds, drawn = [], []
        for setting in settings:
            found = [evaluations(run, metric) for run in setting.runs]
            found = [(points, held) for points, held in found if points]
            if found:
                runs, held = zip(*found, strict=True)
                clouds.append(Cloud(mark=str(setting.number), runs=runs, held=held, colour=setting.colour))
                drawn.append(setting)
        if clouds:
            edge = frontier(point for cloud in clouds for points in cloud.runs for point in points)
            file = f"frontier{'' if metric == 'objective/scores' else '_' + _file_name(metric)}.png"
            yield _picture(
                file,
                lambda axes, ink, clouds=clouds, edge=edge: draw_clouds(axes, clouds, edge, ink),
                drawn,
                title=f"{titles[metric]} against KL",
                under=metric,
                size=(8.0, 3.6),
            )


def x_axis(settings: list[Setting]) -> str:
    """What the curves are drawn over."""
    rows = [row for setting in settings for run in setting.runs for row in run.rows]
    return "episode" if all("episode" in row for row in rows) else "iteration"


def _curves(settings: list[Setting], titles: dict[str, str]) -> Iterable[dict[str, Any]]:
    axis = x_axis(settings)
    online = any(run.online for setting in settings for run in setting.runs)
    x_label = axis if axis == "iteration" else "completions sampled" if online else "examples seen"
    for metric, title in titles.items():
        found = [(setting, band(setting.runs, metric, axis, setting.colour)) for setting in settings]
        found = [(setting, one) for setting, one in found if one is not None]
        if found:
            drawn, bands = zip(*found, strict=True)
            yield _picture(
                f"{_file_name(metric)}.png",
                lambda axes, _, bands=bands: draw_bands(axes, bands, x_label),
                list(drawn),
                title=title,
                under=" ".join(filter(None, (metric, _unit(metric)))),
                size=(3.0, 1.85),
            )


def _file_name(metric: str) -> str:
    return re.sub(r"[^\w.-]+", "_", metric)[:80]


def table(settings: list[Setting], titles: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """A row for every setting: of each metric the final values' mean, lowest and highest, and how its runs ended."""
    rows = []
    for setting in settings:
        values = []
        for metric in titles:
            finals = [v for run in setting.runs if (v := last(run, metric)) is not None]
            mean = statistics.fmean(finals) if finals else None
            spread = finals if mean is not None and math.isfinite(mean) else []
            low, high = min(spread, default=None), max(spread, default=None)
            values.append({"mean": mean, "low": low, "high": high, "best": False})
        states = [
            {"state": member.state, "error": member.error, "name": member.folder.name, "href": _link(member, folder)}
            for member in setting.members
        ]
        rows.append({"setting": setting, "values": values, "states": states})
    for place, metric in enumerate(titles):
        better = definition(metric).better
        column = [row["values"][place] for row in rows if row["values"][place]["mean"] is not None]
        column = [cell for cell in column if math.isfinite(cell["mean"])]
        if better and len(column) > 1:
            best = (max if better == "higher" else min)(cell["mean"] for cell in column)
            for cell in column:
                cell["best"] = cell["mean"] == best
    return rows


def _link(member: Member, folder: Path) -> str | None:
    page = member.folder / REPORT
    return quote(os.path.relpath(page.absolute(), folder.absolute())) if page.is_file() else None


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
