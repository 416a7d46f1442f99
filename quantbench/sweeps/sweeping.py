"""Many cells, in rounds: what is compared sees the same machine at the same time, and every failure is a row."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import nullcontext
from itertools import groupby

from tqdm import tqdm as std_tqdm
from tqdm.auto import tqdm

from quantbench.intervals import LEAST
from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.settings import PROMPT, unknown
from quantbench.sweeps.plan import Cell, plan
from quantbench.sweeps.rounds import Rounds, joined


def sweep(models: str | Iterable[str], settings: str | Iterable[str], max_new_tokens: int | Iterable[int] = (128, 256),
          *, prompt: str = PROMPT, batch_size: int | Iterable[int] = 1, repeats: int | None = None,
          budget_s: float = 30.0, engine: str | Iterable[str] = "eager", trace: bool = False,
          weights: str | None = None, run: Run | None = None, executor: Executor | str | None = None,
          timeout_s: float = 900.0, retry: bool = False, stop: threading.Event | None = None,
          progress: bool | std_tqdm = True) -> Iterator[Measurement]:
    """Measure every model under every setting, engine, length and batch size, in rounds; yield each measurement.

    All settings and engines of a model and workload take one sample each per round, in random order, each in a fresh
    process that stays loaded while it is not its turn: so their ratios (`ratios`) are of the same moments. At least 6
    rounds and at most 30: until every ratio to the baseline (GPU FP16, else CPU FP32) is known within 5%, or `budget_s`
    seconds per cell are spent; `repeats` fixes their number. Models that do not fit in memory together are loaded in
    turn, for 6 rounds, and it is said.

    A child that is killed gives a `crashed` row, one that takes over `timeout_s` seconds for its cell a `timeout` row,
    any other error a `failed` one, and the others go on. With `run`, each row is added to it before it is yielded;
    cells that it holds already with as many rounds are skipped, those with fewer get the missing ones; `retry=True`
    measures those again that are not ok; `trace=True` adds where the time goes (`trace`). `executor="inline"` stays in
    this process (no timeout then); any `concurrent.futures.Executor` takes all cells of a model as one job. `progress`
    may be a tqdm bar of yours. Once `stop` is set, the sweep ends: the children are killed and unfinished cells give no
    row (your executor's job is measured to its end, and does).

    Raises ValueError at once, before anything is loaded, for a mistake in any argument.
    """
    cells = plan(models, settings, engine, max_new_tokens, batch_size, prompt=prompt, repeats=repeats,
                 budget_s=budget_s, weights=weights)
    if isinstance(executor, str) and executor != "inline":
        raise ValueError(unknown("executor", executor, ("inline",)))
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0 seconds, not {timeout_s!r}")
    known = {row.key: row for row in run or ()}
    todo = [cell for cell in cells if not _is_done(known.get(cell.key), cell, retry, trace)]
    if len(todo) < len(cells):
        tqdm.write(f"{len(cells) - len(todo)} of {len(cells)} cells are in the run already: skipped")
    return _measure_all(_with_the_rest(todo, known), known, run, executor, timeout_s, trace, stop or threading.Event(),
                        progress)


def _is_done(row: Measurement | None, cell: Cell, retry: bool, trace: bool) -> bool:
    if row is None or row.status != "ok":
        return row is not None and not retry
    return len(row.rounds) >= (cell.workload.repeats or LEAST) and (row.trace is not None or not trace)


def _with_the_rest(cells: list[Cell], known: dict[tuple, Measurement]) -> list[Cell]:
    """The cells with the rounds that are missing where their number is fixed: as many for all that are compared."""
    missing: dict[tuple, int] = {}
    for cell in cells:
        row = known.get(cell.key)
        lacking = (cell.workload.repeats or 0) - len(row.rounds if row is not None and row.status == "ok" else ())
        missing[cell.model, cell.workload] = max(lacking, missing.get((cell.model, cell.workload), 1))
    rest = {(model, asked): dataclasses.replace(asked, repeats=asked.repeats and rounds)
            for (model, asked), rounds in missing.items()}
    return [dataclasses.replace(cell, workload=rest[cell.model, cell.workload]) for cell in cells]


def _measure_all(cells: list[Cell], known: dict[tuple, Measurement], run: Run | None, executor: Executor | str | None,
                 timeout_s: float, trace: bool, stop: threading.Event,
                 progress: bool | std_tqdm) -> Iterator[Measurement]:
    with nullcontext(progress) if isinstance(progress, std_tqdm) else \
            tqdm(total=len(cells), unit="cell", disable=not (progress and cells)) as bar:
        bar.reset(len(cells))
        for _, mine in groupby(cells, key=lambda cell: cell.model):
            rounds = Rounds(executor == "inline", timeout_s, trace, stop, bar.set_description)
            try:
                for row in _by_executor(executor, list(mine), timeout_s, trace) if isinstance(executor, Executor) \
                        else _of_model(rounds, list(mine)):
                    before = known.get(row.key)
                    if run is not None and (before is None or before.status != "ok" or row.status == "ok"):
                        run.add(row := joined(before, row))  # what failed this time takes no good row's place
                    bar.update()
                    yield row
            finally:
                rounds.close()
            if stop.is_set():
                return


def _of_model(rounds: Rounds, cells: list[Cell]) -> Iterator[Measurement]:
    for _, group in groupby(cells, key=lambda cell: cell.workload):
        yield from rounds.measure(list(group))


def _by_executor(executor: Executor, cells: list[Cell], timeout_s: float, trace: bool) -> Iterator[Measurement]:
    """A model's cells as one job: their rounds stay on one worker."""
    try:
        yield from executor.submit(measure_here, cells, trace).result(timeout_s * len(cells))
    except TimeoutError:
        yield from (cell.row("timeout", f"not done after {timeout_s:g} s for each cell") for cell in cells)
    except Exception as error:  # the worker, or the executor itself, is gone
        yield from (cell.row("crashed", f"{type(error).__name__}: {error}") for cell in cells)


def measure_here(cells: list[Cell], trace: bool) -> list[Measurement]:
    """All rounds of a model's cells, in this process; nothing stays loaded."""
    rounds = Rounds(True, float("inf"), trace, threading.Event())
    try:
        return list(_of_model(rounds, cells))
    finally:
        rounds.close()
