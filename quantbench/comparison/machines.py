"""Results of several machines or versions beside each other: cell by cell, as tables and as a chart."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from quantbench.charts import CHARTS, Panels, draw
from quantbench.comparison.t4 import REFERENCE, reference_rows
from quantbench.conclusions import beside
from quantbench.intervals import Ratio
from quantbench.labels import cells
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.tables import RANDOM, Table, Tables
from quantbench.wording import cut, plain, span

Source = str | os.PathLike | Iterable[Measurement]
_RATE, _INTERVAL, _TIMES = FIGURES["tokens_per_s"], FIGURES["tokens_per_s_ci"], "Times the first"
_DECIMALS = {_RATE: 1, _INTERVAL: 1, _TIMES: 2, "Own ratio": 2, "Own ratio 95%": 2}
COLUMNS = ("Setting", "Workload", "Machine", *_DECIMALS, "Baseline", "Verdict", "Weights", "Status")
_NOTE = (f"{_TIMES} machine's: a quotient of medians measured apart, no claim. Own ratio: to the same machine's "
         f"baseline, by rounds; a tie's interval holds 1. {REFERENCE}: one figure per row, no samples.")


def gathered(sources: Iterable[Source], per_source: bool = False) -> pd.DataFrame:
    """A row per side and cell: side (a number; a machine has one for each set of versions and, with `per_source`, for
    each source), machine, facts (versions and driver), key (what makes a cell the same wherever it ran: random weights
    are as fast as real ones), cell, its own base and its ratio to it. Sides in the order of sources, cells in theirs.

    Raises ValueError where there is no row, OSError for a file that is not there.
    """
    read = [((place * per_source, row.machine_name, row.subject[-1]), plain(row.machine_name) or "unnamed machine",
             {"driver": row.machine.get("driver"), **dict(row.subject[-1])}, _key(row), row)
            for place, source in enumerate(sources) for row in _rows(source)]
    if not read:
        raise ValueError("nothing to compare: give runs or paths of results files")
    frame = pd.DataFrame(read, columns=["side", "machine", "facts", "key", "row"])
    frame = frame.drop_duplicates(["side", "key"], keep="last")
    named = {_key(cell.row): cell for cell in cells(frame.drop_duplicates("key")["row"])}
    frame["cell"] = [replace(named[key], row=row, random=False) for key, row in zip(frame["key"], frame["row"])]
    frame["order"] = frame["key"].map({key: place for place, key in enumerate(named)})
    frame["side"] = pd.factorize(frame["side"])[0]
    frame = frame.sort_values(["side", "order"], ignore_index=True)
    found = [one for _, side in frame.groupby("side") for one in beside(side["cell"])]
    return frame.assign(base=[base for _, base, _ in found], ratio=[ratio for _, _, ratio in found])


def compare_table(*runs: Source) -> pd.DataFrame:
    """One row per cell and machine; NaN or None where there is nothing. See `compare`."""
    found, rows, first = gathered(runs).sort_values(["order", "side"]), [], {}
    for one, machine in zip(found.itertuples(), _machines(found)):
        cell, ratio, seen = one.cell, one.ratio or Ratio(None, None, 0), one.cell.row.tokens_per_s_ci
        rate = cell.row.tokens_per_s if cell.measured else None
        there = first.setdefault(one.key, rate if one.side == 0 else None)
        rows.append((cell.setting, cell.workload, machine, rate, seen and span(seen, ".1f"),
                     rate / there if one.side and rate and there else None,
                     ratio.value, ratio.interval and span(ratio.interval, ".2f"),
                     one.base.setting if one.ratio and one.base else None, ratio.verdict if one.ratio else None,
                     "random" if cell.row.weights == "random" else None,
                     None if cell.measured else cut(cell.outcome, 60)))
    frame = pd.DataFrame(rows, columns=COLUMNS, index=pd.Index([cell.model for cell in found["cell"]], name="Model"))
    return frame.astype({_RATE: float, _TIMES: float, "Own ratio": float})


def compare(*runs: Source) -> Tables:
    """Every cell on each machine, one table per model.

    `runs` are runs, paths of results files (.jsonl) and of the reference table (.csv). A machine measured under
    several sets of versions stands there once for each. Between machines there are plain quotients, without an interval
    or a claim; a verdict is on each machine's own ratio to its own baseline, by rounds.
    Raises ValueError where there is no row, OSError for a file that is not there.
    """
    return Tables(Table(mine.dropna(axis=1, how="all"), [model] + [RANDOM] * ("random" in set(mine["Weights"])), _NOTE,
                        _DECIMALS) for model, mine in compare_table(*runs).groupby(level=0, sort=False))


def plot_machines(*runs: Source) -> Figure:
    """Tokens per second of each cell on every machine, per model and workload. Raises ValueError where nothing was
    measured."""
    found, panels = gathered(runs).sort_values(["order", "side"]), Panels()
    for cell, machine in zip(found["cell"], _machines(found)):
        if cell.measured:
            bar, random = CHARTS["throughput"].bar(cell), " (random weights)" * (cell.row.weights == "random")
            panel = panels.setdefault((cell.model, f"{cell.model} · {cell.workload}"), {})
            panel.setdefault(cell.setting, []).append(bar._replace(text=f"{bar.text}, {cut(machine, 32)}{random}"))
    if not panels:
        raise ValueError("no measurements to draw: none of these runs measured a cell")
    return draw("Tokens per second by machine", "Each machine by itself: no claim between two", panels, _RATE)


def _machines(found: pd.DataFrame) -> list[str]:
    """Each row's machine, with the versions in which the machine's own sides differ."""
    differ = {machine: differences(facts) for machine, facts in found.groupby("machine")["facts"]}
    return [" · ".join([machine, *(f"{plain(name)} {cut(facts[name], 12)}" for name in differ[machine]
                                   if facts.get(name))]) for machine, facts in zip(found["machine"], found["facts"])]


def differences(sets: Iterable[Mapping]) -> list[str]:
    """The names, of packages and the driver, whose values differ among these facts."""
    sets = list(sets)
    names = dict.fromkeys(name for one in sets for name in one)
    return [name for name in names if len({one.get(name) for one in sets}) > 1]


def _rows(source: Source) -> Iterable[Measurement]:
    if not isinstance(source, (str, os.PathLike)):
        return source
    return reference_rows(source) if Path(source).suffix.lower() == ".csv" else Run.read(source)


def _key(row: Measurement) -> tuple:
    return row.model, row.setting, *row.key[-4:]
