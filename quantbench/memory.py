"""The memory ledger: where a measurement's bytes are, as a table and as a stacked chart."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from quantbench.grid import Grids
from quantbench.record import Measurement
from quantbench.tables import LENGTH, grid
from quantbench.view import Cell, cells, machine_of, plain

# part -> colour (Okabe-Ito); the parts of a row add up to its generate peak
PARTS = {"Quantised layers": "#E69F00", "Embeddings and head": "#56B4E9", "Other weights": "#0072B2",
         "KV cache": "#009E73", "Working memory": "#BBBBBB"}
TOTALS = ("Weights", "Held before load", "Load peak", "Generate peak", "Reserved", "Device-wide", "RAM peak")


def ledger(row: Measurement) -> dict[str, int | None]:
    """Bytes of one measurement by part, and its totals. "Working memory" is what the parts leave of the peak: activations,
    logits, workspaces, and on a CPU the libraries that the first generation loads. Generate peak is VRAM on a GPU,
    resident memory above the level before load on a CPU."""
    audit, weights = row.audit or {}, row.weights_bytes
    quantised, embedding = audit.get("quantised_bytes", 0), audit.get("embedding_bytes", 0)
    tokens = (row.prompt_tokens or 0) + (row.new_tokens or 0)
    cache = audit.get("kv_bytes_per_token", 0) * tokens * row.batch_size
    peak = row.ram_peak_bytes if row.vram_peak_bytes is None else row.vram_peak_bytes
    parts = {"Quantised layers": quantised, "Embeddings and head": embedding,
             "Other weights": None if weights is None else weights - quantised - embedding, "KV cache": cache,
             "Working memory": None if None in (peak, weights) else max(peak - weights - cache, 0)}
    return parts | dict(zip(TOTALS, (weights, row.held_before_bytes, row.load_peak_bytes, row.vram_peak_bytes,
                                     row.vram_reserved_bytes, row.vram_device_bytes, row.ram_peak_bytes)))


def memory_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """The ledger of every measured row in MB (1e6 bytes), its parts first; NaN where a figure does not apply."""
    measured = [cell for cell in cells(run) if cell.measured]
    rows = [{"Setting": cell.setting, LENGTH: cell.row.max_new_tokens}
            | {name: float("nan") if size is None else size / 1e6 for name, size in ledger(cell.row).items()}
            for cell in measured]
    return pd.DataFrame(rows, columns=["Setting", LENGTH, *PARTS, *TOTALS],
                        index=pd.Index([cell.model for cell in measured], name="Model", dtype=object))


def show_memory(run: Iterable[Measurement]) -> Grids:
    """The ledger as a notebook shows it, with a sentence on what no setting quantises."""
    rows = list(run)
    frame = memory_table(rows).dropna(axis="columns", how="all")
    decimals = dict.fromkeys([*PARTS, *TOTALS], 1)
    return Grids([grid(part, [plain(model), "MB", machine_of(rows)], note=_unquantised(rows, model), decimals=decimals)
                  for model, part in frame.groupby(level=0, sort=False)])


def plot_memory(run: Iterable[Measurement]) -> Figure:
    """One stacked bar per setting: the parts of its peak at the longest length. Raises ValueError for no rows or two
    machines."""
    rows = list(run)
    machine, measured = machine_of(rows), [cell for cell in cells(rows) if cell.measured]
    if not measured:
        raise ValueError("no measurements to draw: nothing in this run is ok")
    longest = {(cell.model, cell.setting): cell for cell in sorted(measured, key=lambda cell: cell.row.max_new_tokens)}
    models = list(dict.fromkeys(cell.model for cell in measured))
    settings = {model: [cell for (name, _), cell in longest.items() if name == model] for model in models}
    heights = [0.3 * len(settings[model]) + 0.5 for model in models]
    figure, axes = plt.subplots(len(models), 1, figsize=(8.5, sum(heights) + 1), squeeze=False, layout="constrained",
                                height_ratios=heights)
    plt.close(figure)
    for model, ax in zip(models, axes[:, 0]):
        _stack(ax, [cell for cell in measured if cell in settings[model]], model)
    axes[-1, 0].set_xlabel("MB (1e6 bytes)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(f"Where the bytes are · {machine}", x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def _stack(ax, mine: list[Cell], model: str) -> None:
    lefts = [0.0] * len(mine)
    for part, colour in PARTS.items():
        sizes = [(ledger(cell.row)[part] or 0) / 1e6 for cell in mine]
        ax.barh(range(len(mine)), sizes, left=lefts, color=colour, label=part, height=0.72)
        lefts = [left + size for left, size in zip(lefts, sizes)]
    for place, total in enumerate(lefts):
        ax.text(total, place, f" {total:.0f}", va="center", fontsize=8)
    ax.set_yticks(range(len(mine)), [f"{cell.setting}, {cell.row.max_new_tokens} tokens" for cell in mine], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, max(lefts) * 1.1)
    ax.set_title(model, loc="left", fontsize=9, fontweight="bold", parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(axis="x", labelsize=8)


def _unquantised(rows: list[Measurement], model: str) -> str:
    """What stays in full width whatever the setting: the reason why a small model shrinks less than its bits."""
    mine = [cell.row for cell in cells(rows) if cell.measured and cell.model == model]
    shares = [(row.audit["embedding_bytes"], row) for row in mine
              if (row.audit or {}).get("quantised") and row.audit.get("embedding_bytes")]
    if not shares:
        return ""
    size, row = max(shares, key=lambda share: share[0] / share[1].weights_bytes)
    return (f"{size / 1e6:.0f} MB of {row.weights_bytes / 1e6:.0f} MB under {row.setting_label} are embeddings and the "
            "output head: they stay unquantised.")
