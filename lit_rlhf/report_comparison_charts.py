"""The charts of several runs: their curves with seeds as bands, and reward against KL."""

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
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lit_rlhf.report_charts import PNG, SVG, as_svg, fit, frame, style

#: Readable on white and on black.
_COLOURS = (
    "#3b7dc9", "#d2691e", "#2f9e5f", "#c2478a", "#8468d6", "#b0901e", "#2aa3b5", "#a06a45", "#e0525f", "#7d8894",
)  # fmt: skip

#: Dashes in widths of the line, and the marker that goes with them.
_LINES = (((), "o"), ((4.5, 1.8), "s"), ((1.2, 1.5), "^"))
_SHAPES = {
    "o": '<circle cx="14" cy="5" r="3.6"/>',
    "s": '<path d="M10.8 1.8h6.4v6.4h-6.4z"/>',
    "^": '<path d="M14 .8l4 7.6h-8z"/>',
}

#: With more settings than this, pictures and legends say less about each.
MANY = 12


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a setting is drawn, in every picture the same."""

    colour: str
    dashes: Sequence[float] = ()  # none: a solid line
    marker: str = "o"

    @property
    def line(self) -> dict[str, object]:
        """matplotlib's arguments for a line."""
        return {"color": self.colour, "linestyle": (0, tuple(self.dashes)) if self.dashes else "-"}

    @property
    def key(self) -> Markup:
        """The line and its marker as an element of a page, for legends."""
        dashes = " ".join(f"{1.6 * part:g}" for part in self.dashes)
        line = Markup('<path d="M0 5h28" stroke="{0}" stroke-width="2" stroke-dasharray="{1}"/>')
        frame = Markup('<svg class="look" viewBox="0 0 28 10" aria-hidden="true"><g fill="{0}">{1}{2}</g></svg>')
        return frame.format(self.colour, line.format(self.colour, dashes or "none"), Markup(_SHAPES[self.marker]))


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve's mean over the seeds of a setting, between the lowest and the highest of them."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    look: Look


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """The evaluations of one setting: of every seed its points (KL, reward) in the order of training."""

    mark: str = ""  # written beside the last ones
    runs: Sequence[Sequence[tuple[float, float]]]
    held: Sequence[bool]  # per run: of held-out prompts (full dots, joined) or of training (hollow ones)
    look: Look

    @property
    def end(self) -> tuple[float, float]:
        """The mean of the seeds' last points."""
        x, y = zip(*(points[-1] for points in self.runs), strict=True)
        return sum(x) / len(x), sum(y) / len(y)


def looks(chosen: Sequence[Sequence[str]]) -> list[Look]:
    """A look for each setting, from its values of the keys that vary.

    In a full grid of two keys, the colour is that of the first and the line and marker that of the second; the other
    way round where there are too few kinds of lines for the second. Otherwise every setting has a colour of its own.
    """
    for hue, line in ((0, 1), (1, 0)) if all(len(values) == 2 for values in chosen) else ():
        hues, lines = (list(dict.fromkeys(values[place] for values in chosen)) for place in (hue, line))
        grid = len(hues) * len(lines) == len(chosen) == len(set(map(tuple, chosen)))
        if grid and 1 < len(lines) <= len(_LINES):
            colours = dict(zip(hues, _colours(len(hues)), strict=True))
            kinds = dict(zip(lines, _LINES, strict=False))
            found = [(colours[values[hue]], *kinds[values[line]]) for values in chosen]
            return [Look(colour=colour, dashes=dashes, marker=marker) for colour, dashes, marker in found]
    return [Look(colour=colour) for colour in _colours(len(chosen))]


def _colours(count: int) -> list[str]:
    """As many colours: distinct ones as long as there are enough, else the hues in order."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    hues = [colorsys.hls_to_rgb(0.86 * i / count, 0.47, 0.62) for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in hue) for hue in hues]


def draw_bands(axes: Axes, bands: Sequence[Band], x_label: str) -> None:
    for band in bands:
        mean, low, high = ([v if math.isfinite(v) else math.nan for v in y] for y in (band.mean, band.low, band.high))
        alone = {"marker": band.look.marker, "markersize": 3} if len(mean) == 1 else {}
        if low != high:
            axes.fill_between(band.x, low, high, color=band.look.colour, alpha=0.16, linewidth=0)
        axes.plot(band.x, mean, linewidth=1.2 if len(bands) <= 10 else 0.8, **band.look.line, **alone)
    frame(axes, [x for band in bands for x in band.x], x_label)


def draw_clouds(axes: Axes, clouds: Sequence[Cloud], edge: Sequence[tuple[float, float]], ink: str) -> None:
    """Reward against KL; `edge` is the frontier, as grey steps."""
    if len(edge) > 1:
        axes.plot(*zip(*edge, strict=True), color=ink, alpha=0.28, linewidth=2.4, drawstyle="steps-post", zorder=1)
    crowded = sum(len(cloud.runs) for cloud in clouds) > 10
    for cloud in clouds:
        colour, marker = cloud.look.colour, cloud.look.marker
        for points, held in zip(cloud.runs, cloud.held, strict=True):
            face = {"marker": marker, "color": colour} | ({} if held else {"markerfacecolor": "none"})
            if len(points) > 1:
                way = {"linewidth": 0.4 if crowded else 0.8} | cloud.look.line if held else {"linestyle": "none"}
                small = {"markersize": 2.2 if held else 2.8, "markeredgewidth": 0.6, "alpha": 0.35 if crowded else 0.6}
                axes.plot(*zip(*points[:-1] if not held else points, strict=True), **face | way | small)
            axes.plot(*points[-1], markersize=5.5, zorder=3, **face)
        x, y = cloud.end
        for points in cloud.runs if len(cloud.runs) > 1 else ():
            axes.plot([x, points[-1][0]], [y, points[-1][1]], color=colour, linewidth=1.5, zorder=2)
        place = {"xytext": (4, 3), "textcoords": "offset points", "fontweight": "bold", "zorder": 4}
        axes.annotate(cloud.mark, (x, y), color=colour, **place)
    kl = [0.0, *(x for cloud in clouds for points in cloud.runs for x, _ in points)]  # an estimate may be negative
    frame(axes, kl, "KL, nats per completion")
    room = 0.04 * (max(kl) - min(kl)) or 1.0
    axes.set_xlim(min(kl) - room, max(kl) + room)


def drawn_twice(
    draw: Callable[[Axes, str], None],
    *,
    size: tuple[float, float],
    title: str,
    y_label: str,
    legend: Sequence[tuple[str, Look]],
    legend_title: str = "",
) -> tuple[Markup, bytes]:
    """What `draw(axes, ink)` draws, as inline SVG and as PNG; only the PNG has its title, y label and legend in it."""
    ticks = MaxNLocator(7, steps=[1, 2, 2.5, 5, 10])  # of charts that are large
    with matplotlib.rc_context(style(SVG, 7.5)):
        axes = Figure(figsize=size).subplots()
        draw(axes, SVG["ink"])
        if size[0] > 5:
            axes.yaxis.set_major_locator(ticks)
        fit(axes)
        svg = as_svg(axes.figure, title)
    with matplotlib.rc_context(style(PNG, 9)):
        names = [re.sub(r"[^\x20-\uffff]+", " ", name)[:46] for name, _ in legend]
        columns = -(-len(legend) // 20)
        beside = columns * (0.9 + 0.068 * max(map(len, names))) + 0.1
        figure = Figure(figsize=(7.0 + beside, 4.6), dpi=120)
        axes = figure.subplots()
        draw(axes, PNG["ink"])
        axes.set_title(title, loc="left", color="#1c1e21")
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_locator(ticks)
        fit(axes, right=beside)
        handles = [Line2D([], [], linewidth=1.6, marker=one.marker, markersize=5, **one.line) for _, one in legend]
        text = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left", "ncols": columns}
        place = {"loc": "upper left", "bbox_to_anchor": (7.05 / (7.0 + beside), 0.97), "handlelength": 4.2}
        figure.legend(handles, names, title=legend_title or None, borderaxespad=0.0, **text, **place)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return svg, buffer.getvalue()
