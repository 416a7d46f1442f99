"""The memory ledger: where a measurement's bytes are, as a table and as a stacked chart."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from quantbench.charts import GREY, INK, SMALL, TEXT, TITLE, checked
from quantbench.labels import cells, machine_of
from quantbench.records import Measurement
from quantbench.tables import Table, Tables

# part -> colour (Okabe-Ito); the parts of a row add up to its generate peak
PARTS = {"Quantised layers": "#E69F00", "Embeddings and head": "#56B4E9", "Other weights": "#0072B2",
         "KV cache": "#009E73", "Working memory": "#BBBBBB"}
TOTALS = ("Weights", "Held before load", "Load peak", "Generate peak", "Reserved", "Device-wide", "RAM peak")
NUMBERS = dict.fromkeys((*PARTS, *TOTALS), 1)  # column -> decimals


def memory_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """Every measured row's memory in MB (1e6 bytes), the parts of its peak first; NaN where a figure does not apply.
    "Working memory" is what the parts leave of the peak: activations, logits, workspaces, and on a CPU the libraries
    that the first generation loads. The peak is VRAM on a GPU, resident memory above the level before load on a CPU."""
    measured = [cell for cell in cells(run) if cell.measured]
    rows = [[cell.setting, cell.workload, *_ledger(cell.row)] for cell in measured]
    frame = pd.DataFrame(rows, columns=["Setting", "Workload", *NUMBERS],
                         index=pd.Index([cell.title for cell in measured], name="Model", dtype=object))
    frame = frame.astype(dict.fromkeys(NUMBERS, float))
    frame[list(NUMBERS)] /= 1e6
    return frame


def _ledger(row: Measurement) -> list[int | None]:
    audit, weights = row.audit or {}, row.weights_bytes
    quantised, embedding = audit.get("quantised_bytes", 0), audit.get("embedding_bytes", 0)
    cache = audit.get("kv_bytes_per_token", 0) * ((row.prompt_tokens or 0) + row.new_tokens) * row.batch_size
    peak = row.ram_peak_bytes if row.vram_peak_bytes is None else row.vram_peak_bytes
    other = None if weights is None else weights - quantised - embedding
    working = None if None in (peak, weights) else max(peak - weights - cache, 0)
    return [quantised, embedding, other, cache, working, weights, row.held_before_bytes, row.load_peak_bytes,
            row.vram_peak_bytes, row.vram_reserved_bytes, row.vram_device_bytes, row.ram_peak_bytes]


def show_memory(run: Iterable[Measurement]) -> Tables:
    """The ledger as a notebook shows it, with a sentence on what stays unquantised. Raises ValueError for a run of
    several machines."""
    rows = list(run)
    machine, frame = machine_of(rows), memory_table(rows).dropna(axis="columns", how="all")
    return Tables(Table(part, [title, "MB", machine], _unquantised(part[part["Quantised layers"] > 0]), NUMBERS)
                  for title, part in frame.groupby(level=0, sort=False))


def _unquantised(part: pd.DataFrame) -> str:
    if part.empty:
        return ""
    most = part.iloc[(part["Embeddings and head"] / part["Weights"]).argmax()]
    size = f"{most['Embeddings and head']:.0f} MB of {most['Weights']:.0f} MB under {most['Setting']}"
    return f"{size} are embeddings and an unquantised output head: a small model shrinks less than its bits."


def plot_memory(run: Iterable[Measurement]) -> Figure:
    """One stacked bar per setting: the parts of its peak at its longest workload. Raises ValueError for no rows or two
    machines."""
    named, machine = checked(run)
    frame = memory_table(cell.row for cell in named)
    if frame.empty:
        raise ValueError("no measurements to draw: nothing in this run is ok")
    models = {title: part.groupby("Setting", sort=False).tail(1) for title, part in frame.groupby(level=0, sort=False)}
    inches = [0.26 * len(part) + 0.6 for part in models.values()]
    figure, axes = plt.subplots(len(models), squeeze=False, figsize=(8.5, sum(inches) + 1), height_ratios=inches,
                                layout="constrained")
    plt.close(figure)
    for (title, part), ax in zip(models.items(), axes.flat):
        ends = part[list(PARTS)].fillna(0).cumsum(axis=1)
        for name, colour in reversed(PARTS.items()):  # each over the next
            bars = ax.barh(range(len(part)), ends[name], color=colour, label=name, height=0.72)
            if name == "Working memory":
                ax.bar_label(bars, fmt="%.0f", padding=3, size=SMALL, color=INK)
        ax.set_yticks(range(len(part)), part["Setting"] + ", " + part["Workload"], size=TEXT, parse_math=False)
        ax.set(ylim=(len(part) - 0.5, -0.5), xlim=(0, 1.1 * ends.to_numpy().max()))
        ax.set_title(title, loc="left", size=TEXT, weight="bold", color=INK, parse_math=False)
        ax.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    legend = figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=len(PARTS), frameon=False,
                           fontsize=SMALL, title=machine, title_fontsize=SMALL, alignment="left")
    legend.get_title().set(parse_math=False, color=GREY)
    figure.suptitle("Where the bytes are (MB)", x=0.01, ha="left", size=TITLE, weight="bold", color=INK)
    return figure
