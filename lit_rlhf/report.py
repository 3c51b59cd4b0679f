"""report.html: what a run, a pipeline of runs, or several runs side by side changed, on one page that opens from disk.

The page is made of what the run folder holds (config.yaml, metrics.csv, samples.jsonl, summary.json), also of a run
that is still going, and says what is missing. It needs no network and no script; everything that a model or a user
wrote is escaped.
"""

from pathlib import Path

from lit_rlhf.config import plain_command
from lit_rlhf.errors import UserError
from lit_rlhf.report_charts import png
from lit_rlhf.report_comparison import build_comparison, common_folder
from lit_rlhf.report_comparison_data import is_multirun
from lit_rlhf.report_evaluation import build_evaluation
from lit_rlhf.report_section import STAGES, definition, is_run, load_runs, main_panels, make_section
from lit_rlhf.report_text import render
from lit_rlhf.run_folder import EVALUATION, replace_file

REPORT, PICTURE = "report.html", "report.png"


def build_report(path: Path) -> Path:
    """Writes `<path>/report.html` for a run of any stage, a pipeline, a multirun or an evaluation; returns its path.

    Raises:
        UserError: the folder is none of these, or a file in it cannot be read.
    """
    path = Path(path)
    if is_multirun(path):
        return build_comparison([path], path)
    if (path / EVALUATION).is_file():
        return build_evaluation(path)
    runs = load_runs(path)
    pipeline = runs[0].path != path
    usual = pipeline and all(run.path.name in STAGES for run in runs)
    page = render(
        "report.html.jinja",
        title=path.absolute().name,
        pipeline=pipeline,
        sections=[make_section(run) for run in runs],
        missing=[title for stage, title in STAGES.items() if usual and not is_run(path / stage)],
    )
    replace_file(path / REPORT, page)
    return path / REPORT


def picture(path: Path) -> Path:
    """Writes `<path>/report.png`, the main curves of a run (of a pipeline, its last stage), and returns its path.

    Raises:
        UserError: as `build_report`; or the run has no metrics yet.
    """
    path = Path(path)
    run = load_runs(path)[-1]
    panels = list(main_panels(run))[:6]
    if not panels:
        raise UserError(f"{run.path} has no metrics to draw yet.")
    units = [definition(panel.metric).unit for panel in panels]
    titles = [
        f"{panel.title}, {unit}" if unit.startswith(("nats", "tokens")) else panel.title
        for panel, unit in zip(panels, units, strict=True)
    ]
    drawn = [(title, panel.series, panel.x_label) for title, panel in zip(titles, panels, strict=True)]
    (path / PICTURE).write_bytes(png(drawn))
    return path / PICTURE


USAGE = "lit-rlhf report FOLDER [FOLDER ...]: a run, pipeline, multirun or evaluation; several are compared on one page"


@plain_command(USAGE)
def main(arguments: list[str]) -> None:
    """Writes report.html into the named folder; for several, a comparison into `comparison/` beside them."""
    if not arguments:
        raise UserError(f"usage: {USAGE}")
    paths = [Path(argument) for argument in arguments]
    print(build_report(paths[0]) if len(paths) == 1 else build_comparison(paths, common_folder(paths)))
