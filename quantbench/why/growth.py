"""Where quantising starts to pay: tokens/sec against the unquantised setting, by model size and by batch size."""

from collections.abc import Iterable

from matplotlib.figure import Figure

from quantbench.charts import INK, Bar, checked, draw
from quantbench.conclusions import Findings, beside
from quantbench.intervals import Ratio
from quantbench.labels import Cell, cells, machine_of
from quantbench.records import Measurement
from quantbench.wording import listed


def crossovers(run: Iterable[Measurement]) -> Findings:
    """Per setting, where it is faster than the baseline of `ratios` and where it is not, by the rounds that both were
    in; models by size, and batches by theirs. Raises ValueError for two machines."""
    rows, said = list(run), []
    machine_of(rows)
    for setting, line in _lines(cells(rows)).items():
        places: dict[str, list[str]] = {}
        for cell, _, ratio in line:
            value = f" ({ratio.value:.2f})" if ratio.interval else ""
            places.setdefault(ratio.verdict, []).append(f"{cell.title}, {cell.workload}{value}")
        told = "; ".join(f"{verdict} at {listed(names)}" for verdict, names in places.items())
        said.append(f"{setting} against {line[0][1].setting}: {told}.")
    return Findings(said or ["fewer than two batch sizes or models measured yet"])


def plot_scaling(run: Iterable[Measurement]) -> Figure:
    """The same ratios as bars, a panel per setting, and a line at 1. Raises ValueError where no setting has two ratios,
    and for two machines."""
    named, machine = checked(run)
    panels, bases = {}, {}
    for setting, line in _lines(named).items():
        models = panels.setdefault(("", setting), {})  # all on one scale
        for cell, base, ratio in line:
            text = f"{ratio.value:.2f}{' tie' * (ratio.verdict == 'tie')}" if ratio.interval else "not compared"
            models.setdefault(cell.title, []).append(Bar(cell, ratio.value, f"{cell.workload}: {text}", ratio.interval))
            bases[base.setting] = None
    if not panels:
        raise ValueError("nothing to compare: it takes two batch sizes or two models, and GPU FP16 or CPU FP32 of each")
    figure = draw(f"Tokens/sec over those of {listed([*bases])}: above 1 it pays", machine, panels, "Ratio")
    for ax in figure.axes:
        ax.axvline(1, color=INK, linewidth=0.9, zorder=0.9)
    return figure


def _lines(named: list[Cell]) -> dict[str, list[tuple[Cell, Cell, Ratio]]]:
    """Of every setting with two ratios or more: cell, baseline and ratio, by the baseline's size and the batch's."""
    found, lines = [one for one in beside(named) if None not in one], {}
    for one in sorted(found, key=lambda one: (one[1].row.weights_gb or 0.0, one[0].title)):
        lines.setdefault(one[0].setting, []).append(one)
    return {setting: line for setting, line in lines.items() if len(line) > 1}
