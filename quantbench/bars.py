"""Panels of horizontal bars as a matplotlib Figure: the look of every chart, and nothing about what is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from quantbench.stats import Interval

Colour = tuple[float, float, float]
GREY = to_rgb("#6B6B6B")
_INK, _LINE = "#222222", "#DDDDDD"
_SMALL, _TEXT, _TITLE = 8, 9, 12  # points
_WIDE, _NARROW = 10.0, 7.5  # inches: a figure of several columns, of one
_ALONE, _GROUPED, _GAP = 0.25, 0.165, 0.11  # inches: a bar with its own label, one of several, and between groups
_PANEL, _HEAD = 0.72, 0.56  # inches: a panel's title and axis, the figure's title
_PALE = 0.55
_COLUMNS = 3


@dataclass(frozen=True)
class Bar:
    """What one measurement draws: a value, its interval and its text; or, with no value, the text in its place."""

    colour: Colour
    hatch: str
    value: float | None
    text: str
    interval: Interval | None = None
    inside: float | None = None  # the part of the value that keeps the full colour


@dataclass(frozen=True)
class Panel:
    """One facet: per label its bars. Panels of the same `model` stand beside each other on one scale."""

    model: str
    title: str
    groups: Sequence[tuple[str, Sequence[Bar]]]

    @property
    def bars(self) -> list[Bar]:
        return [bar for _, bars in self.groups for bar in bars]

    @property
    def inches(self) -> float:
        return sum(_thick(bars)[0] for _, bars in self.groups)


def white(colour: Colour, share: float) -> Colour:
    """The colour with this share of white in it."""
    return tuple(channel + (1 - channel) * share for channel in colour)


def figure(title: str, subtitle: str, panels: Sequence[Panel], axis: str, legend: Sequence[Patch] = ()) -> Figure:
    """Draw the panels, closed for pyplot: a notebook shows the returned figure once."""
    lines = _lines(panels)
    columns = max(map(len, lines))
    inches = [_PANEL + line[0].inches for line in lines]
    width, height = _WIDE if columns > 1 else _NARROW, sum(inches) + _HEAD
    fig, axes = plt.subplots(len(lines), columns, squeeze=False, figsize=(width, height),
                             layout="constrained", gridspec_kw={"height_ratios": inches})
    plt.close(fig)
    fig.get_layout_engine().set(rect=(0, 0, 1, 1 - _HEAD / height), h_pad=0.06, w_pad=0.06)
    fig.text(0.1 / width, 1 - 0.1 / height, title, va="top", size=_TITLE, weight="bold", color=_INK)
    fig.text(0.1 / width, 1 - 0.37 / height, textwrap.shorten(subtitle, int(14 * width), placeholder=" …"),
             va="top", size=_SMALL, color=GREY, parse_math=False)
    if legend:
        drawn = fig.legend(handles=legend, loc="upper right", bbox_to_anchor=(1 - 0.05 / width, 1 - 0.05 / height),
                           ncols=len(legend), frameon=False, fontsize=_SMALL, handlelength=1.2)
        for text in drawn.get_texts():
            text.set_parse_math(False)
    room = _room(width, columns, panels)
    for line, row in zip(lines, axes):
        limit = _limit([bar for panel in panels if panel.model == line[0].model for bar in panel.bars], room)
        for place, ax in enumerate(row):
            if place < len(line):
                _draw(ax, line[place], limit, axis, labelled=place == 0, inches=width / columns)
            else:
                ax.set_axis_off()
    return fig


def _lines(panels: Sequence[Panel]) -> list[list[Panel]]:
    """A line of panels per model, or more where it has many."""
    models: dict[str, list[Panel]] = {}
    for panel in panels:
        models.setdefault(panel.model, []).append(panel)
    return [mine[start:start + _COLUMNS] for mine in models.values() for start in range(0, len(mine), _COLUMNS)]


def _draw(ax: Axes, panel: Panel, limit: float | None, axis: str, labelled: bool, inches: float) -> None:
    top, centres = 0.0, []  # inches from the top
    for _, bars in panel.groups:
        space, step, thick = _thick(bars)
        for place, bar in enumerate(bars):
            _draw_bar(ax, bar, top + (space - step * len(bars)) / 2 + step * (place + 0.5), thick)
        centres.append(top + space / 2)
        top += space
    labels = [textwrap.fill(label, 26) for label, _ in panel.groups] if labelled else [""] * len(centres)
    ax.set_yticks(centres, labels, size=_TEXT, parse_math=False)
    ax.set_ylim(top, 0)
    ax.set_xlim(0, limit or 1)
    ax.set_title(textwrap.fill(panel.title, int(11 * inches)), loc="left", size=_TEXT, weight="bold", color=_INK,
                 parse_math=False)
    ax.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK, axis="both")
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.spines["left"].set_color("#999999")
    ax.set_axisbelow(True)
    if limit is None:
        ax.set_xticks([])
    else:
        ax.grid(axis="x", color=_LINE, linewidth=0.8)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(axis, size=_SMALL, color=GREY)


def _thick(bars: Sequence[Bar]) -> tuple[float, float, float]:
    """Inches for a group, for each bar in it, and of that bar's thickness."""
    if len(bars) == 1:
        return _ALONE, _ALONE, 0.76 * _ALONE
    return _GROUPED * len(bars) + _GAP, _GROUPED, 0.9 * _GROUPED


def _draw_bar(ax: Axes, bar: Bar, y: float, height: float) -> None:
    if bar.value is None:
        ax.annotate(bar.text, (0, y), (4, 0), textcoords="offset points", va="center", size=_SMALL, color=GREY,
                    style="italic", parse_math=False)
        return
    look = {"height": height, "edgecolor": "white", "linewidth": 0, "hatch": bar.hatch}
    ax.barh(y, bar.value, color=bar.colour if bar.inside is None else white(bar.colour, _PALE), **look)
    if bar.inside is not None:
        ax.barh(y, bar.inside, color=bar.colour, **look)
    if bar.interval is not None:
        low, high = bar.interval
        ax.errorbar(bar.value, y, xerr=[[max(bar.value - low, 0)], [max(high - bar.value, 0)]], fmt="none",
                    ecolor=_INK, elinewidth=1, capsize=2.5)
    ax.annotate(bar.text, (_end(bar), y), (5, 0), textcoords="offset points", va="center", size=_SMALL, color=_INK,
                parse_math=False)


def _end(bar: Bar) -> float:
    return max(bar.value, bar.interval[1]) if bar.interval else bar.value


def _room(width: float, columns: int, panels: Sequence[Panel]) -> float:
    """About how many inches a panel has for bars and the texts at their ends."""
    labels = min(max(len(label) for panel in panels for label, _ in panel.groups), 26)
    return (width - 0.075 * labels) / columns - 0.25


def _limit(bars: list[Bar], room: float) -> float | None:
    """The end of the scale: every bar's text fits behind it. None where there is no bar."""
    shares = [(_end(bar), max(1 - (0.1 + 0.068 * len(bar.text)) / room, 0.3)) for bar in bars if bar.value is not None]
    return max((end / share for end, share in shares), default=None)
