"""The table of results of a comparison: a row for every setting, with the final values of its runs."""

import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lit_rlhf.report_comparison_data import Comparison, frontier, is_reward, last
from lit_rlhf.report_section import Run, definition
from lit_rlhf.report_settings import Member, Setting

REPORT = "report.html"
_PENALISED = "objective/rlhf_reward"


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        metric: its name, without `val/`.
        title: its head.
        marked: what is marked in it: the "frontier", the "best" or nothing.
        logged: the name its values were logged under; None: that of validation where a run has it there.
        notes: what else its head says.
    """

    metric: str
    title: str
    marked: str = ""
    logged: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unlike the name of any other column."""
        return f"{self.logged} (optimized_metric)" if self.logged else self.metric

    def final(self, run: Run) -> float | None:
        """The last value of a run."""
        if self.logged is None:
            return last(run, self.metric)
        points = run.column(self.logged)
        return points[-1][1] if points else None

    def finals(self, setting: Setting) -> list[float]:
        """The last values of a setting's seeds."""
        return [value for run in setting.runs if (value := self.final(run)) is not None]


_KL = Column("objective/kl", "")


def columns(comparison: Comparison) -> list[Column]:
    """The metrics that are compared, and the one that all the runs were optimised for, under the name it was."""
    found = []
    for metric, title in comparison.titles.items():
        marked = "frontier" if is_reward(metric) and _KL.metric in comparison.titles else "best"
        found.append(Column(metric, title, marked if definition(metric).better else ""))
    optimized = _optimized(comparison)
    if optimized is None:
        return found
    for place, one in enumerate(found):
        if one.metric == optimized.metric and all(one.final(run) == optimized.final(run) for run in comparison.runs):
            found[place] = replace(one, notes=("optimized_metric",))
            return found
    kl = [place for place, one in enumerate(found) if one.metric == _KL.metric]
    found.insert(kl[0] + 1 if kl else len(found), optimized)
    return found


def _optimized(comparison: Comparison) -> Column | None:
    """The metric that a sweeper was given, if it was the same of all runs."""
    names = {run.config.get("optimized_metric") for run in comparison.runs}
    name = names.pop() if len(names) == 1 else None
    if not isinstance(name, str) or not any(run.column(name) for run in comparison.runs):
        return None
    metric = name.removeprefix("val/")
    title = "Reward minus KL penalty" if metric == _PENALISED else comparison.titles.get(metric, metric)
    best = definition(metric).better and not (metric == _PENALISED and own_penalties(comparison))
    notes = ("optimized_metric", "in training" if name == metric else "in validation")
    return Column(metric, title, "best" if best else "", name, notes)


def own_penalties(comparison: Comparison) -> bool:
    """Whether the runs are optimised for reward minus KL penalties of their own, which have no common best."""
    varied = any("kl" in key.split(".") for key in comparison.keys)
    names = {str(run.config.get("optimized_metric")).removeprefix("val/") for run in comparison.runs}
    return varied and names == {_PENALISED}


def table(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """A row for every setting: of each column the final values' mean, lowest and highest, and how its runs ended."""
    shown = columns(comparison)
    rows = []
    for setting in comparison.settings:
        states = [
            {"state": member.state, "error": member.error, "name": member.folder.name, "href": _link(member, folder)}
            for member in setting.members
        ]
        values = [_cell(column.finals(setting)) for column in shown]
        rows.append({"setting": setting, "values": values, "states": states})
    kl = [_cell(_KL.finals(setting))["mean"] for setting in comparison.settings]
    for place, column in enumerate(shown):
        _mark(column, [row["values"][place] for row in rows], kl)
    return rows


def _cell(finals: list[float]) -> dict[str, Any]:
    mean = statistics.fmean(finals) if finals else None
    spread = finals if mean is not None and math.isfinite(mean) else []
    return {"mean": mean, "low": min(spread, default=None), "high": max(spread, default=None), "marked": False}


def _mark(column: Column, cells: list[dict[str, Any]], kl: list[float | None]) -> None:
    """Marks the best cells, or those that no other one beats with at most its KL."""
    known = [cell for cell in cells if cell["mean"] is not None and math.isfinite(cell["mean"])]
    if len(known) < 2 or not column.marked:
        return
    if column.marked == "frontier":
        places = [(at, cell["mean"]) for at, cell in zip(kl, cells, strict=True) if cell in known]
        edge = frontier(place for place in places if place[0] is not None and math.isfinite(place[0]))
        for at, cell in zip(kl, cells, strict=True):
            cell["marked"] = (at, cell["mean"]) in edge
    else:
        best = (min if definition(column.metric).better == "lower" else max)(cell["mean"] for cell in known)
        for cell in known:
            cell["marked"] = cell["mean"] == best


def _link(member: Member, folder: Path) -> str | None:
    page = member.folder / REPORT
    return quote(os.path.relpath(page.absolute(), folder.absolute())) if page.is_file() else None
