"""What an evaluation found: as tables in the terminal, and as a page, ``report.html``, that opens from disk."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_rlhf.errors import UserError, printable
from lit_rlhf.report_charts import SVG, as_svg, style
from lit_rlhf.report_section import definition
from lit_rlhf.report_text import number, render
from lit_rlhf.run_folder import EVALUATION, SAMPLES, replace_file, whole_lines

REPORT = "report.html"
_PROMPTS = 20  # whose completions the page shows
_KINDS = {"plain": "", "length_controlled": "equal length"}
#: What metrics are called on the page; others go by their names.
_TITLES = {
    "objective/scores": "Reward", "objective/kl": "KL to the reference", "objective/kl_per_token": "KL per token",
    "objective/entropy": "Entropy of a completion", "rollout/response_length": "Response length",
    "rollout/eos_rate": "Ended by itself", "rollout/truncated_rate": "Cut at the length limit",
    "text/self_bleu": "Self-BLEU", "text/empty_rate": "Empty", "text/refusal_rate": "Refusals",
    "text/distinct_1": "Distinct words", "text/distinct_2": "Distinct pairs of words",
    "text/distinct_3": "Distinct triples of words",
}  # fmt: skip
#: Where a kind of win rate stands beside its line, its role of colour, and what fills its dot.
_DOTS = {"plain": (-0.14, "train", None), "length_controlled": (0.14, "held", "none")}
_PERPLEXITY = {"perplexity": "text/perplexity", "bits_per_byte": "text/bits_per_byte"}


class Column(NamedTuple):
    """A policy at a temperature, or without one."""

    policy: str
    temperature: str


def build_evaluation(folder: Path) -> Path:
    """Writes ``<folder>/report.html`` from the evaluation that the folder holds; returns its path.

    Raises:
        UserError: the folder holds none, or what is in it cannot be read.
    """
    found = _read(folder)
    columns = [Column(name, key) for name, by_key in found.get("policies", {}).items() for key in by_key]
    summaries = [found["policies"][column.policy][column.temperature] for column in columns]
    metrics = _without_twins(dict.fromkeys(name for summary in summaries for name in summary))
    subject = found.get("subject", {})
    page = render(
        "report_evaluation.html.jinja",
        title=subject.get("policy") or folder.absolute().name,
        facts=_facts(found),
        names={name: subject.get(name, "") for name in dict.fromkeys(column.policy for column in columns)},
        heads=[(policy, len(list(group))) for policy, group in groupby(column.policy for column in columns)],
        columns=columns,
        firsts=[place for place, column in enumerate(columns) if place == 0 or columns[place - 1][0] != column.policy],
        rows=[_row(name, [summary.get(name) for summary in summaries]) for name in metrics],
        forest=_forest(found),
        differences=_differences(found),
        texts=_texts(found),
        pairs=_pairs(found),
        prompts=_side_by_side(folder, columns, found.get("prompts", 0)),
        samples=found.get("samples_per_prompt", 1),
        definitions=[definition(name) for name in [*metrics, *(_PERPLEXITY.values() if "perplexity" in found else ())]],
    )
    replace_file(folder / REPORT, page)
    return folder / REPORT


def _read(folder: Path) -> dict[str, Any]:
    path = folder / EVALUATION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _facts(found: Mapping[str, Any]) -> list[str]:
    facts = []
    if "policies" in found:
        temperatures = list(next(iter(found["policies"].values())))
        each, prompts = found["samples_per_prompt"], found["prompts"]
        facts.append(f"{prompts:,} held-out prompt{'s' * (prompts != 1)}")
        facts.append(f"{each} completion{'s' * (each != 1)} of each")
        facts.append(f"temperature{'s' * (len(temperatures) != 1)} {', '.join(temperatures)}")
    if "perplexity" in found:
        texts = next(iter(found["perplexity"].values()))["documents"]
        facts.append(f"{texts:,} held-out text{'s' * (texts != 1)}")
    if "pairs" in found:
        facts.append(f"{max(row['pairs'] for row in found['pairs'].values()):,} held-out pairs")
    return facts


def _without_twins(names: Iterable[str]) -> list[str]:
    """Without the only component of a reward, which is the reward."""
    names = list(names)
    components = [name for name in names if name.startswith("reward/") and "/pass@" not in name]
    return [name for name in names if name not in components or len(components) > 1]


def _row(name: str, cells: Sequence[Any]) -> dict[str, Any]:
    base, at, k = name.partition("/pass@")
    title = _TITLES.get(name) or (f"{base} right in {k} tr{'y' if k == '1' else 'ies'}" if at else name)
    for prefix, words in (("reward/", "Reward: "), ("gold/", "Gold: ")):
        title = words + title.removeprefix(prefix) if title.startswith(prefix) else title
    return {"title": title, "name": name, "unit": definition(name).unit, "cells": cells}


def _differences(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each other policy the table of how much more the policy has of everything, by temperature."""
    tables = []
    for other, by_key in found.get("differences", {}).items():
        names = _without_twins(dict.fromkeys(name for row in by_key.values() for name in row))
        rows = [_row(name, [row.get(name) for row in by_key.values()]) for name in names]
        tables.append({"other": _the(other), "temperatures": list(by_key), "rows": rows})
    return tables


def _the(other: str) -> str:
    return "the reference" if other == "reference" else other


def _texts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"policy": name, **row} for name, row in found.get("perplexity", {}).items()]


def _pairs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    shown = []
    for name, row in found.get("pairs", {}).items():
        title = _row(name, [])["title"]
        svg = reliability_chart(row["bins"], title=title) if "bins" in row else ""  # older evaluations have none
        shown.append({"title": title, "svg": svg, **row})
    return shown


def reliability_chart(bins: Sequence[Mapping[str, Any]], *, title: str) -> Markup:
    """How often a reward is right against how sure it is, as inline SVG, with the number of pairs above each bar.

    Args:
        bins: see ``PairScores``.
    """
    full = [part for part in bins if part["count"]]
    told = "; ".join(f"{part['confidence']:.2f} sure: {part['accuracy']:.2f} right" for part in full)
    with matplotlib.rc_context(style(SVG, 8)):
        figure = Figure(figsize=(3.5, 2.5))
        axes = figure.add_axes((0.15, 0.17, 0.82, 0.65))
        for part in full:
            middle, height = (part["low"] + part["high"]) / 2, part["accuracy"]
            axes.bar(middle, height, width=0.09, color=SVG["train"], alpha=0.45, linewidth=0)
            axes.plot(part["confidence"], height, "o", color=SVG["train"], markersize=4)
            beside = {"ha": "center", "fontsize": 7, "color": SVG["ink"], "annotation_clip": False}
            axes.annotate(f"{part['count']:,}", (middle, 1.02), **beside)
        axes.plot([0.5, 1], [0.5, 1], color=SVG["ink"], linewidth=0.8, alpha=0.6)
        axes.set(xlim=(0.5, 1), ylim=(0, 1), xlabel="how sure", ylabel="share right")
        axes.set_title(title if len(title) <= 44 else title[:43] + "…", pad=14, color=SVG["ink"])
        axes.xaxis.set_major_locator(MultipleLocator(0.1))
        axes.yaxis.set_major_locator(MultipleLocator(0.25))
        axes.grid(axis="y")
        return as_svg(figure, f"{title}, by how sure it is: {told}")


def _forest(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each other policy a picture of how often the policy is preferred to it."""
    pictures = []
    for other, by_key in found.get("win_rates", {}).items():
        rows = [
            (f"{judge}, temperature {key}" if len(by_key) > 1 else judge, rates)
            for judge in dict.fromkeys(judge for judges in by_key.values() for judge in judges)
            for key, judges in by_key.items()
            if (rates := judges.get(judge))
        ]
        label = "; ".join(f"{title}: {number(rates['plain']['value'])}" for title, rates in rows)
        pictures.append({"other": _the(other), "svg": win_rate_chart(rows, label=label)})
    return pictures


def win_rate_chart(rows: Sequence[tuple[str, Mapping[str, Any]]], *, label: str) -> Markup:
    """Win rates with their intervals as inline SVG, a line for each row: full dots as they are, hollow at equal length.

    Args:
        rows: a title, and by kind the rate as ``{"value": ..., "low": ..., "high": ...}``, the ends maybe None.
        label: the text for screen readers.
    """
    with matplotlib.rc_context(style(SVG, 8) | {"ytick.labelcolor": SVG["ink"]}):
        high, wide = 0.45 + 0.34 * len(rows), 7.2
        figure = Figure(figsize=(wide, high))
        titles = [title if len(title) <= 44 else title[:43] + "…" for title, _ in rows]
        left = 0.15 + 0.062 * max(map(len, titles), default=0)
        right = 1.25  # for the numbers
        axes = figure.add_axes((left / wide, 0.36 / high, (wide - left - right) / wide, (high - 0.44) / high))
        axes.axvline(0.5, color=SVG["ink"], linewidth=0.8, alpha=0.6)
        for place, (_, rates) in enumerate(rows):
            for kind, (shift, role, face) in _DOTS.items():
                rate = rates[kind]
                y, colour = place + shift, SVG[role]
                known = rate["low"] is not None
                if known:
                    axes.plot([rate["low"], rate["high"]], [y, y], color=colour, linewidth=1.6, solid_capstyle="round")
                axes.plot(rate["value"], y, "o", color=colour, markersize=4.6, markerfacecolor=face or colour)
                told = f"{100 * rate['value']:.0f} %"
                told += f" ({100 * rate['low']:.0f} to {100 * rate['high']:.0f})" if known else ""
                beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
                axes.annotate(told, (1.015, y), color=colour, **beside)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=titles)
        axes.xaxis.set_major_locator(MultipleLocator(0.25))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.grid(axis="x")
        return as_svg(figure, label)


def _side_by_side(folder: Path, columns: Sequence[Column], prompts: int) -> list[dict[str, Any]]:
    """The first completion of each of the first of so many prompts, by column; the other completions come after all."""
    by_column: dict[Column, list[dict[str, Any]]] = {column: [] for column in columns}
    for count, line in enumerate(whole_lines(folder / SAMPLES), start=1):
        try:
            row = json.loads(line)
            by_column[Column(row["policy"], f"{row['temperature']:g}")].append(row)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            message = f"{folder / SAMPLES}, line {count} is not a completion of this evaluation: {error!r}"
            raise UserError(message) from None
    found = []
    for rows in list(zip(*by_column.values(), strict=False))[: min(prompts, _PROMPTS)]:
        cells = [{"text": row["completion"].removeprefix(" "), "values": _values(row)} for row in rows]
        found.append({"prompt": rows[0]["prompt"], "cells": cells})
    return found


def _values(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    gold = [(name, value) for name, value in (row.get("gold") or {}).items()]
    return [("reward", row.get("score")), *gold, ("tokens", row.get("length"))]


# ---- the terminal ---------------------------------------------------------------------------------------------------


def print_tables(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the numbers of an evaluation: a table for every temperature, one of texts, one of pairs."""
    console = console or Console()
    console.print(f"{', '.join(_facts(found))}; ± half a 95 % interval")
    policies = found.get("policies", {})
    for key in next(iter(policies.values()), {}):
        names = list(policies)
        shown = _table(f"temperature {key}", *names)
        summaries = [policies[name][key] for name in names]
        for metric in _without_twins(dict.fromkeys(metric for summary in summaries for metric in summary)):
            shown.add_row(metric, *(_shown(summary.get(metric)) for summary in summaries))
        shown.add_section()
        judges = dict.fromkeys(judge for by_key in found["win_rates"].values() for judge in by_key[key])
        for judge in judges:
            for kind, words in _KINDS.items():
                rates = [found["win_rates"].get(name, {}).get(key, {}).get(judge, {}).get(kind) for name in names]
                shown.add_row(f"policy wins by {judge}{words and f', {words}'}", *map(_shown, rates))
        console.print(shown)
    if "perplexity" in found:
        shown = _table("texts", "perplexity", "bits per byte", "tokens")
        for name, row in found["perplexity"].items():
            shown.add_row(name, _shown(row["perplexity"]), _shown(row["bits_per_byte"]), f"{row['tokens']:,}")
        console.print(shown)
    if "pairs" in found:
        shown = _table("pairs", "accuracy", "calibration error", "loss", "pairs")
        for name, row in found["pairs"].items():
            numbers = (_shown(row[key]) for key in ("accuracy", "calibration_error", "loss"))
            shown.add_row(name, *numbers, f"{row['pairs']:,}")
        console.print(shown)


def _table(*heads: str) -> Table:
    table = Table(heads[0])
    table.columns[0].overflow = "fold"
    for head in heads[1:]:
        table.add_column(Text(printable(head)), justify="right", overflow="fold")
    return table


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        half = (value["high"] - value["low"]) / 2
        return _shown(value["value"]) + ("" if math.isnan(half) else f" ± {half:.3f}")
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
