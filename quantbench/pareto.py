"""Speed against quality: one mark per setting, its memory as the mark's area, and the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from quantbench.bars import GREY
from quantbench.charts import COLOURS
from quantbench.record import FIGURES, Measurement
from quantbench.quality_view import grouped, memory_of, on_what, scored
from quantbench.stats import Interval
from quantbench.view import Cell, machine_of

_INK, _OTHER = "#222222", "#8A8A8A"
_SMALL, _TEXT, _TITLE = 8, 9, 12  # points
_AREA = 900  # points squared, of the largest mark
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # where a label may stand
_DISTANCES = (5, *range(16, 160, 12))  # points from its mark


@dataclass(frozen=True)
class Mark:
    """One setting: tokens/sec and its distance from the reference (KL, or perplexity where there is none)."""

    cell: Cell
    speed: float
    loss: float
    speed_ci: Interval | None
    loss_ci: Interval | None
    size: float | None
    label: str


def plot_quality(run: Iterable[Measurement]) -> Figure:
    """Speed against closeness to the reference, per model and text: the upper right corner is the best.

    Raises ValueError where no setting has both speed and quality, and for rows of two machines.
    """
    rows = list(run)
    machine = machine_of(rows)
    groups = [(key[0], group) for key, group in grouped(scored(rows)) if any(map(_mark, group))]
    if not groups:
        raise ValueError("no setting here has both speed and quality: qb.generate and qb.quality give them")
    fig, axes = plt.subplots(len(groups), 1, squeeze=False, figsize=(8, 0.7 + 4.4 * len(groups)), layout="constrained")
    plt.close(fig)
    height = fig.get_figheight()
    fig.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.55 / height), h_pad=0.08, w_pad=0.08)
    what = sorted({memory_of(cell.row)[1] for _, group in groups for cell in group})
    fig.text(0.0125, 1 - 0.1 / height, "Speed against quality: up and to the right is better", va="top", size=_TITLE,
             weight="bold", color=_INK)
    fig.text(0.0125, 1 - 0.36 / height, f"{machine} · area of a mark: {', on a CPU '.join(what)}", va="top",
             size=_SMALL, color=GREY, parse_math=False)
    drawn = [(ax, _draw(ax, model, list(filter(None, map(_mark, group)))))
             for ax, (model, group) in zip(axes[:, 0], groups)]
    fig.draw_without_rendering()  # labels are placed where the marks have come to stand
    for ax, labels in drawn:
        _place(ax, labels)
    return fig


def _mark(cell: Cell) -> Mark | None:
    row = cell.row
    loss, loss_ci = (row.kl_mean, row.kl_ci) if row.kl_mean is not None else (row.perplexity, None)
    if row.tokens_per_s is None or loss is None:
        return None
    size = memory_of(row)[0]
    label = cell.setting + ("" if size is None else f" · {size:.3f} GB")
    return Mark(cell, row.tokens_per_s, max(loss, 0), row.tokens_per_s_ci, loss_ci, size, label)


def front(marks: Sequence[Mark]) -> list[Mark]:
    """The marks that no other one beats in speed and closeness, the fastest first."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (-mark.speed, mark.loss)):
        if not best or mark.loss < best[-1].loss:
            best.append(mark)
    return best


def _draw(ax: Axes, model: str, marks: list[Mark]) -> list[tuple[Mark, float]]:
    """Draw one panel; return each mark with its radius in points."""
    largest, best = max((mark.size or 0 for mark in marks), default=0) or 1, front(marks)
    ax.step([mark.speed for mark in best], [mark.loss for mark in best], where="post", color=_OTHER, linewidth=1.2,
            linestyle=(0, (4, 3)), zorder=1, label="Pareto front: nothing measured is both faster and closer")
    drawn = []
    for mark in sorted(marks, key=lambda mark: -(mark.size or 0)):  # the small ones on top
        area = _AREA * (mark.size / largest if mark.size else 0.1)
        ax.scatter(mark.speed, mark.loss, s=area, color=COLOURS.get(mark.cell.row.setting, _OTHER), edgecolor="white",
                   linewidth=1, zorder=2)
        ax.errorbar(mark.speed, mark.loss, _reach(mark.loss, mark.loss_ci), _reach(mark.speed, mark.speed_ci),
                    fmt="none", ecolor=_INK, elinewidth=0.8, capsize=2, zorder=3)
        drawn.append((mark, math.sqrt(area) / 2))
    _axes(ax, marks)
    ax.set_title(model, loc="left", size=_TEXT, weight="bold", color=_INK, pad=18, parse_math=False)
    ax.annotate(f"{on_what(marks[0].cell.row)}; speed at {marks[0].cell.workload}", (0, 1), (0, 6), size=_SMALL,
                color=GREY, xycoords="axes fraction", textcoords="offset points", parse_math=False)
    ax.legend(loc="lower left", fontsize=_SMALL, frameon=False)
    return drawn


def _axes(ax: Axes, marks: list[Mark]) -> None:
    """Speed from 0 to the right; the loss upside down, on a scale that has room for 0."""
    paired, losses = marks[0].cell.row.kl_mean is not None, [mark.loss for mark in marks]
    if paired:
        step = 10.0 ** math.floor(math.log10(max(min(filter(None, losses), default=1), 1e-5)))
        ax.set_yscale("symlog", linthresh=step, linscale=0.6)
        ticks = [0.0, *(step * 10**power for power in range(9) if step * 10**power < 20 * max(losses))]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_ylim(3 * max(max(losses), step), -0.6 * step)
    else:
        room = 0.15 * (max(losses) - min(losses) or max(losses))
        ax.set_ylim(max(losses) + room, min(losses) - room)
    ax.set_xlim(0, 1.2 * max(mark.speed for mark in marks))
    ax.set_xlabel(f"{FIGURES['tokens_per_s'].label}, to the right is faster", size=_SMALL, color=GREY)
    name = "KL divergence from the reference, nats" if paired else FIGURES["perplexity"].label
    ax.set_ylabel(f"{name}, up is better", size=_SMALL, color=GREY)
    ax.grid(color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK)
    ax.spines[["top", "right"]].set_visible(False)


def _reach(value: float, interval: Interval | None) -> list[list[float]] | None:
    return None if interval is None else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]


def _place(ax: Axes, drawn: list[tuple[Mark, float]]) -> None:
    """Each label beside its mark, at the nearest place where it covers no mark, no other label and not the front."""
    scale, inside = ax.figure.dpi / 72, ax.get_window_extent()
    taken = [_box(ax, (mark.speed, mark.loss), (mark.speed, mark.loss), radius * scale) for mark, radius in drawn]
    for mark, _ in drawn:
        low, high = mark.speed_ci or (mark.speed, mark.speed)
        taken.append(_box(ax, (low, mark.loss), (high, mark.loss), 2 * scale))
    best = front([mark for mark, _ in drawn])
    for fast, slow in zip(best, best[1:]):
        corner = slow.speed, fast.loss
        taken += [_box(ax, corner, (mark.speed, mark.loss), scale) for mark in (fast, slow)]
    taken.append(ax.get_legend().get_window_extent())
    for mark, radius in drawn:
        text = ax.annotate(mark.label, (mark.speed, mark.loss), (0, 0), textcoords="offset points", size=_SMALL,
                           color=_INK, parse_math=False, zorder=4, in_layout=False)
        for away, side in itertools.product(_DISTANCES, _SIDES):
            _stand(text, radius + away, side)
            box = text.get_window_extent()
            if inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1 and not any(
                    box.overlaps(other) for other in taken):
                break
        if away > _DISTANCES[0]:  # too far to be seen as its own
            ax.annotate("", (mark.speed, mark.loss), text.xyann, textcoords="offset points", in_layout=False,
                        arrowprops={"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.7, "shrinkA": 0})
        taken.append(box)


def _stand(text: Annotation, away: float, side: tuple[int, int]) -> None:
    across, up = side
    text.set_position((away * across, away * up))
    text.set_horizontalalignment({1: "left", 0: "center", -1: "right"}[across])
    text.set_verticalalignment({1: "bottom", 0: "center", -1: "top"}[up])


def _box(ax: Axes, start: tuple[float, float], end: tuple[float, float], margin: float) -> Bbox:
    """The box around two points, in pixels."""
    points = ax.transData.transform([start, end])
    return Bbox([points.min(0) - margin, points.max(0) + margin])
