"""The rounds of one comparison: every cell of a model and workload takes one sample each, in random order."""

import contextlib
import dataclasses
import random
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from statistics import median

from tqdm.auto import tqdm

from quantbench import machine
from quantbench.inspection import load_estimate, on_meta
from quantbench.intervals import LEAST, median_interval, ratio_of_rounds
from quantbench.records import Measurement
from quantbench.settings import BASELINES, MOST_SAMPLES
from quantbench.sweeps.child import Child, ChildDied, Desk, Stopped
from quantbench.sweeps.plan import Cell
from quantbench.weights import config_of

MOST = 30  # rounds
PROCESS_BYTES = {"cpu": 6 * 10**8, "cuda": 25 * 10**8}  # of host memory beside the weights: libraries, CUDA's context
CLOSE_ENOUGH = 0.05  # of a ratio: half its interval's width
WIDE, FAR = 0.2, 5  # half-width of a process's own interval, of its median; times slower than the fastest of its kind
Rates = dict[Cell, dict[str, float]]  # round -> tokens/sec


@dataclasses.dataclass
class Rounds:
    """The cells of one model; what is loaded stays from one workload to the next."""

    cells: list[Cell]
    inline: bool
    timeout_s: float
    trace: bool
    stop: threading.Event
    tell: Callable[[str], None] = lambda words: None
    desks: dict[tuple, Desk | Child] = dataclasses.field(default_factory=dict)  # by seat
    spent_s: Counter[Cell] = dataclasses.field(default_factory=Counter)

    def measure(self) -> Iterator[Measurement]:
        """A row for each cell: at once for one that cannot run, after its workload's last round for the others; none
        for those that `stop` interrupts. Nothing stays loaded."""
        able = [cell for cell in self.cells if not cell.unavailable]
        together = _fit(able)
        try:
            yield from (cell.row("unavailable", cell.unavailable) for cell in self.cells if cell.unavailable)
            self._start([*{cell.seat: cell for cell in able}.values()] if together else [])
            for _, group in groupby(able, key=lambda cell: cell.workload):
                yield from self._with_room(list(group)) if together else self._in_turn(list(group), {})
        except Stopped:
            return
        finally:
            self._close(*self.cells)

    def _close(self, *cells: Cell) -> None:
        for seat in {cell.seat for cell in cells} & self.desks.keys():
            self.desks.pop(seat).close()

    def _start(self, cells: list[Cell]) -> None:
        """The process of each: those that are spawned import side by side, and are through with it before a load."""
        for cell in cells:
            with contextlib.suppress(ChildDied, EOFError, OSError):  # asking it will say so
                self._seat(cell)
        for cell in cells:
            self._ask(cell, "starting", "close")
        self.spent_s.clear()  # that was no cell's time

    def _seat(self, cell: Cell) -> None:
        if cell.seat not in self.desks:
            self.desks[cell.seat] = Desk() if self.inline else Child(self.stop, cell.setting.device == "cuda")

    def _ask(self, cell: Cell, told: str, method: str, *args: object) -> object:
        """What the cell's desk answers: a Measurement is the cell's end."""
        if self.stop.is_set():
            raise Stopped
        self.tell(f"{cell.title}: {told}")
        start, raised = time.monotonic(), ""
        try:
            self._seat(cell)
            answer, raised = self.desks[cell.seat].ask(method, *args, timeout_s=self.timeout_s - self.spent_s[cell])
        except TimeoutError:
            answer = cell.row("timeout", f"not done after {self.timeout_s:g} s")
        except (ChildDied, EOFError, OSError) as death:  # the last two: it did not start
            answer = cell.row("crashed", f"{told}: {death}")
        self.spent_s[cell] += time.monotonic() - start
        if raised:
            warnings.warn(f"{cell.title} failed: {answer.reason}\n{raised}")
        if raised is not None:
            self._close(cell)
        return answer

    def _together(self, cells: list[Cell], first: dict[Cell, Measurement]) -> Iterator[Measurement]:
        """All loaded, in rounds; `first` are rows of processes that stood out, or were beside them."""
        rates, name, number = {cell: {} for cell in cells}, uuid.uuid4().hex[:8], 0
        for cell in cells:
            if (row := self._ask(cell, "loading", "prepare", cell)) is not None:
                del rates[cell]
                yield joined(first.get(cell), row)
        start = time.monotonic()
        while rates and not (number == LEAST if first else _enough(rates, number, time.monotonic() - start)):
            number += 1
            for cell in random.sample(list(rates), len(rates)):
                answer = self._ask(cell, f"round {number}", "sample", f"{name}-{number}")
                if isinstance(answer, Measurement):
                    del rates[cell]
                    yield joined(first.get(cell), answer)
                else:
                    rates[cell][f"{name}-{number}"] = answer
        doubted, again = [] if first or self.inline else _doubted(rates), {}
        for cell in rates:
            row = joined(first.get(cell), self._ask(cell, "finishing", "finish", self.trace))
            if row.status != "ok" or not doubted or cell not in [*doubted, _base(rates)]:
                yield row
                continue
            again[cell] = row
            if cell in doubted:
                self._close(cell)
                said = f"a process of {row.tokens_per_s:.1f} tokens/s stood out: a second one's samples are here too"
                again[cell] = dataclasses.replace(row, reason=said)
        if again:
            yield from self._together(list(again), again)

    def _with_room(self, cells: list[Cell]) -> Iterator[Measurement]:
        """All together; then what ran out of memory beside others, in turn with the baseline: if that did, with all."""
        asked, held, crowded = {cell.seat: cell for cell in cells}, {}, []
        for row in self._together(cells, {}):
            cell = asked.pop((row.setting, row.gpus, row.engine))
            if row.status == "out_of_memory" and len(self.desks) > 1:
                crowded.append(cell)
            elif crowded and row.status == "ok" and _base([*held, cell, *crowded, *asked.values()]) in (cell, *crowded):
                held[cell] = row
            else:
                yield row
        if crowded:
            self._close(*cells)
            try:
                yield from self._in_turn([*held, *crowded], held)
            except (Stopped, KeyboardInterrupt):  # these are measured
                yield from held.values()
                raise

    def _in_turn(self, cells: list[Cell], first: dict[Cell, Measurement]) -> Iterator[Measurement]:
        """Each model loaded anew in every round: slow, but the rounds are the same moments for all."""
        name, rounds = uuid.uuid4().hex[:8], cells[0].workload.repeats or LEAST
        tqdm.write(f"{cells[0].model}: {len(cells)} models do not fit in memory together; they are loaded in turn, for "
                   f"{rounds} rounds")
        made, alive = {cell: first.get(cell) for cell in cells}, list(cells)
        for number in range(1, rounds + 1):
            for cell in random.sample(alive, len(alive)) * bool({*alive} - {*first}):  # first have theirs
                row = self._ask(cell, "loading", "prepare", cell) or \
                    self._ask(cell, f"round {number}", "sample", f"{name}-{number}")
                if not isinstance(row, Measurement):
                    row = self._ask(cell, "finishing", "finish", self.trace and number == rounds)
                self._close(cell)
                made[cell] = joined(made[cell], row)
                if row.status != "ok":
                    alive.remove(cell)
        yield from made.values()


def _fit(cells: list[Cell]) -> bool:
    """Whether all models can be held at once, by estimate. What cannot be estimated fits, until its load says no."""
    needed, seats = Counter(), {cell.seat: cell for cell in cells}
    if len(seats) < 2:
        return True
    try:
        shapes = (config := config_of(cells[0].source)) and on_meta(config)
        for setting in (cell.setting for cell in seats.values()):
            needed["cpu"] += PROCESS_BYTES[setting.device]
            size = load_estimate(shapes, setting) if shapes is not None else 8 * cells[0].source.gguf.stat().st_size
            needed["cpu" if setting.offload else setting.device] += size // setting.gpus  # of the first, the fullest
    except Exception:  # each cell's own load will say what is wrong
        return True
    return all(count <= machine.free_bytes(device) for device, count in needed.items())


def _base(rates: Iterable[Cell]) -> Cell:
    return next((cell for key in BASELINES for cell in rates if cell.setting.key == key), next(iter(rates)))


def _enough(rates: Rates, rounds: int, spent_s: float) -> bool:
    base = _base(rates)
    if base.workload.repeats is not None:
        return rounds >= base.workload.repeats
    if rounds < LEAST or rounds >= MOST or spent_s >= base.workload.budget_s * len(rates):
        return rounds >= LEAST
    ratios = [ratio_of_rounds(rates[cell], rates[base]) for cell in rates if cell is not base]
    return all((ratio.interval[1] - ratio.interval[0]) / 2 <= CLOSE_ENOUGH * ratio.value for ratio in ratios)


def _doubted(rates: Rates) -> list[Cell]:
    """The cells whose process may be an outlying one, which only a second process can tell: its samples spread widely,
    unless most of its device and engine do, as on a noisy machine; or it is many times slower than their fastest."""
    speed, kinds, found = {cell: median(mine.values()) for cell, mine in rates.items()}, {}, []
    for cell in rates:
        kinds.setdefault((cell.setting.device, cell.engine), []).append(cell)
    for kin in kinds.values():
        ends = {cell: median_interval(list(rates[cell].values())) for cell in kin}
        wide = [cell for cell in kin if ends[cell] and (ends[cell][1] - ends[cell][0]) / 2 > WIDE * speed[cell]]
        far = [cell for cell in kin if ends[cell] and speed[cell] * FAR < max(map(speed.get, kin))]
        found += dict.fromkeys(wide * (2 * len(wide) <= max(len(kin), 2)) + far)
    return found


def joined(before: Measurement | None, after: Measurement) -> Measurement:
    """One row with the samples of both, the last that a row takes, where both have rounds, else the later one. But good
    samples never give way to a failure, which becomes the row's reason."""
    if before is None or before.status != "ok" or (after.status == "ok" and not before.rounds):
        return after
    said = after.reason if after.status == "ok" else f"later {after.status}: {after.reason}"
    reason = "; ".join(dict.fromkeys(filter(None, [before.reason, said]))) or None
    if after.status != "ok":
        return dataclasses.replace(before, reason=reason)
    both = {name: (getattr(before, name) + getattr(after, name))[-MOST_SAMPLES:]
            for name in ("latencies_s", "first_token_s", "rounds", "sampled_at")}
    both |= {name: max(filter(None, [getattr(before, name), getattr(after, name)]), default=None)
             for name in ("vram_peak_bytes", "ram_peak_bytes")}
    energy_j = (before.energy_j + after.energy_j)[-MOST_SAMPLES:] if before.energy_j and after.energy_j else None
    return dataclasses.replace(after, reason=reason, trace=after.trace or before.trace, energy_j=energy_j, **both)
