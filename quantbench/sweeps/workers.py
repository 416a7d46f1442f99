"""A model's cells as one job for a worker of somebody else: of an executor, or of a Dask cluster."""

import dataclasses
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Executor
from itertools import groupby

from quantbench.records import Measurement
from quantbench.sweeps.child import LOOK_S, ChildDied
from quantbench.sweeps.plan import Cell, missing, plan
from quantbench.sweeps.rounds import Rounds

_alone = threading.Lock()  # in a worker with several threads, or whose last client went away in mid-job


@dataclasses.dataclass
class Jobs:
    """The models of a sweep: each is planned and measured on one worker, which knows its own machine and folders.
    Dask's workers have one at a time; an executor counts as one worker."""

    client: object
    cells: list[Cell]
    known: dict[tuple, Measurement]
    weights: str | None
    timeout_s: float
    trace: bool
    retry: bool
    stop: threading.Event

    def measure(self, tell: object = None) -> Iterator[Measurement]:
        """A row for each cell that the run lacks, as its model ends."""
        models = (list(mine) for _, mine in groupby(self.cells, key=lambda cell: cell.model))
        workers, needed = self._workers(), any(cell.setting.device == "cuda" for cell in self.cells)
        offer = {worker: told for worker, told in workers.items() if needed and told["resources"].get("GPU")}
        lives = [self._serve(worker, told, models) for worker, told in (offer or workers).items()]
        while lives and not self.stop.is_set():
            for life in list(lives):
                if (rows := next(life, None)) is None:
                    lives.remove(life)
                yield from rows or ()
            time.sleep(LOOK_S)
        for cells in () if self.stop.is_set() else models:
            lost = "no worker is left: each is gone, or still runs a job that took too long"
            yield from (cell.row("timeout", lost) for cell in self._lacking(cells))

    def _serve(self, worker: str | None, told: dict, models: Iterator[list[Cell]]) -> Iterator[list[Measurement]]:
        """One model after the other, until none waits or the worker is gone or stuck; nothing while that works. What is
        lost is said, and not tried again unasked."""
        for cells in models:
            asked = [(one.setting.key, one.engine, one.workload, one.setting.gpus) for one in cells]
            axes = [list(dict.fromkeys(axis)) for axis in zip(*asked)]
            ask = [worker, told, time.monotonic() + self.timeout_s * len(cells)]
            try:
                cells = yield from self._ask(*ask, plan, cells[0].model, *axes[:3], self.weights, axes[3])
                if todo := self._lacking(cells):
                    yield (yield from self._ask(*ask, measure_here, todo, self.trace))
            except Exception as error:  # what the worker could not do, or it is gone, or the executor itself
                lost = isinstance(error, (ChildDied, TimeoutError))
                status = "timeout" if isinstance(error, TimeoutError) else "crashed"
                reason = str(error) if lost else f"{type(error).__name__}: {error}"
                yield [cell.row(status, reason) for cell in self._lacking(cells)]
                if lost:
                    return

    def _ask(self, worker: str | None, told: dict, until: float, function: object, *args: object) -> Generator:
        """What a function gives on this worker and no other: Dask would silently start a lost worker's job again."""
        pinned = {} if worker is None else {"workers": [worker], "pure": False, "retries": 0,
                                            "resources": {"GPU": 1} if told["resources"].get("GPU") else None}
        job = self.client.submit(function, *args, **pinned)
        try:
            while not job.done():
                if worker and self._workers().get(worker, {}).get("local_directory") != told["local_directory"]:
                    raise ChildDied(f"the worker {worker} is gone: not tried again")
                if time.monotonic() > until:
                    raise TimeoutError(f"not done after {self.timeout_s:g} s for each cell")
                yield []
            return job.result(self.timeout_s)  # at once, unless the worker goes at this very moment
        finally:
            job.cancel()

    def _workers(self) -> dict[str | None, dict]:
        """What Dask's scheduler says of each; not client.scheduler_info, which another thread may empty."""
        return {None: {"resources": {}}} if isinstance(self.client, Executor) else \
            self.client.sync(self.client.scheduler.identity, n_workers=-1)["workers"]

    def _lacking(self, cells: list[Cell]) -> list[Cell]:
        """The cells that the run lacks; none where another machine of the cluster measured all of them."""
        rows = [row for row in self.known.values() if row.model == cells[0].model]
        here, how = {"machine": cells[0].planned_on, "versions": cells[0].versions}, (self.retry, self.trace)
        anywhere = {dataclasses.replace(row, **here).key: row for row in rows}
        return missing(cells, self.known, *how) if missing(cells, anywhere, *how) else []


def measure_here(cells: list[Cell], trace: bool) -> list[Measurement]:
    """All rounds of a model's cells, in this process; nothing stays loaded."""
    with _alone:
        return list(Rounds(cells, True, float("inf"), trace, threading.Event()).measure())
