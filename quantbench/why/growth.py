"""Where quantising starts to pay: tokens/sec against the unquantised setting, by model size and by batch size."""

from collections.abc import Iterable

from matplotlib.figure import Figure

from quantbench.charts import INK, Bar, checked, draw
from quantbench.conclusions import beside
from quantbench.intervals import Ratio
from quantbench.labels import Cell
from quantbench.records import Measurement
from quantbench.wording import listed


def plot_scaling(run: Iterable[Measurement]) -> Figure:
    """The ratios of `ratios` as bars, a panel per setting with models by size and batches by theirs, and a line at 1:
    where it is faster than the baseline. Raises ValueError where no setting has two ratios, and for two machines."""
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
