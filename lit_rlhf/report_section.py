"""What a report says about one run: the files of its folder, read and put into the pieces of a page."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_rlhf.errors import UserError
from lit_rlhf.metrics import AXES, Metric, lookup
from lit_rlhf.report_charts import Series, curves, histogram
from lit_rlhf.report_effect import Effect, Quantity, effect, pair_up, quantities
from lit_rlhf.report_text import duration, number, settings_line, signed
from lit_rlhf.run_folder import ALARMS, CONFIG, METRICS, read_alarms, read_metrics, read_samples, read_summary

#: The usual stages of a pipeline, which are its subfolders, in the order they run; others follow by name.
STAGES = {"sft": "Supervised fine-tuning", "reward_model": "Reward model", "ppo": "Reinforcement learning"}
#: The parts of a configuration that the table of settings shows.
_SETTINGS = (
    "algorithm", "policy", "critic", "reward", "gold", "kl", "clip", "entropy", "sampler", "data", "optimizer",
    "scheduler", "trainer", "precision_used", "seed",
)  # fmt: skip
#: Metrics of an online run that get a small panel.
_SMALL = (
    "loss/policy", "loss/value", "value/explained_variance", "policy/approxkl", "policy/clipfrac", "policy/ratio_max",
    "objective/kl_coef", "optim/lr", "optim/grad_norm", "rollout/eos_rate", "rollout/logprob_gap",
    "rollout/tokens_per_second",
)  # fmt: skip
_EXAMPLES = 12


class Panel(NamedTuple):
    """A chart: its title, the metric it defines itself by, its curves, the label of its x axis."""

    title: str
    metric: str
    series: list[Series]
    x_label: str


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    path: Path
    config: dict[str, Any]
    config_text: str
    rows: list[dict[str, float]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    alarms: dict[str, int]  # a detector's name -> the iteration of its first one

    @property
    def metrics(self) -> list[str]:
        """The names it logged, without `val/`, in the order they first appeared."""
        return list({name.removeprefix("val/"): None for row in self.rows for name in row})

    @property
    def online(self) -> bool:
        """Whether it samples completions."""
        return bool(self.samples) or "objective/kl" in self.metrics

    def column(self, name: str) -> list[tuple[float, float]]:
        """(iteration, value) of the rows that have a metric."""
        return [(row["iteration"], row[name]) for row in self.rows if name in row]

    def series(self, metric: str) -> list[Series]:
        """The curves of a metric in training and on held-out data, as far as they exist."""
        columns = {"train": self.column(metric), "held": self.column(f"val/{metric}")}
        return [
            Series(x=[x for x, _ in points], y=[y for _, y in points], role=role)
            for role, points in columns.items()
            if points
        ]


@dataclass(kw_only=True)
class Section:
    """One run as the page shows it."""

    title: str
    online: bool
    facts: list[str]
    cost: list[str]
    notes: list[str]
    panels: list[dict[str, Any]]
    small: list[dict[str, Any]]
    definitions: list[Metric]
    settings: list[tuple[str, str]]
    config_text: str
    result: str = ""
    times: str = ""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    compared: tuple[int, int] | None = None
    pairs: int = 0
    effects: list[Effect] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)


# --- reading ---


def is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / METRICS).is_file()


def load_runs(path: Path) -> list[Run]:
    folders = [path] if is_run(path) else sorted(filter(is_run, path.glob("[!.]*")), key=_place)
    if not folders:
        raise UserError(
            f"{path} is no run folder and no pipeline folder: there is neither {CONFIG} nor {METRICS} in it, nor in a "
            "subfolder of it."
        )
    return [_load_run(folder) for folder in folders]


def _place(stage: Path) -> tuple[int, str]:
    return (list(STAGES).index(stage.name) if stage.name in STAGES else len(STAGES), stage.name)


def _load_run(path: Path) -> Run:
    file = path / CONFIG
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        config = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a mapping of keys to values.")
    alarms = {str(alarm.get("detector")): alarm["iteration"] for alarm in reversed(read_alarms(path))}
    return Run(path, config, text, read_metrics(path), read_samples(path), read_summary(path), alarms)


# --- one run ---


def make_section(run: Run) -> Section:
    main = list(main_panels(run))
    shown = [panel.metric for panel in main]
    x_label = "iteration" if run.online else "optimiser step"
    rest = [
        Panel("", name, run.series(name), x_label)
        for name in (_SMALL if run.online else run.metrics)
        if name in run.metrics and name not in (*shown, *AXES)
    ]
    section = Section(
        title=STAGES.get(run.path.absolute().name, run.path.absolute().name),
        online=run.online,
        facts=_facts(run),
        cost=_cost(run),
        notes=_notes(run),
        panels=[_panel(panel) for panel in main],
        small=[_panel(panel, small=True) for panel in rest],
        definitions=[definition(name) for name in dict.fromkeys([*shown, *(panel.metric for panel in rest)])],
        settings=_settings(run.config),
        config_text=run.config_text,
    )
    if run.online:
        section.times = _times(run)
        _compare(run, section)
    else:
        section.held_out = _held_out(run)
    section.result = _result(section)
    return section


def main_panels(run: Run) -> Iterator[Panel]:
    if run.online:
        gold = [name for name in run.metrics if name.startswith("gold/")]
        entropy = "policy/entropy" if "policy/entropy" in run.metrics else "objective/entropy"
        wanted = [
            ("Reward", "objective/scores"),
            *((f"Gold: {name.removeprefix('gold/')}", name) for name in gold),
            ("KL to the reference", "objective/kl"),
            ("Entropy", entropy),
            ("Response length", "rollout/response_length"),
        ]
    else:
        wanted = [
            ("Loss", "loss/total"),
            ("Perplexity", "sft/perplexity"),
            ("Token accuracy", "sft/token_accuracy"),
            ("Pair accuracy", "reward_model/accuracy"),
            ("Margin", "reward_model/margin"),
        ]
    x_label = "iteration" if run.online else "optimiser step"
    yield from (Panel(title, name, series, x_label) for title, name in wanted if (series := run.series(name)))
    if run.online:
        yield from _against_kl(run, gold[0] if gold else "objective/scores")


def _against_kl(run: Run, metric: str) -> Iterator[Panel]:
    """What the KL bought: the curve that over-optimisation bends down."""
    for prefix, role in (("val/", "held"), ("", "train")):
        points = [
            (row[f"{prefix}objective/kl"], row[prefix + metric])
            for row in run.rows
            if f"{prefix}objective/kl" in row and prefix + metric in row
        ]
        if len(points) > 1:
            title = "Reward" if metric == "objective/scores" else f"Gold: {metric.removeprefix('gold/')}"
            series = Series(x=[x for x, _ in points], y=[y for _, y in points], role=role)
            yield Panel(f"{title} against KL", metric, [series], "KL, nats per completion")
            return


def _panel(panel: Panel, small: bool = False) -> dict[str, Any]:
    newest = panel.series[-1]
    label = f"{panel.title or panel.metric}: {number(newest.y[-1])} at the end"
    return {
        "title": panel.title,
        "metric": panel.metric,
        "unit": definition(panel.metric).unit,
        "last": newest.y[-1],
        "role": newest.role,
        "svg": curves(panel.series, x_label=panel.x_label, label=label, small=small),
    }


def definition(name: str) -> Metric:
    """The entry of a metric, also of one that only the user knows."""
    try:
        return lookup(name)
    except UserError:
        return Metric(name=name, meaning="a metric of this run's own", unit="", better=None)


def _facts(run: Run) -> list[str]:
    algorithm, policy = run.config.get("algorithm"), run.config.get("policy")
    last = run.rows[-1] if run.rows else {}
    facts = []
    if isinstance(algorithm, dict) and "_target_" in algorithm:
        facts.append(str(algorithm["_target_"]).rpartition(".")[2])
    if isinstance(policy, dict) and "path" in policy:
        facts.append(str(policy["path"]))
    if "iteration" in last:
        facts.append(f"{last['iteration']:,} {'iterations' if run.online else 'optimiser steps'}")
    if run.online and "episode" in last:
        facts.append(f"{last['episode']:,} completions")
    return [*facts, f"seed {run.config['seed']}"] if "seed" in run.config else facts


def _cost(run: Run) -> list[str]:
    seconds, memory = run.summary.get("wall_seconds"), run.summary.get("peak_memory_gb")
    return [
        *([duration(seconds)] if isinstance(seconds, int | float) else []),
        *([f"{number(memory)} GB peak memory"] if isinstance(memory, int | float) else []),
        str(run.summary.get("status", "in progress")),
    ]


def _result(section: Section) -> str:
    """The outcome of a run in one line, for the overview of a pipeline."""
    judged = [f"{e.quantity.label} {signed(e.change)}" for e in section.effects if e.quantity.judged]
    others = [f"KL {number(e.after)} nats" for e in section.effects if e.quantity.keys == ("kl",)]
    held_out = [
        f"held-out {row['metric'].name} {number(row['last'][1])}"
        for row in section.held_out
        if row["best"] and not row["metric"].name.endswith("loss")
    ]
    return ", ".join([*judged, *others, *held_out])


def _notes(run: Run) -> list[str]:
    notes = []
    if "status" not in run.summary:
        notes.append("The run has not ended yet; this page shows it up to its newest row.")
    elif run.summary["status"] != "completed":
        notes.append(f"The run ended early: {run.summary['status']}.")
    elif "stopped_by" in run.summary:
        notes.append(f"The run was stopped by {run.summary['stopped_by']}.")
    for detector, iteration in run.alarms.items():
        notes.append(f"Alarm of the reward-hacking monitor in iteration {iteration}: {detector}. See {ALARMS}.")
    if not run.rows:
        notes.append("No row of metrics has been logged.")
    if not run.config:
        notes.append(f"There is no {CONFIG}, so the settings are unknown.")
    return notes


def _times(run: Run) -> str:
    """Median seconds of an iteration and of its stages."""
    names = [name for name in run.metrics if name.startswith("time/") and name != "time/iteration"]
    median = {name: statistics.median([value for _, value in run.column(name)] or [0.0]) for name in names}
    whole = [value for _, value in run.column("time/iteration")]
    if not whole:
        return ""
    stages = ", ".join(f"{name.removeprefix('time/')} {number(value)} s" for name, value in median.items())
    return f"{number(statistics.median(whole))} s" + (f": {stages}" if stages else "")


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, settings_line(config[name])) for name in _SETTINGS if config.get(name) not in (None, {}, [])]


def _held_out(run: Run) -> list[dict[str, Any]]:
    """Held-out metrics of an offline stage: at the first and last validation, and the best."""
    table = []
    for name in run.metrics:
        points = run.column(f"val/{name}")
        if name in AXES or not points:
            continue
        better = definition(name).better
        finite = [point for point in points if math.isfinite(point[1])]
        best = (max if better == "higher" else min)(finite, key=lambda p: p[1]) if better and finite else None
        table.append({"metric": definition(name), "first": points[0], "last": points[-1], "best": best})
    return table


def _compare(run: Run, section: Section) -> None:
    held = [row for row in run.samples if row.get("split") == "validation"]
    iterations = sorted({row["iteration"] for row in held})
    if len(iterations) < 2:
        there = f"only those of iteration {iterations[0]}" if iterations else "none"
        section.notes.append(
            f"There is no comparison of before and after: of completions of held-out prompts there are {there}."
        )
        return
    section.compared = (iterations[0], iterations[-1])
    pairs = pair_up(held, *section.compared)
    section.pairs = len(pairs)
    compared = quantities(pairs)
    section.effects = [found for quantity in compared if (found := effect(quantity, pairs)) is not None]
    if not any(found.quantity.keys[0] == "gold" for found in section.effects):
        section.notes.append("No gold judge scored the completions: a reward that was gamed would look the same here.")
    for found in section.effects:
        if found.quantity.judged:
            before, after = zip(*found.quantity.of_pairs(pairs), strict=True)
            title = found.quantity.label
            text = f"{title} of {found.n} completions before and after"
            section.histograms.append({"title": title, "svg": histogram(before, after, label=text)})
    section.examples = [
        {"prompt": before["prompt"], "sides": [_side(before, compared), _side(after, compared)]}
        for before, after in pairs[:_EXAMPLES]
    ]


def _side(row: dict[str, Any], compared: list[Quantity]) -> dict[str, Any]:
    values = [({"kl": "KL"}.get(q.keys[-1], q.keys[-1]), q.of(row)) for q in compared]
    return {
        "text": row["completion"].removeprefix(" "),  # nearly all continue their prompt with a space
        "values": [(name, value) for name, value in values if value is not None],
    }
