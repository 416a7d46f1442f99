"""Where quantising starts to pay: tokens/sec against the unquantised setting, by batch size and by model size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from quantbench.bars import GREY
from quantbench.charts import COLOURS
from quantbench.findings import BASELINES, Findings
from quantbench.record import Measurement
from quantbench.stats import Interval, ratio_ci
from quantbench.view import Cell, cells, machine_of

_INK, _OTHER = "#222222", "#8A8A8A"
_SMALL, _TEXT, _TITLE = 8, 9, 12  # points


@dataclass(frozen=True)
class Point:
    """One setting's tokens/sec over the baseline's, at one batch size or for one model."""

    at: float  # sequences, or GB of the baseline's weights
    name: str  # "batch 4", "GPT-2"
    ratio: float
    interval: Interval | None


@dataclass(frozen=True)
class Series:
    """The points of one setting, from the least to the most. `panel` says along what."""

    panel: str
    axis: str
    setting: str
    key: str
    base: str
    points: tuple[Point, ...]


def scaling(run: Iterable[Measurement]) -> list[Series]:
    """Every setting's ratio to GPU FP16 (CPU FP32 where there is none), along the batch sizes of each model and along
    the models at the smallest batch; only where there are two or more. Raises ValueError for two machines."""
    rows = list(run)
    machine_of(rows)
    pairs = [(cell, base) for cell, base in _with_base([cell for cell in cells(rows) if cell.measured])]
    found = []
    for model in dict.fromkeys(cell.model for cell, _ in pairs):
        mine = [(cell, base) for cell, base in pairs if cell.model == model]
        found += _series(mine, f"{model}, by batch size", "batch size (sequences)",
                         lambda cell, _: (cell.row.batch_size, f"batch {cell.row.batch_size}"))
    least = min((cell.row.batch_size for cell, _ in pairs), default=1)
    first = [(cell, base) for cell, base in pairs if cell.row.batch_size == least]
    return found + _series(first, "By model size" + (f", batch {least}" if least > 1 else ""),
                           "weights of the unquantised model (GB)",
                           lambda cell, base: (base.row.weights_gb or 0.0, cell.model))


def crossovers(run: Iterable[Measurement]) -> Findings:
    """Per setting, from which batch size or model on it is faster than the baseline; "faster" where the 95% interval
    of the ratio lies above 1. Raises ValueError for two machines."""
    said = [f"{series.panel}: {_crossover(series)}" for series in scaling(run)]
    return Findings(said or ["fewer than two batch sizes or models measured yet"])


def plot_scaling(run: Iterable[Measurement]) -> Figure:
    """The ratios of `scaling` as lines, a panel per model and one for the model sizes. Raises ValueError where there
    is no line to draw, and for two machines."""
    rows = list(run)
    machine, lines = machine_of(rows), scaling(rows)
    if not lines:
        raise ValueError("nothing to compare: measure two batch sizes or two models, and GPU FP16 or CPU FP32 with them")
    panels = list(dict.fromkeys(series.panel for series in lines))
    columns = min(len(panels), 2)
    deep = -(-len(panels) // columns)
    fig, axes = plt.subplots(deep, columns, squeeze=False, figsize=(5.2 * columns + 1.5, 3.4 * deep + 0.6),
                             layout="constrained")
    plt.close(fig)
    width, height = fig.get_size_inches()
    fig.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.5 / height), h_pad=0.08, w_pad=0.08)
    fig.text(0.1 / width, 1 - 0.1 / height, f"Tokens/sec against {lines[0].base}: above 1 it pays", va="top", size=_TITLE,
             weight="bold", color=_INK)
    fig.text(0.1 / width, 1 - 0.36 / height, machine, va="top", size=_SMALL, color=GREY, parse_math=False)
    for place, ax in enumerate(axes.flat):
        if place < len(panels):
            _draw(ax, [series for series in lines if series.panel == panels[place]])
        else:
            ax.set_axis_off()
    return fig


def _with_base(named: list[Cell]) -> Iterable[tuple[Cell, Cell]]:
    """Each cell with the unquantised one that it is held against: same model, workload and engine."""
    bases: dict[tuple, Cell] = {}
    for key in reversed(BASELINES):
        bases |= {(cell.model, cell.workload, cell.row.engine): cell for cell in named if cell.row.setting == key}
    for cell in named:
        base = bases.get((cell.model, cell.workload, cell.row.engine))
        if base is not None and base.row.setting != cell.row.setting:
            yield cell, base


def _series(pairs: list[tuple[Cell, Cell]], panel: str, axis: str, place) -> list[Series]:
    """A line per setting that has two or more places."""
    found = []
    for setting in dict.fromkeys(cell.setting for cell, _ in pairs):
        mine = [(cell, base) for cell, base in pairs if cell.setting == setting]
        points = {}
        for cell, base in mine:
            at, name = place(cell, base)
            interval = ratio_ci(base.row.latencies_s, cell.row.latencies_s)  # a rate's ratio is the latencies' turned over
            points.setdefault(at, Point(at, name, cell.row.tokens_per_s / base.row.tokens_per_s, interval))
        if len(points) > 1:
            cell, base = mine[0]
            found.append(Series(panel, axis, setting, cell.row.setting, base.setting,
                                tuple(points[at] for at in sorted(points))))
    return found


def _crossover(series: Series) -> str:
    first, last = series.points[0], series.points[-1]
    pays = [point.interval is not None and point.interval[0] > 1 for point in series.points]
    span = f"{first.ratio:.2f}× at {first.name}, {last.ratio:.2f}× at {last.name}"
    if all(pays):
        return f"{series.setting} is faster than {series.base} throughout ({span})."
    if not any(pays):
        return f"{series.setting} is nowhere faster than {series.base} from {first.name} to {last.name} ({span})."
    start = len(pays) - next((back for back, pay in enumerate(reversed(pays)) if not pay), len(pays))
    if start < len(pays):
        return f"{series.setting} is faster than {series.base} from {series.points[start].name} on ({span})."
    return (f"{series.setting} is faster than {series.base} only at "
            f"{', '.join(point.name for point, pay in zip(series.points, pays) if pay)} ({span}).")


def _draw(ax: Axes, lines: list[Series]) -> None:
    ax.axhline(1, color=_INK, linewidth=1)
    ax.annotate(lines[0].base, (1, 1), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", size=_SMALL, color=_INK)
    for series in lines:
        at, ratios = [point.at for point in series.points], [point.ratio for point in series.points]
        reach = [[max(point.ratio - point.interval[0], 0) if point.interval else 0 for point in series.points],
                 [max(point.interval[1] - point.ratio, 0) if point.interval else 0 for point in series.points]]
        ax.errorbar(at, ratios, reach, color=COLOURS.get(series.key, _OTHER), marker="o", markersize=4, linewidth=1.6,
                    capsize=2.5, elinewidth=0.9, label=series.setting)
    points = {point.at: point.name for series in lines for point in series.points}
    by_batch = lines[0].axis.startswith("batch")
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(sorted(points), [f"{at:g}" if by_batch else f"{points[at].replace(' (random weights)', '')}\n{at:.2g}"
                                   for at in sorted(points)], parse_math=False)
    ax.set_ylim(0, 1.12 * max(1, *(point.interval[1] if point.interval else point.ratio
                                   for series in lines for point in series.points)))
    ax.set_title(lines[0].panel, loc="left", size=_TEXT, weight="bold", color=_INK, parse_math=False)
    ax.set_xlabel(lines[0].axis, size=_SMALL, color=GREY)
    ax.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    for text in ax.legend(fontsize=_SMALL, frameon=False, loc="best").get_texts():
        text.set_parse_math(False)
