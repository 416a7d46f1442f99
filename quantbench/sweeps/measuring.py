"""What runs in the process that measures: one cell is loaded, sampled when its turn comes, and closed."""

import threading

from tqdm.auto import tqdm

import quantbench
from quantbench.loading import LoadedModel, load_source
from quantbench.records import Measurement
from quantbench.sweeps.plan import Cell
from quantbench.timing import Timed


class Desk:
    """One cell at its desk: the model stays loaded while it is not its turn, and for the next workload."""

    def __init__(self) -> None:
        self.lm: LoadedModel | None = None
        self.timed: Timed | None = None

    def prepare(self, cell: Cell) -> tuple[str, str | None] | None:
        """Load and warm up; what ended the cell already, or None."""
        tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, and a killed child would leave it
        self.timed = None
        if self.lm is None or self.lm.status != "ok":
            self.lm = load_source(cell.source, cell.setting)
        self.timed = Timed(self.lm, cell.workload, cell.engine)
        return self.timed.ended

    def sample(self, round_name: str) -> float | None:
        """Tokens per second of one more sample; None where it ended the cell."""
        self.timed.sample(round_name)
        tokens = self.timed.workload.batch_size * self.timed.workload.max_new_tokens
        return None if self.timed.ended else tokens / self.timed.samples["latencies_s"][-1]

    def finish(self, trace: bool) -> Measurement:
        """The row, with a trace of one more generation if it is asked for."""
        row = self.timed.measurement()
        self.timed = None  # an engine's graph and cache go before another is made
        return quantbench.trace(self.lm, row) if trace and row.status == "ok" else row

    def close(self) -> None:
        self.timed = None
        if self.lm is not None:
            self.lm.close()
            self.lm = None


_desk = Desk()


def at_desk(method: str, *args: object) -> object:
    """A method of this process's one desk, for a parent that can only send functions."""
    return getattr(_desk, method)(*args)
