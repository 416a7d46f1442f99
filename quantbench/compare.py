"""Machines side by side, as tables and as a chart."""

from __future__ import annotations

import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from quantbench.bars import GREY, Bar, Panel, figure, white
from quantbench.charts import COLOURS
from quantbench.grid import EMPTY, Grid, Grids
from quantbench.record import FIGURES
from quantbench.settings import SETTINGS
from quantbench.sides import Entry, Key, Side, Source, holds_one, keys, ratio, sides
from quantbench.stats import Interval

_RATE = FIGURES["tokens_per_s"].label
COLUMNS = ("Setting", "Workload", "Machine", _RATE, f"{_RATE} low", f"{_RATE} high", "Ratio", "Ratio low", "Ratio high")
_NONE = Entry("", 0, None)


def compare_table(*runs: Source) -> pd.DataFrame:
    """One row per cell and machine: tokens/sec and its ratio to the first machine's, each with its 95% interval.

    NaN where there is none. See `compare` for what `runs` may be.
    """
    found, rows, models = sides(runs), [], []
    for key in keys(found):
        base = found[0].entries.get(key, _NONE)
        for side in found:
            entry = side.entries.get(key)
            if entry is not None:
                over, span = ratio(entry, base) if side is not found[0] else (None, None)
                rows.append([key.setting, key.workload, side.name, entry.rate, *(entry.interval or (None, None)),
                             over, *(span or (None, None))])
                models.append(key.model)
    frame = pd.DataFrame(rows, columns=list(COLUMNS), index=pd.Index(models, name="Model", dtype=object))
    return frame.astype(dict.fromkeys(COLUMNS[3:], float))


def compare(*runs: Source) -> Grids:
    """Tokens/sec of every cell on each machine, and the ratio to the first machine's with its 95% interval: one
    table per model.

    `runs` are runs, paths of results files, and paths of the published table (.csv), which has no intervals. A
    machine measured under several sets of versions stands there once for each.
    """
    found = sides(runs)
    shown = keys(found)
    models = list(dict.fromkeys(key.model for key in shown))
    return Grids([_grid(model, [key for key in shown if key.model == model], found,
                        _notes(found) if model == models[-1] else "") for model in models])


def _grid(model: str, mine: list[Key], found: list[Side], note: str) -> Grid:
    random = [side.name for side in found if _random(side, mine)]
    caption = [model] + ([f"random weights on {' and '.join(random)}: speed is real, text is not"] if random else [])
    header, rows = ["Setting", "Workload"], [[key.setting, key.workload] for key in mine]
    for place, side in enumerate(found):
        header += [f"{side.name}: {_RATE} (95%)"] + [f"{side.name}: ratio (95%)"] * (place > 0)
        for row, key in zip(rows, mine):
            entry = side.entries.get(key, _NONE)
            row += [_rated(entry)] + [_ratio(entry, found[0].entries.get(key, _NONE))] * (place > 0)
    return Grid(caption, header, rows, frozenset(header[2:]), note=note)


def _notes(found: list[Side]) -> str:
    ratios = f"Ratios are to {found[0].name}; a tie's interval holds 1." if len(found) > 1 else ""
    return " ".join(filter(None, [ratios, *dict.fromkeys(side.note for side in found)]))


def _rated(entry: Entry) -> str:
    if entry.rate is None:
        return entry.status or EMPTY
    return f"{entry.rate:.1f}" + (f" ({_span(entry.interval, 1)})" if entry.interval else "")


def _ratio(entry: Entry, base: Entry) -> str:
    over, span = ratio(entry, base)
    if over is None:
        return EMPTY
    tie = ", tie" if span and holds_one(span) else ""
    return f"{over:.2f}× " + (f"({_span(span, 2)}{tie})" if span else "(no interval)")


def _span(interval: Interval, decimals: int) -> str:
    return f"{interval[0]:.{decimals}f}–{interval[1]:.{decimals}f}"


# ---- the chart ----

def plot_machines(*runs: Source) -> Figure:
    """Tokens per second of each cell on every machine, per model and workload; a letter per machine. Raises
    ValueError where nothing was measured."""
    found = sides(runs)
    shown = keys(found)
    if not shown:
        raise ValueError("no measurements to draw: none of these runs measured a cell")
    letters = [chr(ord("A") + place % 26) for place in range(len(found))]
    room = max(130 // len(found) - 4, 12)
    names = [f"{letter} {side.name if len(side.name) <= room else f'{side.name[:room - 1]}…'}"
             for letter, side in zip(letters, found)]
    panels = []
    for model in dict.fromkeys(key.model for key in shown):
        mine = [key for key in shown if key.model == model]
        random = ", ".join(letter for letter, side in zip(letters, found) if _random(side, mine))
        title = f"{model} (random weights: {random})" if random else model
        panels += [Panel(model, f"{title} · {workload}", [
            (setting, _bars(Key(model, setting, workload), mine, list(zip(letters, found))))
            for setting in dict.fromkeys(key.setting for key in mine)]) for workload in _workloads(mine, found)]
    return figure("Tokens per second by machine", " | ".join(names), panels, _RATE)


def _random(side: Side, mine: list[Key]) -> bool:
    return any(side.entries.get(key, _NONE).random for key in mine)


def _workloads(mine: list[Key], found: list[Side]) -> list[str]:
    lengths = {key.workload: side.entries[key].length for key in mine for side in found if key in side.entries}
    return sorted(lengths, key=lengths.__getitem__)


def _bars(key: Key, mine: list[Key], found: list[tuple[str, Side]]) -> list[Bar]:
    """A bar for each machine that has this setting at any length: so the panels of a model line up."""
    alike = [other for other in mine if other.setting == key.setting]
    return [_bar(side.entries.get(key, _NONE), alike, side, letter, place / max(len(found) - 1, 1))
            for place, (letter, side) in enumerate(found) if any(other in side.entries for other in alike)]


def _bar(entry: Entry, alike: list[Key], side: Side, letter: str, share: float) -> Bar:
    setting = SETTINGS.get(next(side.entries[key].setting for key in alike if key in side.entries))
    colour = white(to_rgb(COLOURS[setting.key]) if setting else GREY, 0.55 * share)
    if entry.rate is None:
        return Bar(colour, "", None, f"{letter} {entry.status or 'not measured'}")
    hatch = "////" if setting and setting.device == "cpu" else ""
    noisy = " noisy" if entry.row and entry.row.noisy else ""
    return Bar(colour, hatch, entry.rate, f"{letter} {entry.rate:.1f}{noisy}", entry.interval)
