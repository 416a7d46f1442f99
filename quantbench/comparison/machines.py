"""Results of several machines or versions beside each other: cell by cell, as tables and as a chart."""

import os
from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from quantbench.charts import CHARTS, Panels, draw
from quantbench.conclusions import beside
from quantbench.labels import cells
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.tables import Tables, show, view
from quantbench.wording import cut, plain, span

Source = str | os.PathLike | Iterable[Measurement]
_RATE, _INTERVAL, _TIMES = FIGURES["tokens_per_s"], FIGURES["tokens_per_s_ci"], "Times the first"
_DECIMALS = {_RATE: 1, _INTERVAL: 1, _TIMES: 2, "Own ratio": 2, "Own ratio 95%": 2}
_COLUMNS = ["Setting", "Workload", "Machine", *_DECIMALS, "Baseline", "Verdict", "Weights", "Status"]
_NOTE = (f"{_TIMES} machine's: a quotient of medians measured apart, no claim. Own ratio: to the same machine's "
         "baseline, by rounds; a tie's interval holds 1.")


def gathered(sources: Iterable[Source], per_source: bool = False) -> pd.DataFrame:
    """A row per cell and side: a machine under one set of versions (and, with `per_source`, in one source). A cell has
    one `place` wherever it ran (random weights are as fast as real ones); its ratio is to its own side's baseline.
    `versions` are those in which the machine's sides differ. Raises ValueError where there is no row."""
    sides, shared = {}, {}  # (machine, versions, source) -> key -> row; machine -> what all its sides' versions share
    for number, source in enumerate(sources):
        for row in Run.read(source) if isinstance(source, (str, os.PathLike)) else Run.of(source):
            machine, versions = row.machine_name, (("driver", row.machine.get("driver")), *row.subject[-1])
            rows, key = sides.setdefault((machine, versions, number * per_source), {}), (row.cell[:-1], row.work)
            rows[key] = max(row, rows.get(key, row), key=lambda one: one.status == "ok")  # the later, if that ran
            shared[machine] = shared.get(machine, set(versions)).intersection(versions)
    if not sides:
        raise ValueError("nothing to compare: give runs or paths of results files")
    every = {key: row for rows in sides.values() for key, row in rows.items()}
    keys, found = {id(row): key for key, row in every.items()}, []
    named = [(place, keys[id(cell.row)], cell) for place, cell in enumerate(cells(every.values()))]
    for side, ((machine, versions, _), rows) in enumerate(sides.items()):
        here = {place: replace(cell, row=rows[key], random=False) for place, key, cell in named if key in rows}
        told = [f"{plain(name)} {cut(version, 12)}" for name, version in versions
                if version and (name, version) not in shared[machine]]
        for place, (cell, base, ratio) in zip(here, beside(here.values())):
            row, (low, high) = cell.row, (ratio and ratio.interval) or (None, None)
            found.append({
                "side": side, "machine": plain(machine) or "unnamed machine", "versions": " · ".join(told),
                "place": place, "cell": cell, "Model": cell.model, "Setting": cell.setting, "Workload": cell.workload,
                _RATE: row.tokens_per_s if cell.measured else None,
                _INTERVAL: row.tokens_per_s_ci and span(row.tokens_per_s_ci, ".1f"),
                "Own ratio": ratio and ratio.value, "Own ratio 95%": low and span((low, high), ".2f"), "low": low,
                "high": high, "Baseline": base.setting if base and ratio else None, "Verdict": ratio and ratio.verdict,
                "Weights": "random" if row.weights == "random" else None,
                "Status": None if cell.measured else cut(cell.outcome, 60)})
    frame = pd.DataFrame(found).astype(dict.fromkeys([_RATE, "Own ratio", "low", "high"], float))
    frame["Machine"] = (frame["machine"] + " · " + frame["versions"]).str.removesuffix(" · ")
    return frame.sort_values(["place", "side"], ignore_index=True)


def compare_table(*runs: Source) -> pd.DataFrame:
    """One row per cell and machine; NaN or None where there is nothing. See `compare`."""
    found = gathered(runs)
    first = found[found["side"] == 0].set_index("place")[_RATE]
    found[_TIMES] = (found[_RATE] / found["place"].map(first)).where(found["side"] > 0)
    return view(found.set_index("Model")[_COLUMNS], [], _DECIMALS, _NOTE)


def compare(*runs: Source) -> Tables:
    """Every cell on each machine, and under each set of versions there; a table per model. `runs` are runs or paths of
    results files. Between machines there are plain quotients, without an interval or a claim; a verdict is on a
    machine's own ratio, by rounds. Raises ValueError where there is no row, OSError for a file that is not there."""
    return show(compare_table(*runs))


def plot_machines(*runs: Source) -> Figure:
    """Tokens per second of each cell on every machine. Raises ValueError where nothing was measured."""
    found, panels = gathered(runs), Panels()
    for cell, machine in zip(found["cell"], found["Machine"]):
        if cell.measured:
            bar, random = CHARTS["throughput"].bar(cell), " (random weights)" * (cell.row.weights == "random")
            panel = panels.setdefault((cell.model, f"{cell.model} · {cell.workload}"), {})
            panel.setdefault(cell.setting, []).append(bar._replace(text=f"{bar.text}, {cut(machine, 32)}{random}"))
    if not panels:
        raise ValueError("no measurements to draw: none of these runs measured a cell")
    return draw("Tokens per second by machine", "Each machine by itself: no claim between two", panels, _RATE)
