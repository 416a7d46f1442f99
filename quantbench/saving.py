"""A run in the forms that people use next, in a folder."""

import io
import os
from pathlib import Path

from quantbench.charts import CHARTS
from quantbench.conclusions import findings
from quantbench.results import Run, write_whole
from quantbench.tables import show, table

_FORMULA = tuple("=+-@＝＋－＠\t\r")  # what a spreadsheet would compute, if it were not kept a text


def save(run: Run, folder: str | os.PathLike) -> list[Path]:
    """Write rows.jsonl (unless the run's own file is there), table.csv, table.md with the findings, and the charts as
    PNG, each whole or not at all; return their paths.

    Raises ValueError if nothing was measured, and for two machines; OSError if the folder cannot be written."""
    run, folder = Run.of(run), Path(folder).expanduser()
    if not any(row.status == "ok" and row.tokens_per_s for row in run):
        raise ValueError("nothing to save: no setting was measured")
    csv = table(run).reset_index().map(lambda value: f"'{value}" if str(value).startswith(_FORMULA) else value)
    files = {"table.csv": csv.to_csv(index=False).encode("utf-8-sig"),
             "table.md": f"{show(run).markdown()}\n{findings(run)._repr_markdown_()}\n".encode()}
    for name, chart in CHARTS.items():
        picture = io.BytesIO()
        chart.plot(run).savefig(picture, format="png", dpi=160)
        files[f"{name}.png"] = picture.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    here = run.path is not None and run.path.resolve().parent == folder.resolve()
    rows = run.path if here else run.save(folder / "rows.jsonl")
    for name, content in files.items():
        write_whole(folder / name, content)
    return [rows, *(folder / name for name in files)]
