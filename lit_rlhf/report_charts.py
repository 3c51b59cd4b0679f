"""The charts of a report: matplotlib, drawn as SVG that takes its colours from the page, or as PNG."""

import io
import math
import re
from collections.abc import Sequence
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
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(useOffset=False, scilimits=(-3, 4))
    axes.margins(y=0.12)
    end = max(x for one in series for x in one.x)
    axes.set_xlim(min(0.0, *(x for one in series for x in one.x)) - 0.03 * end, 1.03 * end or 1.0)
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
