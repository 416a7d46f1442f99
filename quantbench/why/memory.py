"""The memory ledger: where a measurement's bytes are, as a table and as a stacked chart."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from quantbench.charts import INK, SMALL, TEXT, TITLE, checked
from quantbench.labels import cells, machine_of
from quantbench.records import Measurement
from quantbench.tables import Table, Tables

# part -> colour (Okabe-Ito); the parts of a row add up to its generate peak
PARTS = {"Quantised layers": "#E69F00", "Embeddings and head": "#56B4E9", "Other weights": "#0072B2",
         "KV cache": "#009E73", "Working memory": "#BBBBBB"}
TOTALS = {"Weights": "weights_bytes", "Held before load": "held_before_bytes", "Load peak": "load_peak_bytes",
          "Generate peak": "vram_peak_bytes", "Reserved": "vram_reserved_bytes", "Device-wide": "vram_device_bytes",
          "RAM peak": "ram_peak_bytes"}  # -> field of a measurement
NUMBERS = dict.fromkeys((*PARTS, *TOTALS), 1)  # column -> decimals


def memory_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """Every measured row's memory in MB (1e6 bytes), the parts of its peak first; NaN where a figure does not apply.
    "Working memory" is what the parts leave of the peak: activations, logits, workspaces, and on a CPU the libraries
    that the first generation loads. The peak is VRAM on a GPU, resident memory above the level before load on a CPU."""
    rows = []
    for cell in (cell for cell in cells(run) if cell.measured):
        row, audit = cell.row, cell.row.audit or {}
        tokens = row.batch_size * (row.depth + (row.prompt_tokens or 0) + row.new_tokens)
        cache = row.cache_bytes or tokens * audit.get("kv_bytes_per_token", 0)
        rows.append({"Model": cell.title, "Setting": cell.setting, "Workload": cell.workload, "KV cache": cache,
                     "Quantised layers": audit.get("quantised_bytes", 0),
                     "Embeddings and head": audit.get("embedding_bytes", 0),
                     **{column: getattr(row, name) for column, name in TOTALS.items()}})
    frame = pd.DataFrame(rows, columns=["Model", "Setting", "Workload", *NUMBERS]).set_index("Model")
    frame[list(NUMBERS)] = frame[list(NUMBERS)].astype(float) / 1e6
    frame["Other weights"] = frame["Weights"] - frame["Quantised layers"] - frame["Embeddings and head"]
    peak = frame["Generate peak"].fillna(frame["RAM peak"])
    return frame.assign(**{"Working memory": (peak - frame["Weights"] - frame["KV cache"]).clip(lower=0)})


def show_memory(run: Iterable[Measurement]) -> Tables:
    """The ledger as a notebook shows it. Raises ValueError for a run of several machines."""
    rows = list(run)
    machine, frame = machine_of(rows), memory_table(rows).dropna(axis="columns", how="all")
    return Tables(Table(part, [title, "MB", machine], decimals=NUMBERS)
                  for title, part in frame.groupby(level=0, sort=False))


def plot_memory(run: Iterable[Measurement]) -> Figure:
    """One stacked bar per setting: the parts of its peak at its longest workload. Raises ValueError for no rows or two
    machines."""
    named, machine = checked(run)
    frame = memory_table(cell.row for cell in named).groupby(["Model", "Setting"], sort=False).tail(1)
    if frame.empty:
        raise ValueError("no measurements to draw: nothing in this run is ok")
    models = dict([*frame.groupby(level=0, sort=False)])
    heights = [0.3 * len(part) + 0.5 for part in models.values()]
    figure, axes = plt.subplots(len(models), squeeze=False, figsize=(8.5, sum(heights) + 1), height_ratios=heights,
                                layout="constrained")
    plt.close(figure)
    for (title, part), ax in zip(models.items(), axes.flat):
        part[list(PARTS)].plot.barh(ax=ax, stacked=True, color=PARTS, legend=False, fontsize=SMALL, ylabel="")
        ax.bar_label(ax.containers[-1], part[list(PARTS)].sum(axis=1).map("{:.0f}".format), padding=3, size=SMALL)
        ax.set_yticks(range(len(part)), part["Setting"] + ", " + part["Workload"], size=TEXT, parse_math=False)
        ax.set_title(title, loc="left", size=TEXT, weight="bold", color=INK, parse_math=False)
        ax.margins(x=0.1)
        ax.invert_yaxis()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=len(PARTS), fontsize=SMALL)
    title = f"Where the bytes are (MB) · {machine}"
    figure.suptitle(title, x=0.01, ha="left", size=TITLE, color=INK, parse_math=False)
    return figure
