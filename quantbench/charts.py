"""Measurements as bars: a panel per model and workload, a colour per setting, its interval where a row has one."""

import textwrap
from collections.abc import Callable, Iterable
from itertools import accumulate, cycle, groupby
from math import ceil
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantbench.intervals import LEAST, Interval
from quantbench.labels import Cell, able, cells, machine_of, not_here
from quantbench.quantisers import QUANTISERS
from quantbench.records import DECIMALS, FIGURES, Measurement
from quantbench.settings import SETTINGS
from quantbench.wording import cut

INK, GREY = "#222222", "#6B6B6B"
SMALL, TEXT, TITLE = 8, 9, 12  # points
MOST = 12  # bars in a panel
_HUES = {  # one per width of the weights, told apart by colour-blind readers too, and a shade per setting within it
    "fp32": ("#0072B2", "#56B4E9", "#9CC9E8"), "16": ("#009E73", "#66C2A5", "#2F7D6B", "#A6D96A", "#4D9221", "#C5DDB0"),
    "int8": ("#D55E00", "#F0A04B", "#A65628", "#E6B422", "#C4391D", "#F2C9A1", "#7A3B10"),
    "int4": ("#8E4585", "#C77CB5", "#5B3F8C", "#9A86C9", "#D6A8E0", "#3D2A5F", "#B5487E", "#6E2BB8", "#A0369E")}


class Bar(NamedTuple):
    """What a cell draws: a value, its text, its interval and the part in full colour; without a value, its text."""

    cell: Cell
    value: float | None
    text: str
    interval: Interval | None = None
    inside: float | None = None


Panels = dict[tuple[str, str], dict[str, list[Bar]]]  # (model, title) -> label -> its bars; a model has one scale


class Chart(NamedTuple):
    """A chart as one entry: its tab in the panel, its title, and a row's figures that it draws: value, interval, a part
    of it (alone where there is no value). `together`: workloads share a panel; `best` of two values comes first."""

    tab: str
    title: str
    value: str
    interval: str = ""
    inside: str = ""
    together: bool = False
    best: Callable = min

    def bar(self, cell: Cell) -> Bar:
        value, interval, inside = (getattr(cell.row, name, None) for name in (self.value, self.interval, self.inside))
        inside = None if None not in (value, inside) and inside > value else inside  # offloaded: it lies elsewhere
        text = " of ".join(f"{one:.{DECIMALS[self.value]}f}" for one in (inside, value) if one is not None)
        text += " noisy" * (cell.row.noisy and bool(self.interval)) + f", {cell.workload}" * self.together
        return Bar(cell, inside if value is None else value, text, interval, inside)

    def plot(self, run: Iterable[Measurement]) -> Figure:
        """Draw every cell of a run. Raises ValueError for no rows and for rows of two machines."""
        named, machine = checked(run)
        panels = facets(named, self.bar, self.together, self.best)
        return draw(self.title, machine, panels, FIGURES[self.value], not_here(named))


CHARTS: dict[str, Chart] = {  # by the name of its file
    "throughput": Chart("Tokens/sec", "Tokens per second, higher is faster", "tokens_per_s", "tokens_per_s_ci",
                        best=max),
    "lengths": Chart("Lengths", "Tokens per second by number of new tokens", "tokens_per_s", "tokens_per_s_ci",
                     together=True, best=max),
    "latency": Chart("Latency", "Latency, lower is faster", "latency_s", "latency_ci"),
    "vram": Chart("Memory", "Weights (dark) of peak VRAM (light), GB", "vram_gb", inside="weights_gb"),
}
plot_throughput, plot_lengths, plot_latency, plot_vram = (chart.plot for chart in CHARTS.values())


def checked(run: Iterable[Measurement]) -> tuple[list[Cell], str]:
    """The cells of a run and its machine. Raises ValueError for no rows or two machines."""
    if not (named := cells(run)):
        raise ValueError("no measurements to draw: measure at least one setting first")
    return named, machine_of(cell.row for cell in named)


def facets(named: list[Cell], bar: Callable[[Cell], Bar], together: bool = False, best: Callable = min) -> Panels:
    """A panel per model and workload (`together`: per model), the best setting first; `bar` draws a measured cell. What
    cannot run on this machine is left out: `not_here` says it."""
    panels: Panels = {}
    for cell in able(named):
        bars = panels.setdefault((cell.title, cell.title if together else f"{cell.title} · {cell.workload}"), {})
        bars.setdefault(cell.setting, []).append(
            bar(cell) if cell.measured else Bar(cell, None, cell.outcome.partition(":")[0]))

    def rank(item: tuple[str, list[Bar]]) -> tuple[bool, float]:
        values = [bar.value for bar in item[1] if bar.value is not None]
        return not values, (1 if best is min else -1) * best(values, default=0)

    return {place: dict(sorted(panel.items(), key=rank)) for place, panel in panels.items()}


def _split(panels: Panels) -> Panels:
    """The panels with about MOST bars each at most, for a phone's width: of more settings, the next ones follow."""
    found: Panels = {}
    for (model, name), panel in panels.items():
        bars, many = accumulate(map(len, panel.values())), sum(map(len, panel.values()))
        most = ceil(many / ceil(many / MOST))  # all panels as full as each other
        parts = [dict(part) for _, part in groupby(panel.items(), lambda _: (next(bars) - 1) // most)]
        found |= {(model, f"{name} · {number} of {len(parts)}" if parts[1:] else name): part
                  for number, part in enumerate(parts, start=1)}
    return found


def colour_of(key: str) -> str:
    """A setting's colour, the same whatever a run holds: its hue is what its quantiser says, its shade its own."""
    shades = {family: cycle(hues) for family, hues in _HUES.items()}
    colours = {other: next(shades[QUANTISERS[row.quantisation].family(row)]) for other, row in SETTINGS.items()}
    return colours.get(key, GREY)


def canvas(title: str, below: str, axis: str, shape: tuple, inches: tuple, **how: object) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, `shape` (rows, columns), in the look of all charts; closed for pyplot: shown once."""
    fig, axes = plt.subplots(*shape, squeeze=False, layout="constrained", figsize=inches, **how)
    plt.close(fig)
    fig.suptitle(title, x=0.01, ha="left", size=TITLE, weight="bold", color=INK, parse_math=False)
    fig.supxlabel(below, x=0.01, ha="left", size=SMALL, color=GREY, parse_math=False)
    for ax in axes.flat:
        ax.set_xlabel(axis, size=SMALL, color=GREY)
        ax.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def draw(title: str, subtitle: str, panels: Panels, axis: str, note: str = "") -> Figure:
    """Draw the panels, and under them subtitle, what the lines are, and the note."""
    panels = _split(panels)
    drawn = [bar for panel in panels.values() for bars in panel.values() for bar in bars]
    columns = 1 if len(panels) == 1 or max(len(bar.text) for bar in drawn) > 24 else 2
    if any(bar.interval for bar in drawn):
        subtitle = f"{cut(subtitle, 120)} · Lines: 95% interval of the median, of {LEAST} samples or more"
    small = [line for text in (subtitle, note) for line in textwrap.wrap(text, 60 + 40 * columns)]
    sizes = [sum(len(bars) + 0.5 for bars in panel.values()) for panel in panels.values()]  # in bars
    rows = [max(sizes[start:start + columns]) for start in range(0, len(sizes), columns)]
    inches, scales = [0.75 + 0.18 * size for size in rows], {}
    size = 5 + 2.5 * columns, sum(inches) + 0.5 + 0.16 * len(small)
    fig, axes = canvas(title, "\n".join(small), axis, (len(rows), columns), size, height_ratios=inches)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    for place, (((model, name), panel), ax) in enumerate(zip(panels.items(), axes.flat)):
        if model in scales:
            ax.sharex(scales[model])
        scales.setdefault(model, ax)
        _draw_panel(ax, panel)
        ax.set_ylim(rows[place // columns] - 0.5, -0.75)
        told = textwrap.fill(f"{cut(model, 75)}{name.removeprefix(model)}"[:200], 50)  # a long path hides no workload
        ax.set_title(told, loc="left", size=TEXT, weight="bold", color=INK, parse_math=False)
    return fig


def _draw_panel(ax: Axes, panel: dict[str, list[Bar]]) -> None:
    y, ticks = 0.0, {}
    for label, bars in panel.items():
        ticks[y + (len(bars) - 1) / 2] = textwrap.fill(cut(label, 78), 26)
        for bar in bars:
            key, ends = bar.cell.row.setting, [bar.value or 0, *(bar.interval or ())]
            look = {"color": colour_of(key), "edgecolor": "white", "linewidth": 0,
                    "hatch": "////" if key in SETTINGS and SETTINGS[key].device == "cpu" else ""}
            ax.barh(y, bar.value or 0, 0.9, alpha=1 if bar.inside is None else 0.45, **look)
            ax.barh(y, bar.inside or 0, 0.9, **look)
            if bar.interval:
                ax.hlines(y, *bar.interval, color=INK, linewidth=1)
            ax.annotate(bar.text, (max(ends), y), (5, 0), textcoords="offset points", va="center", size=SMALL,
                        parse_math=False)
            y += 1
        y += 0.5
    ax.set_yticks(list(ticks), list(ticks.values()), parse_math=False)
    ax.spines["bottom"].set_visible(False)
    ax.grid(visible=False, axis="y")
