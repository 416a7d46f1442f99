"""Write a run to a folder in the forms that people use next."""

from __future__ import annotations

import os
from pathlib import Path

from quantbench.charts import plot_latency, plot_lengths, plot_throughput, plot_vram
from quantbench.findings import findings
from quantbench.run import Run
from quantbench.tables import markdown, table

CHARTS = {"throughput": plot_throughput, "lengths": plot_lengths, "latency": plot_latency, "memory": plot_vram}


def save(run: Run, folder: str | os.PathLike) -> list[Path]:
    """Write rows.jsonl, table.csv, table.md (with the findings) and the charts as PNG; return their paths.

    Raises OSError if the folder cannot be written, ValueError if nothing was measured.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = run.path if run.path is not None and run.path.parent == folder else run.save(folder / "rows.jsonl")
    table(run).to_csv(folder / "table.csv")
    (folder / "table.md").write_text(f"{markdown(run)}\n{findings(run)._repr_markdown_()}\n")
    for name, plot in CHARTS.items():
        plot(run).savefig(folder / f"{name}.png", dpi=160)
    return [rows, folder / "table.csv", folder / "table.md", *(folder / f"{name}.png" for name in CHARTS)]
