"""The charts of one run: matplotlib, drawn as SVG that takes its colours from the page, or as PNG."""

import functools
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Roles of colour. In SVG each stands for a CSS variable of the page, which knows whether it is light or dark.
PNG = {"ink": "#5b6066", "rule": "#cdd2d7", "train": "#2f6db5", "held": "#c2571a", "before": "#8d949c"}
SVG = {role: f"#01020{number}" for number, role in enumerate(PNG)}

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
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one curve. `role` is "train" (a line) or "held" (dots on a line, for held-out data)."""

    x: Sequence[float]
    y: Sequence[float]
    role: str


def style(colours: dict[str, str], size: float) -> dict[str, object]:
    """matplotlib's settings for these colours by role, with text of `size` points."""
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
    frame(axes, [x for one in series for x in one.x], x_label)


def frame(axes: Axes, x: Sequence[float], x_label: str) -> None:
    """The grid, ticks and limits that charts share; `x` is what they show along the x axis."""
    axes.grid(True, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(useOffset=False, scilimits=(-3, 4))
    axes.margins(y=0.12)
    end = max(x)
    axes.set_xlim(min(0.0, *x) - 0.03 * end, 1.03 * end or 1.0)
    axes.set_xlabel(x_label, labelpad=1)


def fit(axes: Axes, *, right: float = 0.0) -> None:
    """Makes the only axes of a figure as large as its labels allow; `right` inches of the figure stay free.

    The labels' sizes are estimated: matplotlib's own layouts measure them, which takes as long as to draw the chart.
    """
    figure, size = axes.figure, matplotlib.rcParams["font.size"] / 72
    wide, high = figure.get_size_inches()
    labels, _ = _labels(axes.yaxis, axes.get_ylim())
    left = 0.08 + 0.64 * size * max(map(len, labels), default=0) + (1.4 * size if axes.get_ylabel() else 0.0)
    bottom = 0.1 + 1.2 * size * (2 if axes.get_xlabel() else 1)
    shifted = axes.yaxis.get_major_formatter().get_offset()  # a power of ten above the axis
    top = 0.03 + 0.4 * size + (1.5 * size if shifted else 0.0) + (1.8 * size if axes.get_title(loc="left") else 0.0)
    labels, beyond = _labels(axes.xaxis, axes.get_xlim())
    over = 0.32 * size * max(map(len, labels[-1:]), default=0) - beyond * (wide - left - right)
    right += max(0.03, over)
    width, height = max(0.1, 1 - (left + right) / wide), max(0.1, 1 - (bottom + top) / high)
    axes.set_position((left / wide, bottom / high, width, height))


def _labels(axis: Axis, limits: tuple[float, float]) -> tuple[list[str], float]:
    """The labels of an axis in order, and the part of it that lies beyond the last."""
    low, high = limits
    places = [place for place in axis.get_majorticklocs() if low <= place <= high]
    return axis.get_major_formatter().format_ticks(places), (high - places[-1]) / (high - low) if places else 0.0


def curves(series: Sequence[Series], *, x_label: str, label: str, small: bool = False) -> Markup:
    """One panel of curves as inline SVG; `label` is its text for screen readers."""
    with matplotlib.rc_context(style(SVG, 7.5)):
        axes = _empty_panel(small)
        try:
            _draw_curves(axes, series, x_label, SVG)
            fit(axes)
            return as_svg(axes.figure, label)
        finally:
            for line in list(axes.lines):
                line.remove()
            axes.relim()
            axes.set_ylim(-0.062, 0.062, auto=True)  # what new axes show of values that are not finite


@functools.cache
def _empty_panel(small: bool) -> Axes:
    """Axes that all panels of a size share, one after another: making their ticks takes longer than drawing them."""
    return Figure(figsize=(2.3, 1.35) if small else (3.0, 1.85)).subplots()


def histogram(before: Sequence[float], after: Sequence[float], *, label: str) -> Markup:
    """Two distributions over common bins as inline SVG."""
    low, high = min([*before, *after]), max([*before, *after])
    edges = [low + (high - low) * i / 24 for i in range(25)] if high > low else [low - 0.5, low + 0.5]
    with matplotlib.rc_context(style(SVG, 7.5)):
        figure = Figure(figsize=(4.5, 1.9))
        axes = figure.subplots()
        for values, role in ((before, "before"), (after, "train")):
            axes.hist(values, bins=edges, histtype="stepfilled", color=SVG[role], alpha=0.22)
            axes.hist(values, bins=edges, histtype="step", color=SVG[role], linewidth=1.3)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y")
        axes.set_ylabel("completions")
        fit(axes)
        return as_svg(figure, label)


def as_svg(figure: Figure, label: str) -> Markup:
    """A figure drawn in the colours of `SVG` as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    start = text.index("<svg")
    box = f"0 0 {figure.get_figwidth() * 72:g} {figure.get_figheight() * 72:g}"
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", start) + 1 :], flags=re.DOTALL)
    for role, colour in SVG.items():
        body = body.replace(colour, f"var(--{role})")
    head = Markup('<svg role="img" aria-label="{}" viewBox="{}" xmlns:xlink="http://www.w3.org/1999/xlink">')
    return head.format(label, box) + Markup(body)


def png(panels: Sequence[tuple[str, Sequence[Series], str]]) -> bytes:
    """Up to six panels (title, series, x label) as one picture, 2 x 3, with a legend in the first."""
    with matplotlib.rc_context(style(PNG, 9)):
        figure = Figure(figsize=(10, 5), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        grid = list(figure.subplots(2, 3).flat)
        for axes, (title, series, x_label) in zip(grid, panels, strict=False):
            _draw_curves(axes, series, x_label, PNG)
            axes.set_title(title, loc="left", color="#1c1e21")
        names = {"train": "training", "held": "held-out"}
        grid[0].legend([names[one.role] for one in panels[0][1]], frameon=False, labelcolor="linecolor")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()
