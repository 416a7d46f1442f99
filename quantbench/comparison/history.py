"""What changed on a machine from one run to the next, in sentences computed from the rows."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

import pandas as pd

from quantbench.comparison.machines import Source, differences, gathered
from quantbench.conclusions import Findings
from quantbench.intervals import LEAST, PROCESSES
from quantbench.labels import Cell
from quantbench.wording import cut, plain, span

GREW = 0.01  # memory is read, not sampled: a change above this share is one
TIMES = 4  # the median of the others' moves, so many times: of 20 moves by processes alone 19 stay below it (simulated)
FLOOR, WIDEST = 0.02, 0.4  # a spread's bounds; 0.4: A/A between processes on a noisy host reached 0.77 to 1.39


def changes(*runs: Source) -> Findings:
    """What changed on each machine from one run, or one set of versions, to the next, in the order they come.

    Two runs are hours and processes apart, so tokens/sec of one are never held against the other's: what moves is a
    cell's ratio to its own run's baseline, by rounds. A move is named only if (a) its interval, from low after / high
    before to high after / low before, excludes 1, and (b) it exceeds the spread of this machine between these two runs:
    four times the median move of the other settings' ratios, at least 2%, and 40% with fewer than two others. Cells
    without 6 rounds in both runs are counted, not compared. Memory is read, not sampled: over 1% is a change.
    Raises ValueError where there is no row, OSError for a file that is not there.
    """
    said = []
    for machine, mine in gathered(runs, per_source=True).groupby("machine", sort=False):
        sides = [side for _, side in mine.groupby("side")]
        if len(sides) == 1:
            said.append(f"{machine}: measured once, nothing to hold it against.")
        for before, after in pairwise(sides):
            was, now = before["facts"].iloc[0], after["facts"].iloc[0]
            differ = [f"{plain(name)} {cut(was.get(name) or 'none', 12)} → {cut(now.get(name) or 'none', 12)}"
                      for name in differences([was, now])]
            said.append(f"{machine}: {', '.join(differ) or 'the same versions of everything, measured twice'}.")
            said += _changed(before.merge(after, on="key", suffixes=("", "_now")))
    return Findings(said)


def _changed(pairs: pd.DataFrame) -> list[str]:
    """The sentences on the cells that are in both runs."""
    moves = {row.key: move for row in pairs.itertuples() if (move := _move(row))}
    spreads, said, named = {key: _spread(key, moves) for key in moves}, [], 0
    for row in pairs.itertuples():
        told = _told(row.cell, row.cell_now)
        over, low, high = moves.get(row.key, (1, 1, 1))
        if not low <= 1 <= high and abs(math.log(over)) > spreads[row.key]:
            named += 1
            told.insert(0, f"{'slower' if over < 1 else 'faster'} by {abs(over - 1):.0%} against {row.base.setting} "
                           f"(interval {span(sorted([abs(low - 1), abs(high - 1)]), '.1%')}).")
        said += [f"{row.cell.model}, {row.cell.setting}, {row.cell.workload}: {text}" for text in told]
    both = [row for row in pairs.itertuples() if row.cell.measured and row.cell_now.measured]
    drifts = sorted(row.cell_now.row.tokens_per_s / row.cell.row.tokens_per_s for row in both
                    if row.cell is row.base and row.cell_now is row.base_now)
    if moves:
        said.append(f"No change beyond the spread of these two runs ({span(sorted(spreads.values()), '.0%')} of a "
                    f"ratio): {len(moves) - named} of {len(moves)} ratios.")
    if apart := len(both) - len(drifts) - len(moves):
        said.append(f"Measured apart, not compared: {apart} of {len(both)} cells (in one run or both under {LEAST} "
                    "rounds with the same baseline).")
    if drifts:
        said.append(f"The baselines ran at {span(drifts, '.2f')} times what they did: by the day or by the versions, "
                    "two runs cannot tell.")
    return said if len(pairs) else ["No cell is in both."]


def _move(row: tuple) -> tuple[float, float, float] | None:
    """A cell's ratio to its run's own baseline, after over before, and its interval. None unless both runs have one
    of that ratio, to the same baseline. What processes differ by is in both intervals, and counts once here."""
    was, now = row.ratio, row.ratio_now
    if not (was and now and was.interval and now.interval and row.base.row.setting == row.base_now.row.setting):
        return None
    once = 1 + PROCESSES
    return (now.value / was.value, now.interval[0] / was.interval[1] * once, now.interval[1] / was.interval[0] / once)


def _spread(key: tuple, moves: dict[tuple, tuple]) -> float:
    """What the machine alone may move a ratio by (a logarithm's size), learnt from the other models' and settings'."""
    others = {other: abs(math.log(move[0])) for other, move in moves.items() if other[:3] != key[:3]}
    return max(FLOOR, TIMES * median(others.values())) if len({other[:3] for other in others}) > 1 else WIDEST


def _told(old: Cell, new: Cell) -> list[str]:
    """What is read, not sampled: what stopped or started working, and memory."""
    was, now = ("measured" if cell.measured else cell.status for cell in (old, new))
    said = [f"was {was}, now {now}."] if was != now else []
    for name, label in (("weights_gb", "weights"), ("vram_gb", "peak VRAM")):
        was, now = getattr(old.row, name), getattr(new.row, name)
        if was and now and abs(now / was - 1) > GREW:
            said.append(f"{label} {was:.3f} → {now:.3f} GB.")
    return said
