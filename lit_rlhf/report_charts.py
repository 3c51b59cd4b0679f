"""The charts of a report: matplotlib, drawn as SVG that takes its colours from the page, or as PNG."""

import colorsys
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Roles of colour. In SVG each stands for a CSS variable of the page, which knows whether it is light or dark.
_PNG = {"ink": "#5b6066", "rule": "#cdd2d7", "train": "#2f6db5", "held": "#c2571a", "before": "#8d949c"}
_SVG = {role: f"#01020{number}" for number, role in enumerate(_PNG)}

_STYLE = {
    "svg.fonttype": "none",  # text stays text: sharp, searchable, in the page's own font
    "svg.hashsalt": "lit_rlhf",  # the same run gives the same bytes
    "text.parse_math": False,  # a component may be called "$"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.constrained_layout.h_pad": 0.02,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one curve. `role` is "train" (a line) or "held" (dots on a line, for held-out data)."""

    x: Sequence[float]
    y: Sequence[float]
    role: str


def _style(colours: dict[str, str], size: float) -> dict[str, object]:
    ink, rule = colours["ink"], colours["rule"]
    return _STYLE | {
        "font.size": size,
        "axes.titlesize": size + 1,
        "axes.edgecolor": rule,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "axes.labelcolor": ink,
        "grid.color": rule,
        "grid.linewidth": 0.4,
    }


def _draw_curves(axes: Axes, series: Sequence[Series], x_label: str, colours: dict[str, str]) -> None:
    for one in series:
        y = [value if math.isfinite(value) else math.nan for value in one.y]
        alone = {"marker": "o", "markersize": 3} if one.role == "held" or len(y) == 1 else {}
        axes.plot(one.x, y, color=colours[one.role], linewidth=1.3, **alone)
    _frame(axes, [x for one in series for x in one.x], x_label)


def _frame(axes: Axes, x: Sequence[float], x_label: str) -> None:
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(useOffset=False, scilimits=(-3, 4))
    axes.margins(y=0.12)
    end = max(x)
    axes.set_xlim(min(0.0, *x) - 0.03 * end, 1.03 * end or 1.0)
    axes.set_xlabel(x_label, labelpad=1)


def curves(series: Sequence[Series], *, x_label: str, label: str, small: bool = False) -> Markup:
    """One panel of curves as inline SVG; `label` is its text for screen readers."""
    with matplotlib.rc_context(_style(_SVG, 7.5)):
        figure = Figure(figsize=(2.3, 1.35) if small else (3.0, 1.85))
        _draw_curves(figure.subplots(), series, x_label, _SVG)
        return _svg(figure, label)


def histogram(before: Sequence[float], after: Sequence[float], *, label: str) -> Markup:
    """Two distributions over common bins as inline SVG."""
    low, high = min([*before, *after]), max([*before, *after])
    edges = [low + (high - low) * i / 24 for i in range(25)] if high > low else [low - 0.5, low + 0.5]
    with matplotlib.rc_context(_style(_SVG, 7.5)):
        figure = Figure(figsize=(4.5, 1.9))
        axes = figure.subplots()
        for values, role in ((before, "before"), (after, "train")):
            axes.hist(values, bins=edges, histtype="stepfilled", color=_SVG[role], alpha=0.22)
            axes.hist(values, bins=edges, histtype="step", color=_SVG[role], linewidth=1.3)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y")
        axes.set_ylabel("completions")
        return _svg(figure, label)


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    start = text.index("<svg")
    box = f"0 0 {figure.get_figwidth() * 72:g} {figure.get_figheight() * 72:g}"
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", start) + 1 :], flags=re.DOTALL)
    for role, colour in _SVG.items():
        body = body.replace(colour, f"var(--{role})")
    head = Markup('<svg role="img" aria-label="{}" viewBox="{}" xmlns:xlink="http://www.w3.org/1999/xlink">')
    return head.format(label, box) + Markup(body)


def png(panels: Sequence[tuple[str, Sequence[Series], str]]) -> bytes:
    """Up to six panels (title, series, x label) as one picture, 2 x 3, with a legend in the first."""
    wide = {"figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.08}
    with matplotlib.rc_context(_style(_PNG, 9) | wide):
        figure = Figure(figsize=(10, 5), dpi=160)
        grid = list(figure.subplots(2, 3).flat)
        for axes, (title, series, x_label) in zip(grid, panels, strict=False):
            _draw_curves(axes, series, x_label, _PNG)
            axes.set_title(title, loc="left", color="#1c1e21")
        names = {"train": "training", "held": "held-out"}
        grid[0].legend([names[one.role] for one in panels[0][1]], frameon=False, labelcolor="linecolor")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


# --- several runs ---

#: Readable on white and on black.
_SETTINGS = (
    "#3b7dc9", "#d2691e", "#2f9e5f", "#c2478a", "#8468d6", "#b0901e", "#2aa3b5", "#a06a45", "#e0525f", "#7d8894",
)  # fmt: skip

#: With more settings than this, pictures and legends say less about each.
MANY = 12


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve's mean over the seeds of a setting, between the lowest and the highest of them."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """The evaluations of one setting: of every seed its points (KL, reward) in the order of training."""

    mark: str  # written beside the last ones
    runs: Sequence[Sequence[tuple[float, float]]]
    held: Sequence[bool]  # per run: of held-out prompts (a full dot) or of training (a hollow one)
    colour: str


def setting_colours(count: int) -> list[str]:
    """As many colours: distinct ones as long as there are enough, else the hues in order."""
    if count <= len(_SETTINGS):
        return list(_SETTINGS[:count])
    hues = [colorsys.hls_to_rgb(0.86 * i / count, 0.47, 0.62) for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in hue) for hue in hues]


def draw_bands(axes: Axes, bands: Sequence[Band], x_label: str) -> None:
    for band in bands:
        mean, low, high = ([v if math.isfinite(v) else math.nan for v in y] for y in (band.mean, band.low, band.high))
        alone = {"marker": "o", "markersize": 3} if len(mean) == 1 else {}
        if low != high:
            axes.fill_between(band.x, low, high, color=band.colour, alpha=0.16, linewidth=0)
        axes.plot(band.x, mean, color=band.colour, linewidth=1.2 if len(bands) <= 10 else 0.8, **alone)
    _frame(axes, [x for band in bands for x in band.x], x_label)


def draw_clouds(axes: Axes, clouds: Sequence[Cloud], edge: Sequence[tuple[float, float]], ink: str) -> None:
    """Reward against KL; `edge` is the frontier, as dashed steps. Of many clouds, those on it alone are marked."""
    if len(edge) > 1:
        dashed = {"linewidth": 0.8, "linestyle": (0, (4, 3)), "alpha": 0.7, "drawstyle": "steps-post"}
        axes.plot(*zip(*edge, strict=True), color=ink, zorder=1, **dashed)
    crowded = sum(len(cloud.runs) for cloud in clouds) > 10
    marked = [cloud for cloud in clouds if len(clouds) <= MANY or any(points[-1] in edge for points in cloud.runs)]
    for cloud in clouds:
        for points, held in zip(cloud.runs, cloud.held, strict=True):
            if len(points) > 1:
                way = {"linewidth": 0.4 if crowded else 0.8, "marker": "o", "markersize": 2.0}
                axes.plot(*zip(*points, strict=True), color=cloud.colour, alpha=0.35 if crowded else 0.6, **way)
            face = {} if held else {"markerfacecolor": "none"}
            axes.plot(*points[-1], marker="o", markersize=5, color=cloud.colour, zorder=3, **face)
        ends = [points[-1] for points in cloud.runs]
        centre = (sum(x for x, _ in ends) / len(ends), sum(y for _, y in ends) / len(ends))
        for x, y in ends if len(ends) > 1 else ():
            axes.plot([centre[0], x], [centre[1], y], color=cloud.colour, linewidth=1.5, zorder=2)
        place = {"xytext": (4, 3), "textcoords": "offset points", "fontweight": "bold", "zorder": 4}
        if cloud in marked:
            axes.annotate(cloud.mark, centre, color=cloud.colour, **place)
    kl = [0.0, *(x for cloud in clouds for points in cloud.runs for x, _ in points)]  # an estimate may be negative
    _frame(axes, kl, "KL, nats per completion")
    room = 0.04 * (max(kl) - min(kl)) or 1.0
    axes.set_xlim(min(kl) - room, max(kl) + room)


def drawn_twice(
    draw: Callable[[Axes, str], None],
    *,
    size: tuple[float, float],
    label: str,
    title: str,
    legend: Sequence[tuple[str, str]],
    legend_title: str = "",
) -> tuple[Markup, bytes]:
    """What `draw(axes, ink)` draws, as inline SVG and as PNG; only the PNG has a title and a legend of its own."""
    with matplotlib.rc_context(_style(_SVG, 7.5)):
        figure = Figure(figsize=size)
        draw(figure.subplots(), _SVG["ink"])
        svg = _svg(figure, label)
    with matplotlib.rc_context(_style(_PNG, 9)):
        columns = -(-len(legend) // 20)
        figure = Figure(figsize=(7.0 + 3.2 * columns, 4.6), dpi=120)
        axes = figure.subplots()
        draw(axes, _PNG["ink"])
        axes.set_title(title, loc="left", color="#1c1e21")
        handles = [axes.plot([], [], color=colour, linewidth=3)[0] for _, colour in legend]
        names = [re.sub(r"[^\x20-\uffff]+", " ", name)[:46] for name, _ in legend]
        style = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left", "ncols": columns}
        figure.legend(handles, names, loc="outside right upper", title=legend_title or None, **style)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return svg, buffer.getvalue()
