"""What changed on a machine from one run to the next: the moves of its ratios, and the sentences made of them."""

from itertools import pairwise

import numpy as np
import pandas as pd

from quantbench.comparison.machines import Source, gathered
from quantbench.conclusions import Findings
from quantbench.intervals import LEAST, PROCESSES
from quantbench.records import FIGURES
from quantbench.wording import EMPTY, span

GREW = 0.01  # memory is read, not sampled: a change above this share is one
TIMES = 4  # the median of the others' moves, so many times: of 20 moves by processes alone 19 stay below it (simulated)
FLOOR, WIDEST = 0.02, 0.4  # a spread's bounds; 0.4: A/A between processes on a noisy host reached 0.77 to 1.39


def changes(*runs: Source) -> Findings:
    """What changed on each machine from one run, or one set of versions, to the next. Two runs are hours and processes
    apart: what is compared is a cell's ratio to its own run's baseline (see `moves`), and memory. Raises ValueError
    where there is no row, OSError for a file that is not there."""
    said = []
    for machine, mine in gathered(runs, per_source=True).groupby("machine", sort=False):
        sides = [side for _, side in mine.groupby("side")]
        if len(sides) == 1:
            said.append(f"{machine}: measured once, nothing to hold it against.")
        for before, after in pairwise(sides):
            both, was, now = moves(before, after), before["versions"].iloc[0], after["versions"].iloc[0]
            differ = "the same versions of everything" if was == now else f"{was or EMPTY} → {now or EMPTY}"
            said += [f"{machine}: {differ}.", *(text for row in both.to_dict("records") for text in _told(row))]
            said += _counted(both)
    return Findings(said)


def moves(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """A row per cell that two sides of `gathered` share. `move` is its ratio after over before, from `low` to `high`:
    NaN unless both have an interval, to the same baseline. `spread` is what the machine alone may move a ratio by (the
    size of a logarithm): 4 times the median of the other settings' moves, at least 2%, and 40% with fewer than two
    others. `verdict` is "faster" or "slower" only where the interval excludes 1 and the move exceeds the spread."""
    both = before.merge(after, on=["place", "Model", "Setting", "Workload"], suffixes=("", "_after"))
    same, once = both["Baseline"] == both["Baseline_after"], 1 + PROCESSES  # is in both intervals, and counts once
    low = (both["low_after"] / both["high"] * once).where(same)
    high = (both["high_after"] / both["low"] / once).where(same)
    move = (both["Own ratio_after"] / both["Own ratio"]).where(low.notna())
    size = np.log(move.dropna()).abs()
    setting, sizes = both.groupby(["Model", "Setting"]).ngroup()[size.index].to_numpy(), size.to_numpy()
    others = {one: np.median(sizes[setting != one]) for one in {*setting}} if len({*setting}) > 2 else {}
    spread = pd.Series([max(FLOOR, TIMES * others[one]) if others else WIDEST for one in setting], size.index, float)
    named = (size > spread).reindex(both.index, fill_value=False) & ((low > 1) | (high < 1))
    verdict = np.select([move.isna(), ~named, move > 1], ["not compared", "within the spread", "faster"], "slower")
    return both.assign(move=move, low=low, high=high, spread=spread, verdict=verdict)


def _told(row: dict) -> list[str]:
    """The sentences on one cell: its move, if it is named, and what is read: whether it runs, and memory."""
    old, new, said = row["cell"], row["cell_after"], []
    if row["verdict"] in ("faster", "slower"):
        said.append(f"{row['verdict']} by {abs(row['move'] - 1):.0%} against {row['Baseline']} "
                    f"({span((row['low'], row['high']), '.2f')} times what it was).")
    if old.row.status != new.row.status:
        said.append(f"was {old.outcome.partition(':')[0]}, now {new.outcome}.")
    for name in ("weights_gb", "vram_gb"):
        was, now = getattr(old.row, name), getattr(new.row, name)
        if was and now and abs(now / was - 1) > GREW:
            said.append(f"{FIGURES[name]} {was:.3f} → {now:.3f}.")
    return [f"{row['Model']}, {row['Setting']}, {row['Workload']}: {text}" for text in said]


def _counted(both: pd.DataFrame) -> list[str]:
    """How many cells no sentence names, and how the baselines ran."""
    moved, drift = both[both["move"].notna()], (both["Tokens/sec_after"] / both["Tokens/sec"]).dropna()
    bases = sorted(drift[both["Verdict"].isna() & both["Verdict_after"].isna()])
    said = [] if len(both) else ["No cell is in both."]
    if len(moved):
        said.append(f"No change beyond the spread of these two runs ({span(sorted(moved['spread']), '.0%')} of a ratio"
                    f"): {(moved['verdict'] == 'within the spread').sum()} of {len(moved)} ratios.")
    if apart := len(drift) - len(bases) - len(moved):
        said.append(f"Not compared: {apart} of {len(drift)} cells (under {LEAST} rounds with the same baseline).")
    if bases:
        said.append(f"The baselines ran at {span(bases, '.2f')} times what they did: two runs cannot tell why.")
    return said
