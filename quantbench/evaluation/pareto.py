"""Speed against quality: one mark per setting."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantbench.charts import GREY, INK, SMALL, TITLE, colour_of
from quantbench.evaluation.judging import Scored, beaten_by, groups, on_what
from quantbench.labels import machine_of
from quantbench.records import FIGURES
from quantbench.results import Run


def plot_quality(run: Iterable) -> Figure:
    """Speed against closeness to the reference, per model and text: the upper right corner is the best. The legend, the
    closest first, has their memory; a hollow mark's setting is beaten by another one of its device.

    Raises ValueError where no setting has both speed and quality, and for rows of two machines.
    """
    run = Run.of(run)
    machine = machine_of([*run, *run.qualities])
    panels = [group for group in groups(run) if any(one.cell for one in group)]
    if not panels:
        raise ValueError("no setting here has both speed and quality: qb.generate and qb.quality give them")
    fig, axes = plt.subplots(len(panels), 1, squeeze=False, figsize=(9, 0.6 + 4 * len(panels)), layout="constrained")
    plt.close(fig)
    fig.suptitle("Speed against quality: up and to the right is better", x=0.01, ha="left", size=TITLE, weight="bold",
                 color=INK)
    for ax, group in zip(axes[:, 0], panels):
        ax.set_title(f"{group[0].model} on {machine}\n{on_what(group)}", loc="left", size=SMALL, color=GREY,
                     parse_math=False)
        _draw(ax, group)
    return fig


def _draw(ax: Axes, group: list[Scored]) -> None:
    paired = all(one.found.kl_mean is not None for one in group)
    losses = {one: max(one.found.kl_mean, 0.0) if paired else one.found.perplexity for one in group}
    for shape, one in zip(cycle("oD^sv<>phPX*8"), sorted(group, key=losses.get)):
        colour, row = colour_of(one.found.setting), one.cell and one.cell.row
        size = f"{one.memory_gb:.3f} GB {one.memory}" if one.memory_gb is not None else "size not measured"
        ax.scatter([row.tokens_per_s] if row else [], [losses[one]] if row else [], s=90, marker=shape, zorder=3,
                   edgecolor=colour, facecolor="none" if beaten_by(one, group) else colour,
                   label=f"{one.setting} · {losses[one]:.2g} · {size if row else 'speed not measured'}")
        if row and row.tokens_per_s_ci:
            ax.hlines(losses[one], *row.tokens_per_s_ci, color=INK, linewidth=0.8)
    if paired:
        ax.set_yscale("symlog", linthresh=min([kl for kl in losses.values() if kl > 0], default=1e-5))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.05 * ax.get_xlim()[1])
    what = "KL from the reference, nats" if paired else "Perplexity"
    ax.set_xlabel(FIGURES["tokens_per_s"], size=SMALL, color=GREY)
    ax.set_ylabel(what, size=SMALL, color=GREY)
    ax.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    ax.grid(color="#DDDDDD", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=SMALL,
                       title=f"Setting · {what} · memory", title_fontsize=SMALL, alignment="left")
    for text in legend.get_texts():
        text.set_parse_math(False)
