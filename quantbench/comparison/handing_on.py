"""A run as one Markdown file to hand on, with charts that GitHub draws (Mermaid). HTML: nbconvert of a notebook."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from quantbench.conclusions import findings
from quantbench.labels import Cell, cells
from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.tables import machine_table, show
from quantbench.wording import cut, markdown_text

# Between Mermaid's quotes there is no escape: what it or its fence reads as more than text becomes a look-alike.
_TWINS = str.maketrans('"`<>#%{};|\\&$[]', "”‘‹›＃％(),¦⧵＆＄()")


def report(run: Iterable[Measurement], path: str | os.PathLike) -> Path:
    """Write the run to `path` (.md), a section per machine, and return it. Raises ValueError for another suffix or a
    run without rows."""
    path, run = Path(path), Run.of(run)
    if path.suffix.lower() != ".md":
        raise ValueError(f"a report ends in .md, not {path.name!r} (HTML: jupyter nbconvert --to html, of a notebook)")
    if not len(run):
        raise ValueError("no measurements to report: measure at least one setting first")
    parts = ["# What each precision costs and buys"]
    for name in dict.fromkeys(row.machine_name for row in run):
        mine, charts = run.only(machine_name=name), {}
        for cell in (cell for cell in cells(mine) if cell.measured):
            charts.setdefault(f"{cut(cell.title, 48)} · {cut(cell.workload, 48)}", []).append(cell)
        parts += [f"## {markdown_text(name) or 'A machine without a name'}",
                  f"Last measured: {markdown_text(max(row.created_at for row in mine)[:10])}.",
                  show(mine).markdown(), findings(mine)._repr_markdown_(), *map(_chart, charts, charts.values()),
                  *dict.fromkeys(machine_table(row.machine, row.versions).markdown() for row in mine)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _chart(title: str, mine: list[Cell]) -> str:
    rates = [cell.row.tokens_per_s for cell in mine]
    names = ", ".join(f'"{cut(cell.setting, 48).translate(_TWINS)}"' for cell in mine)
    return "\n".join(["```mermaid", "xychart-beta horizontal", f'    title "{title.translate(_TWINS)}"',
                      f"    x-axis [{names}]", f'    y-axis "Tokens/sec" 0 --> {1.05 * max(rates):.4g}',
                      f"    bar [{', '.join(f'{rate:.1f}' for rate in rates)}]", "```"])
