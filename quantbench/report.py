"""A run as one file to hand on: HTML that needs nothing beside it, or Markdown for a GitHub README."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path

from quantbench.findings import findings
from quantbench.grid import Grids, markdown_text
from quantbench.record import FIGURES, Measurement
from quantbench.save import CHARTS
from quantbench.tables import machine_table, show
from quantbench.view import Cell, cells, plain, workloads

TITLE = "What each precision costs and buys"
_ALT = {"throughput": "Tokens per second of every setting", "lengths": "Tokens per second by number of new tokens",
        "latency": "Latency of every setting", "memory": "Memory of every setting"}
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:0 auto;padding:1rem;background:#fff;color:#222}
section{overflow-x:auto}
figure{margin:1.2rem 0}
img{max-width:100%;background:#fff;border-radius:6px}
@media (prefers-color-scheme:dark){body{background:#15171a;color:#e4e4e4} img{padding:6px}}
"""
# Nothing is fetched and nothing runs, whatever a model's name says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LONG = 48  # of a name in a Mermaid chart: it wraps nothing
# Between Mermaid's quotes there is no escape: what it or its fence reads as more than text becomes a look-alike.
_TWINS = str.maketrans({'"': "”", "`": "‘", "<": "‹", ">": "›", "#": "＃", "%": "％", "{": "(", "}": ")", ";": ",",
                        "|": "¦", "\\": "⧵", "&": "＆", "$": "＄", "[": "(", "]": ")"})


def report(run: Iterable[Measurement], path: str | os.PathLike) -> Path:
    """Write the run to `path`, a section per machine, and return it: .html with its charts inside, .md with Mermaid's.

    Raises ValueError for another suffix or a run without rows.
    """
    path, rows = Path(path), list(run)
    write = {".html": _html, ".md": _markdown}.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"a report ends in .html or .md, not {path.name!r}")
    if not rows:
        raise ValueError("no measurements to report: measure at least one setting first")
    machines: dict[str, list[Measurement]] = {}
    for row in rows:
        machines.setdefault(plain(row.machine_name) or "a machine without a name", []).append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write(machines), encoding="utf-8")
    return path


def _machine(rows: list[Measurement]) -> Grids:
    """The machine's facts and versions, once for each that these rows were measured under."""
    grids: list = []
    for row in rows:
        grids += [grid for grid in machine_table(row.machine, row.versions) if grid not in grids]
    return Grids(grids)


def _when(rows: list[Measurement]) -> str:
    days = sorted({plain(row.created_at)[:10] for row in rows})
    return f"Measured {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") + " by quantbench."


# ---- HTML ----

def _html(machines: dict[str, list[Measurement]]) -> str:
    sections = "\n".join(_html_section(name, rows) for name, rows in machines.items())
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n"
            f"{sections}\n</body>\n</html>\n")


def _html_section(name: str, rows: list[Measurement]) -> str:
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(rows))
    charts = "\n".join(_picture(chart, name, rows) for chart in CHARTS)
    return (f"<section>\n<h2>{html.escape(name)}</h2>\n<p>{html.escape(_when(rows))}</p>\n"
            f"{show(rows)._repr_html_()}\n<h3>What the numbers say</h3>\n<ul>{said}</ul>\n"
            f"<h3>Charts</h3>\n{charts}\n<h3>Machine and versions</h3>\n{_machine(rows)._repr_html_()}\n</section>")


def _picture(chart: str, name: str, rows: list[Measurement]) -> str:
    png = io.BytesIO()
    CHARTS[chart](rows).savefig(png, format="png", dpi=120)
    alt = html.escape(f"{_ALT[chart]} on {name}; the figures are in the tables above")
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"></figure>'


# ---- Markdown ----

def _markdown(machines: dict[str, list[Measurement]]) -> str:
    return "\n".join([f"# {TITLE}\n", *(_markdown_section(name, rows) for name, rows in machines.items())])


def _markdown_section(name: str, rows: list[Measurement]) -> str:
    parts = [f"## {markdown_text(name)}", _when(rows), show(rows).markdown(), "### What the numbers say",
             findings(rows)._repr_markdown_(), "### Charts",
             "\n\n".join(_charts(rows)) or "Nothing was measured.",
             "Intervals are in the tables: Mermaid draws none.",
             "### Machine and versions", _machine(rows).markdown()]
    return "\n\n".join(parts)


def _charts(rows: list[Measurement]) -> list[str]:
    """Per model: tokens per second at each length, then its memory."""
    charts = []
    named = [cell for cell in cells(rows) if cell.measured]
    memory = "vram_gb" if any(cell.row.vram_gb is not None for cell in named) else "weights_gb"
    for model in dict.fromkeys(cell.model for cell in named):
        mine = [cell for cell in named if cell.model == model]
        for workload in workloads(mine):
            charts.append(_mermaid(f"{_short(model)} · {workload}", "tokens_per_s", ".1f",
                                   [cell for cell in mine if cell.workload == workload]))
        longest = workloads(mine)[-1] if memory == "vram_gb" else None
        once = {cell.setting: cell for cell in mine if longest in (None, cell.workload)}
        charts.append(_mermaid(" · ".join(filter(None, [_short(model), longest])), memory, ".3f", list(once.values())))
    return [chart for chart in charts if chart]


def _mermaid(title: str, figure: str, digits: str, mine: list[Cell]) -> str:
    """One horizontal bar chart; settings without the figure are left out, as the table says why."""
    values = {cell.setting: getattr(cell.row, figure) for cell in mine if getattr(cell.row, figure) is not None}
    if not values:
        return ""
    label = FIGURES[figure].label
    return "\n".join([
        "```mermaid", "xychart-beta horizontal", f"    title {_quoted(f'{title} · {label}')}",
        f"    x-axis [{', '.join(_quoted(_short(setting)) for setting in values)}]",
        f"    y-axis {_quoted(label)} 0 --> {_top(values.values())}",
        f"    bar [{', '.join(f'{value:{digits}}' for value in values.values())}]", "```"])


def _quoted(text: str) -> str:
    return f'"{text.translate(_TWINS)}"'


def _short(name: str) -> str:
    return name if len(name) <= _LONG else f"{name[:_LONG - 1]}…"


def _top(values: Iterable[float]) -> str:
    """The end of the scale: the largest value, rounded up at its second digit."""
    most = max(*values, 1e-6)
    step = 10.0 ** (math.floor(math.log10(most)) - 1)
    return f"{math.ceil(most / step) * step:.6g}"
