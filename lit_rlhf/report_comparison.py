"""The comparison of several runs on one page: the frontier of reward against KL, curves, results, completions."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.report_comparison_charts import MANY, Cloud, draw_bands, draw_clouds, drawn_twice
from lit_rlhf.report_comparison_data import (
    Comparison,
    Point,
    band,
    compare,
    evaluations,
    frontier,
    is_reward,
    last,
    samples,
    x_axis,
)
from lit_rlhf.report_comparison_table import REPORT, columns, own_penalties, table
from lit_rlhf.report_section import definition
from lit_rlhf.report_settings import Member, Setting
from lit_rlhf.report_text import decimals, render
from lit_rlhf.run_folder import replace_file

PICTURES = "pictures"


def common_folder(paths: Sequence[Path]) -> Path:
    """Where the comparison of these folders goes: `comparison/` in the folder that holds all of them."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths])) / "comparison"


def build_comparison(paths: Sequence[Path], folder: Path) -> Path:
    """Writes `<folder>/report.html`, its pictures also as PNG into `<folder>/pictures/`, and returns the page's path.

    Raises:
        UserError: a folder holds no run, a file cannot be read, or nothing can be written there.
    """
    comparison = compare(paths)
    settings, titles = comparison.settings, comparison.titles
    pictures = [*_frontiers(settings, titles), *_curves(settings, titles)]
    answered, prompts = samples(settings)
    rows = table(comparison, folder)
    page = render(
        "report_comparison.html.jinja",
        title=folder.absolute().name if len(paths) == 1 else f"{len(comparison.members)} runs",
        facts=_facts(comparison.members, settings),
        settings=settings,
        keys=comparison.keys if len(comparison.keys) <= 4 else [],
        many=len(settings) > MANY,
        seeds=any(len(setting.members) > 1 for setting in settings),
        heads=_heads(comparison, rows),
        own_penalties=own_penalties(comparison),
        table=rows,
        sources=_sources(comparison),
        pictures=pictures,
        columns=answered,
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


def _heads(comparison: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The heads of the columns of results, and to how many decimals each column is written."""
    heads = []
    for place, column in enumerate(columns(comparison)):
        cells = [row["values"][place] for row in rows]
        values = [cell[part] for cell in cells for part in ("mean", "low", "high") if cell[part] is not None]
        under = [part for part in (_unit(column.metric), *column.notes) if part]
        digits = max(map(decimals, values), default=0)
        heads.append({"title": column.title, "under": under, "marked": column.marked, "digits": digits})
    return heads


def _sources(comparison: Comparison) -> dict[str, str]:
    """Where the points against KL, the results and the curves are from: "validation", "training" or "both"."""

    def name(held: Iterable[bool]) -> str:
        found = set(held)
        return "both" if len(found) > 1 else "validation" if True in found else "training"

    runs, titles = comparison.runs, comparison.titles
    against_kl = (evaluations(run, metric) for run in runs for metric in filter(is_reward, titles))
    return {
        "points": name(held for points, held in against_kl if points),
        "results": name(bool(run.column(f"val/{m}")) for run in runs for m in titles if last(run, m) is not None),
        "curves": name(not run.column(m) for run in runs for m in titles if last(run, m) is not None),
    }


def _unit(metric: str) -> str:
    unit = definition(metric).unit
    if not unit.startswith(("nats", "tokens")):
        return ""
    return f"{unit} per completion" if metric == "objective/kl" else unit


def _picture(file: str, draw: Any, settings: list[Setting], *, title: str, metric: str, size: Point) -> dict[str, Any]:
    many = len(settings) > MANY
    legend = [(f"{one.number}  {one.brief if many else one.label}", one.look) for one in settings]
    keys = list(dict.fromkeys(key for one in settings for key in one.values)) if many else []
    y_label = ", ".join(filter(None, (metric, _unit(metric))))
    svg, png = drawn_twice(draw, size=size, title=title, y_label=y_label, legend=legend, legend_title=" · ".join(keys))
    return {"file": file, "title": title, "under": y_label, "svg": svg, "png": png, "wide": size[0] > 5}


def _frontiers(settings: list[Setting], titles: dict[str, str]) -> Iterable[dict[str, Any]]:
    for metric in filter(is_reward, titles):
        clouds, drawn = [], []
        for setting in settings:
            found = [evaluations(run, metric) for run in setting.runs]
            found = [(points, held) for points, held in found if points]
            if found:
                runs, held = zip(*found, strict=True)
                clouds.append(Cloud(runs=runs, held=held, look=setting.look))
                drawn.append(setting)
        if clouds:
            ends = frontier(cloud.end for cloud in clouds)
            clouds = [
                replace(cloud, mark=str(setting.number)) if len(clouds) <= MANY or cloud.end in ends else cloud
                for setting, cloud in zip(drawn, clouds, strict=True)
            ]
            edge = frontier(point for cloud in clouds for points in cloud.runs for point in points)
            file = f"frontier{'' if metric == 'objective/scores' else '_' + _file_name(metric)}.png"
            yield _picture(
                file,
                lambda axes, ink, clouds=clouds, edge=edge: draw_clouds(axes, clouds, edge, ink),
                drawn,
                title=f"{titles[metric]} against KL",
                metric=metric,
                size=(8.0, 3.6),
            )


def _curves(settings: list[Setting], titles: dict[str, str]) -> Iterable[dict[str, Any]]:
    axis = x_axis(settings)
    online = any(run.online for setting in settings for run in setting.runs)
    x_label = axis if axis == "iteration" else "completions sampled" if online else "examples seen"
    for metric, title in titles.items():
        found = [(setting, band(setting.runs, metric, axis, setting.look)) for setting in settings]
        found = [(setting, one) for setting, one in found if one is not None]
        if found:
            drawn, bands = zip(*found, strict=True)
            yield _picture(
                f"{_file_name(metric)}.png",
                lambda axes, _, bands=bands: draw_bands(axes, bands, x_label),
                list(drawn),
                title=title,
                metric=metric,
                size=(3.0, 1.85),
            )


def _file_name(metric: str) -> str:
    return re.sub(r"[^\w.-]+", "_", metric)[:80]
