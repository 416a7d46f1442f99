"""The rounds of one comparison: every cell of a model and workload takes one sample each, in random order."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial

from tqdm.auto import tqdm

from quantbench import machine
from quantbench.inspection import on_meta, weights_estimate
from quantbench.intervals import LEAST, Ratio, ratio_of_rounds
from quantbench.records import Measurement
from quantbench.settings import BASELINES
from quantbench.sweeps.plan import Cell
from quantbench.sweeps.seats import Seat, Stopped
from quantbench.weights import config_of

MOST = 30  # rounds
PROCESS_BYTES = {"cpu": 6 * 10**8, "cuda": 25 * 10**8}  # of host memory beside the weights: libraries, CUDA's context
CLOSE_ENOUGH = 0.05  # of a ratio: half its interval's width


class Rounds:
    """The seats of one model's settings and engines, kept from one workload to the next."""

    def __init__(self, inline: bool, timeout_s: float, trace: bool, stop: threading.Event,
                 tell: Callable[[str], None] = lambda words: None) -> None:
        self.trace, self.stop, self.tell = trace, stop, tell
        self.seats: dict[tuple, Seat] = defaultdict(partial(Seat, inline, timeout_s, stop))

    def measure(self, cells: list[Cell]) -> Iterator[Measurement]:
        """A row for each of the cells of one workload: at once for one that cannot run, after the last round for the
        others; none for those that `stop` interrupts."""
        if self.stop.is_set():
            return
        yield from (cell.row(*cell.ended) for cell in cells if cell.ended)
        alive = [cell for cell in cells if not cell.ended]
        with contextlib.suppress(Stopped):
            yield from self._together(alive) if _fit(alive) else self._in_turn(alive)

    def close(self) -> None:
        for seat in self.seats.values():
            seat.close()
        self.seats.clear()

    def _seat(self, cell: Cell) -> Seat:
        return self.seats[cell.setting.key, cell.engine]

    def _together(self, cells: list[Cell]) -> Iterator[Measurement]:
        rates: dict[Cell, dict[str, float]] = {}
        for cell in cells:
            if (row := self._prepared(cell)) is None:
                rates[cell] = {}
            else:
                yield row
        name, number, start = uuid.uuid4().hex[:8], 0, time.monotonic()
        while rates and not _enough(rates, number, time.monotonic() - start):
            number += 1
            for cell in random.sample(list(rates), len(rates)):
                answer = self._sampled(cell, f"{name}-{number}")
                if isinstance(answer, Measurement):
                    del rates[cell]
                    yield answer
                else:
                    rates[cell][f"{name}-{number}"] = answer
        for cell in rates:
            self.tell(f"{cell.title}: finishing")
            yield self._seat(cell).finish(self.trace)

    def _in_turn(self, cells: list[Cell]) -> Iterator[Measurement]:
        """Each model loaded anew in every round: slow, but the rounds are the same moments for all."""
        name, rounds = uuid.uuid4().hex[:8], cells[0].workload.repeats or LEAST
        tqdm.write(f"{cells[0].model}: {len(cells)} models do not fit in memory together; they are loaded in turn, for "
                   f"{rounds} rounds")
        made: dict[Cell, Measurement] = {}
        for number in range(1, rounds + 1):
            for cell in random.sample(cells, len(cells)):
                if cell in made and made[cell].status != "ok":
                    continue
                row = self._prepared(cell) or self._sampled(cell, f"{name}-{number}")
                row = row if isinstance(row, Measurement) else self._seat(cell).finish(self.trace and number == rounds)
                self._seat(cell).close()
                made[cell] = joined(made.get(cell), row)
        yield from made.values()

    def _prepared(self, cell: Cell) -> Measurement | None:
        self.tell(f"{cell.title}: loading")
        return self._seat(cell).prepare(cell)

    def _sampled(self, cell: Cell, round_name: str) -> float | Measurement:
        self.tell(f"{cell.title}: round {round_name.rpartition('-')[2]}")
        return self._seat(cell).sample(round_name)


def _fit(cells: list[Cell]) -> bool:
    """Whether all models can be held at once, by estimate. What cannot be estimated fits, until its load says no."""
    if len(cells) < 2:
        return True
    needed, source = Counter(), cells[0].source
    try:
        config = config_of(source)
        shapes = None if config is None else on_meta(config)
        for cell in cells:
            needed["cpu"] += PROCESS_BYTES[cell.setting.device]
            needed[cell.setting.device] += 8 * source.gguf.stat().st_size if shapes is None else \
                weights_estimate(shapes, cell.setting)
    except Exception:  # each cell's own load will say what is wrong
        return True
    return all(count <= machine.free_bytes(device) for device, count in needed.items())


def _enough(rates: dict[Cell, dict[str, float]], rounds: int, spent_s: float) -> bool:
    cells, workload = list(rates), next(iter(rates)).workload
    if workload.repeats is not None:
        return rounds >= workload.repeats
    if rounds < LEAST or rounds >= MOST or spent_s >= workload.budget_s * len(cells):
        return rounds >= LEAST
    base = next((cell for key in BASELINES for cell in cells if cell.setting.key == key), cells[0])
    return all(_is_close(ratio_of_rounds(rates[cell], rates[base])) for cell in cells if cell is not base)


def _is_close(ratio: Ratio) -> bool:
    low, high = ratio.interval
    return (high - low) / 2 <= CLOSE_ENOUGH * ratio.value


def joined(before: Measurement | None, after: Measurement) -> Measurement:
    """One row with the samples of both, if both have rounds; else the later one. Its peaks are the larger ones."""
    if before is None or "ok" != before.status or "ok" != after.status or not before.rounds:
        return after
    lists = ("latencies_s", "first_token_s", "rounds", "sampled_at", "others_busy")
    both = {name: getattr(before, name) + getattr(after, name) for name in lists}
    both["energy_j"] = before.energy_j + after.energy_j if before.energy_j and after.energy_j else None
    for name in ("vram_peak_bytes", "ram_peak_bytes"):
        peaks = [getattr(row, name) for row in (before, after)]
        both[name] = None if None in peaks else max(peaks)
    return dataclasses.replace(after, **both)
