"""Where quantising starts to pay: tokens/sec against the unquantised setting, by model size and by batch size."""

from collections.abc import Iterable

from matplotlib.figure import Figure

from quantbench.charts import INK, Bar, checked, draw
from quantbench.conclusions import beside
from quantbench.records import Measurement
from quantbench.wording import listed


def plot_scaling(run: Iterable[Measurement]) -> Figure:
    """The ratios to the baseline of `ratios` as bars, by model size and then by batch, a panel per setting that has two
    or more, and a line at 1. Raises ValueError where no setting has two ratios, and for two machines."""
    named, machine = checked(run)
    found, panels, bases = [one for one in beside(named) if None not in one], {}, {}
    for cell, base, ratio in sorted(found, key=lambda one: (one[1].row.weights_gb or 0.0, one[0].title)):
        text = ratio.verdict if ratio.verdict == "not compared" else f"{ratio.value:.2f} {ratio.verdict}"
        models = panels.setdefault(("", cell.setting), {})  # all on one scale
        models.setdefault(cell.title, []).append(Bar(cell, ratio.value, f"{cell.workload}: {text}", ratio.interval))
        bases.setdefault(cell.setting, base.setting)
    panels = {place: models for place, models in panels.items() if sum(map(len, models.values())) > 1}
    if not panels:
        raise ValueError("nothing to compare: it takes two batch sizes or two models, and GPU FP16 or CPU FP32 of each")
    over = listed(list(dict.fromkeys(bases[setting] for _, setting in panels)))
    figure = draw(f"Tokens/sec over those of {over}: above 1 it pays", machine, panels, "Ratio")
    for ax in figure.axes:
        ax.axvline(1, color=INK, linewidth=0.9, zorder=0.9)
    return figure
