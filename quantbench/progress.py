"""How far a row of cells is, and how long it will still take, in words."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass
class Progress:
    """`began` is when the current cell did, `took` how long each before it needed, in seconds. `stop` ends it."""

    cells: list[str]
    stop: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    took: list[float] = field(default_factory=list)
    measuring: bool = False  # False while the weights are looked for
    failed: bool = False

    def start_cell(self) -> None:
        self.began, self.measuring = time.monotonic(), True

    def end_cell(self) -> None:
        self.took.append(time.monotonic() - self.began)

    def words(self) -> str:
        """ "Cell 2 of 4: GPT-2 · CPU INT8 · 128 tokens, 3 s so far; about 20 s left" """
        done, total, spent_s = len(self.took), len(self.cells), time.monotonic() - self.began
        if self.stop.is_set():
            return "Stopping"
        if not self.measuring:
            return f"Looking for the weights, {_seconds(spent_s)} so far"
        if done == total:
            return "Drawing"
        left = "time left: known after the first cell"
        if self.took:
            left = f"about {_seconds(max(sum(self.took) / done * (total - done) - spent_s, 1))} left"
        return f"Cell {done + 1} of {total}: {self.cells[done]}, {_seconds(spent_s)} so far; {left}"

    def last_words(self) -> str:
        """ "Done: 4 of 4 cells measured." """
        done = f"{len(self.took)} of {len(self.cells)} cells"
        if self.failed:
            return f"Ended after {done}."
        if len(self.took) < len(self.cells):
            return f"Stopped after {done}; what was measured is kept."
        return f"Done: {done} measured."


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
