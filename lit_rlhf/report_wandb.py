"""The comparison of a multirun's jobs as one more W&B run of their group: the panels of report.html, and the page."""

from pathlib import Path
from typing import Any

import wandb
from omegaconf import OmegaConf

from lit_rlhf.loggers.wandb import WandbLogger, latest_run
from lit_rlhf.report_comparison import PICTURES
from lit_rlhf.report_comparison_data import Comparison, band, compare, evaluations, is_reward, samples, x_axis
from lit_rlhf.report_comparison_table import REPORT, columns, table
from lit_rlhf.run_folder import finite


def share_comparison(folder: Path) -> None:
    """Logs the report of a multirun where its jobs logged: to their project and group, offline if all of them were.

    Nothing happens if none of them logged to W&B; a failure of W&B costs a warning.

    Raises:
        UserError: the folder holds no job, or a file in it cannot be read.
    """
    comparison = compare([folder])
    logged = [run for run in comparison.runs if latest_run(run.path)[0] and _settings(run.config)]
    if not logged:
        return
    ids, online = zip(*(latest_run(run.path) for run in logged), strict=True)
    first = _settings(logged[0].config)
    logger = WandbLogger(
        save_dir=folder,
        **{key: first[key] for key in ("project", "entity", "group", "tags") if first.get(key)},
        name=f"report {folder.absolute().name}"[:128],
        job_type="report",
        mode="online" if any(online) else "offline",
    )
    logger.log_hyperparams({"multirun": str(folder.absolute()), "runs": list(ids), "varied": comparison.keys})
    logger.log_objects("the report", lambda: panels(comparison, folder))
    logger.finish()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    node = OmegaConf.create((config.get("logger") or {}).get("wandb") or {})
    return OmegaConf.to_container(node, resolve=True)  # what comes from the environment stands there as a reference


def panels(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """W&B's objects: `frontier/`, `curves/`, `results`, `samples`, and from disk `pictures/` and `report`.

    Every row of a table that is made of numbers says from which setting it is, and with which overrides.
    """
    objects: dict[str, Any] = {"results": _results(comparison, folder), "bands": _bands(comparison)}
    for metric in filter(is_reward, comparison.titles):
        points = _evaluations(comparison, metric)
        title = f"{comparison.titles[metric]} against KL"
        objects[f"frontier/{metric}"] = wandb.plot.scatter(points, "kl", "reward", title=title)
    for metric, title in comparison.titles.items():
        if lines := _curves(comparison, metric):
            keys, xs, ys = zip(*lines, strict=True)
            axis = x_axis(comparison.settings)
            objects[f"curves/{metric}"] = wandb.plot.line_series(list(xs), list(ys), list(keys), title, xname=axis)
    columns, prompts = samples(comparison.settings)
    if prompts:
        data = [[row["prompt"], *map(_completion, row["cells"])] for row in prompts]
        objects["samples"] = wandb.Table(["prompt", *(f"{one.number}  {one.label}" for one in columns)], data)
    for picture in sorted((folder / PICTURES).glob("*.png")):
        objects[f"pictures/{picture.stem}"] = wandb.Image(str(picture))
    return objects | {"report": wandb.Html(str(folder / REPORT), inject=False)}


def _results(comparison: Comparison, folder: Path) -> wandb.Table:
    heads = ["setting", *comparison.keys, "runs"]
    # What the page sets in bold is true in a column of its own.
    parts = [("", "mean"), (" lowest", "low"), (" highest", "high"), (" marked", "marked")]
    shown = [[part for part in parts if part[1] != "marked" or column.marked] for column in columns(comparison)]
    for column, kinds in zip(columns(comparison), shown, strict=True):
        heads += [f"{column.name}{end}" for end, _ in kinds]
    data = []
    for row in table(comparison, folder):
        one = row["setting"]
        states = ", ".join(f"{state['name']}: {state['state']}" for state in row["states"])
        cells = zip(row["values"], shown, strict=True)
        values = [finite(cell[part]) for cell, kinds in cells for _, part in kinds]
        data.append([one.number, *(one.values.get(key) for key in comparison.keys), states, *values])
    return wandb.Table(heads, data)


def _evaluations(comparison: Comparison, metric: str) -> wandb.Table:
    data = []
    for one in comparison.settings:
        chosen = [one.values.get(key) for key in comparison.keys]
        for member in one.members:
            points, held = evaluations(member.run, metric) if member.run is not None else ([], False)
            data += [[one.number, *chosen, member.folder.name, held, kl, reward] for kl, reward in points]
    return wandb.Table(["setting", *comparison.keys, "run", "held_out", "kl", "reward"], data)


def _bands(comparison: Comparison) -> wandb.Table:
    axis = x_axis(comparison.settings)
    data = []
    for one in comparison.settings:
        chosen = [one.values.get(key) for key in comparison.keys]
        for metric in comparison.titles:
            if found := band(one.runs, metric, axis, one.look):
                places = zip(found.x, found.mean, found.low, found.high, strict=True)
                data += [[one.number, *chosen, metric, *map(finite, place)] for place in places]
    return wandb.Table(["setting", *comparison.keys, "metric", axis, "mean", "lowest", "highest"], data)


def _curves(comparison: Comparison, metric: str) -> list[tuple[str, list[float], list[float]]]:
    """Of every setting its label and its curve, the mean over the seeds."""
    axis = x_axis(comparison.settings)
    found = [(one, band(one.runs, metric, axis, one.look)) for one in comparison.settings]
    return [(f"{one.number}  {one.label}", list(line.x), list(line.mean)) for one, line in found if line is not None]


def _completion(cell: dict[str, Any]) -> str:
    return "\n".join([cell["text"], "  ".join(f"{name} {value:.4g}" for name, value in cell["values"])])
