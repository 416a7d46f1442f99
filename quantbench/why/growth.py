"""Where quantising starts to pay: tokens/sec against the unquantised setting, by batch size and by model size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from quantbench.charts import INK, Bar, checked, draw
from quantbench.conclusions import Findings, compared
from quantbench.intervals import Ratio
from quantbench.labels import Cell, cells, machine_of
from quantbench.records import Measurement
from quantbench.settings import BASELINES
from quantbench.wording import listed


@dataclass(frozen=True)
class Line:
    """A setting's tokens/sec over the unquantised one's, along batch sizes or models: place -> its name, and the ratio
    by rounds."""

    panel: str
    cell: Cell
    base: str
    points: dict[object, tuple[str, Ratio]] = field(default_factory=dict)


def crossovers(run: Iterable[Measurement]) -> Findings:
    """Per setting, from which batch size or model on it is faster than the unquantised one of its workload and engine,
    by the rounds that both were in. Raises ValueError for two machines."""
    rows = list(run)
    machine_of(rows)
    said = [f"{line.panel}: {_crossover(line)}." for line in _lines(cells(rows))]
    return Findings(said or ["fewer than two batch sizes or models measured yet"])


def plot_scaling(run: Iterable[Measurement]) -> Figure:
    """The same ratios as bars, a panel per model and one for the model sizes, and a line at 1. Raises ValueError where
    there are no two places, and for two machines."""
    named, machine = checked(run)
    lines = _lines(named)
    if not lines:
        raise ValueError("nothing to compare: it takes two batch sizes or two models, and GPU FP16 or CPU FP32 of each")

    def bar(line: Line, name: str, ratio: Ratio):
        text = "not compared" if ratio.interval is None else f"{ratio.value:.2f}{' tie' * (ratio.verdict == 'tie')}"
        return Bar(line.cell, ratio.value, f"{name}: {text}", ratio.interval)

    panels = {}
    for line in lines:
        bars = [bar(line, *line.points[at]) for at in sorted(line.points)]
        panels.setdefault((line.panel, line.panel), {})[line.cell.setting] = bars
    bases = listed(list(dict.fromkeys(line.base for line in lines)))
    figure = draw(f"Tokens/sec over those of {bases}: above 1 it pays", machine, panels, "Ratio")
    for ax in figure.axes:
        ax.axvline(1, color=INK, linewidth=0.9, zorder=0.9)
    return figure


def _lines(named: list[Cell]) -> list[Line]:
    """Every setting with two or more places, against GPU FP16 (CPU FP32 where there is none) of the same model,
    workload and engine: along batch sizes, then along models at the smallest batch."""
    measured, found = [cell for cell in named if cell.measured], {}
    bases = {_same(cell): cell for key in reversed(BASELINES) for cell in measured if cell.row.setting == key}
    pairs = [(cell, bases[_same(cell)]) for cell in measured if bases.get(_same(cell), cell) is not cell]
    least = min((cell.row.batch_size for cell, _ in pairs), default=1)
    places = [(f"{cell.title}, by batch size", cell.row.batch_size, f"batch {cell.row.batch_size}", cell, base)
              for cell, base in pairs]
    said = " (random weights)" * all(cell.random for cell in measured)  # once for all bars
    places += [(f"By model size, batch {least}{said}", (base.row.weights_gb or 0.0, cell.title),
                cell.model if said else cell.title, cell, base) for cell, base in pairs if cell.row.batch_size == least]
    for panel, at, name, cell, base in places:
        line = found.setdefault((panel, cell.setting), Line(panel, cell, base.setting))
        line.points[at] = name, compared(cell, base)
    return [line for line in found.values() if len(line.points) > 1]


def _same(cell: Cell) -> tuple:
    return cell.title, cell.workload, cell.row.engine


def _crossover(line: Line) -> str:
    points = [line.points[at] for at in sorted(line.points)]
    judged = [(name, ratio) for name, ratio in points if ratio.interval]
    apart = [name for name, ratio in points if not ratio.interval]
    if not judged:
        return f"{line.cell.setting} is not compared with {line.base}: they share too few rounds"
    pays = [name for name, ratio in judged if ratio.verdict == "faster"]
    if pays == [name for name, _ in judged[len(judged) - len(pays):]]:
        where = f"faster than {line.base} from {pays[0]} on" if pays else f"nowhere faster than {line.base}"
    else:
        where = f"faster than {line.base} only at {listed(pays)}"
    numbers = ", ".join(f"{ratio.value:.2f} times at {name}" for name, ratio in dict.fromkeys((judged[0], judged[-1])))
    return f"{line.cell.setting} is {where} ({numbers})" + (f"; not compared at {listed(apart)}" if apart else "")
