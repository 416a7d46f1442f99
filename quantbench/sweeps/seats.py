"""Where one setting is measured, cell after cell: a process of its own, or this one."""

import threading
import time
import warnings
from concurrent.futures import wait

from quantbench.labels import cut
from quantbench.records import Measurement
from quantbench.sweeps.child import Child, ChildDied
from quantbench.sweeps.measuring import Desk, at_desk
from quantbench.sweeps.plan import Cell

LOOK_S = 0.2  # between two looks at `stop`, while a child measures


class Stopped(Exception):
    """`stop` was set."""


class Seat:
    """One desk and the cell at it. An answer that is a Measurement is the cell's end; the next cell gets a new desk if
    its process is gone."""

    def __init__(self, inline: bool, timeout_s: float, stop: threading.Event) -> None:
        self.inline, self.timeout_s, self.stop = inline, timeout_s, stop
        self.desk: Desk | None = None
        self.child: Child | None = None

    def prepare(self, cell: Cell) -> Measurement | None:
        """Load the model, unless it is here already, and warm up."""
        self.cell, self.left_s = cell, self.timeout_s
        if self.inline:
            self.desk = self.desk or Desk()
        else:
            self.child = self.child or Child(needs_cuda=cell.setting.device == "cuda")
        ended = self._ask("prepare", cell)
        return self.finish(False) if isinstance(ended, tuple) else ended

    def sample(self, round_name: str) -> float | Measurement:
        """Tokens per second of one more sample."""
        rate = self._ask("sample", round_name)
        return self.finish(False) if rate is None else rate

    def finish(self, trace: bool) -> Measurement:
        return self._ask("finish", trace)

    def close(self) -> None:
        """Let the model go, and the process."""
        if self.child is not None:
            self.child.shutdown()
        if self.desk is not None:
            self.desk.close()
        self.desk = self.child = None

    def _ask(self, method: str, *args: object) -> object:
        if self.stop.is_set():
            raise Stopped
        try:
            return getattr(self.desk, method)(*args) if self.inline else self._by_child(method, *args)
        except TimeoutError:
            return self._ended("timeout", f"not done after {self.timeout_s:g} s")
        except ChildDied as death:
            return self._ended("crashed", str(death))
        except Stopped:
            raise
        except Exception as error:  # of this cell alone: it is said in full, and the others go on
            said = f"{type(error).__name__}: {error}" if self.inline else str(error)
            notes = "\n".join(getattr(error, "__notes__", []))
            warnings.warn(f"{self.cell.title} failed: {said}\n{notes}", stacklevel=2)
            return self._ended("failed", cut(said, 290))

    def _by_child(self, method: str, *args: object) -> object:
        until = time.monotonic() + self.left_s
        future = self.child.submit(at_desk, method, *args)
        while not wait([future], min(LOOK_S, max(until - time.monotonic(), 0))).done:
            if self.stop.is_set():
                raise Stopped
            if time.monotonic() >= until:
                raise TimeoutError
        self.left_s = until - time.monotonic()
        return future.result()

    def _ended(self, status: str, reason: str) -> Measurement:
        self.close()
        return self.cell.row(status, reason)
