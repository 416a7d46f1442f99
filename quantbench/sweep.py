"""Many cells, one after the other: each model x setting in a process of its own, and every failure a row."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from itertools import groupby

from tqdm.auto import tqdm

from quantbench import machine
from quantbench.child import Child, ChildDied
from quantbench.engines import ENGINES
from quantbench.generate import generate
from quantbench.loaded import LoadedModel
from quantbench.loaders import check_context, load_source, why_not
from quantbench.record import PROMPT, Measurement, Workload
from quantbench.run import Run
from quantbench.settings import Setting, find_setting, unknown
from quantbench.weights import Source, check_name, find

LOOK_S = 0.2  # between two looks at `stop`, while a child measures


@dataclass(frozen=True)
class Cell:
    """Model x setting x workload. `source` is None where `reason` says why this machine cannot run it."""

    model: str
    setting: Setting
    workload: Workload
    engine: str
    source: Source | None
    reason: str | None = None
    trace: bool = False

    def row(self, status: str, reason: str | None) -> Measurement:
        """The measurement of a cell that gave no samples."""
        return Measurement(
            model=self.model, setting=self.setting.key, engine=self.engine, status=status, reason=reason,
            revision=self.source and self.source.revision, weights=self.source and self.source.weights,
            prompt=self.workload.prompt, batch_size=self.workload.batch_size,
            max_new_tokens=self.workload.max_new_tokens, machine=machine.facts(), versions=machine.versions())

    @property
    def title(self) -> str:
        batch = f", batch {self.workload.batch_size}" if self.workload.batch_size > 1 else ""
        return f"{self.model} · {self.setting.label} · {self.workload.max_new_tokens} tokens{batch}"


def sweep(models: str | Iterable[str], settings: str | Iterable[str], max_new_tokens: int | Iterable[int] = (128, 256),
          *, prompt: str = PROMPT, batch_size: int | Iterable[int] = 1, repeats: int | None = None,
          budget_s: float = 30.0, engine: str = "eager", trace: bool = False, weights: str | None = None,
          run: Run | None = None, executor: Executor | str | None = None, timeout_s: float = 900.0, retry: bool = False,
          stop: threading.Event | None = None, progress: bool = True) -> Iterator[Measurement]:
    """Measure every model under every setting, length and batch size; yield each measurement as its cell ends.

    A model is loaded once per setting, in a fresh child process, for all its workloads. A child that is killed gives a
    `crashed` row, one that takes over `timeout_s` seconds for a cell a `timeout` row, and the sweep goes on. With
    `run`, each row is added to it before it is yielded, and cells that it holds already are skipped; `retry=True`
    measures those again that are not ok. `executor="inline"` stays in this process (no timeout then); any
    `concurrent.futures.Executor` takes the children's place. Once `stop` is set, the sweep ends: the child is killed
    and its cell gives no row (in this process and in your executor that cell is measured to its end, and gives one).
    The other arguments are `generate`'s and `load`'s.

    Raises ValueError at once, before anything is loaded, for a mistake in any argument.
    """
    cells = _plan(models, settings, max_new_tokens, prompt, batch_size, repeats, budget_s, engine, trace, weights)
    if isinstance(executor, str) and executor != "inline":
        raise ValueError(unknown("executor", executor, ("inline",)))
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0 seconds, not {timeout_s!r}")
    todo = [cell for cell in cells if not _is_done(cell, run, retry)]
    if len(todo) < len(cells):
        tqdm.write(f"{len(cells) - len(todo)} of {len(cells)} cells are in the run already: skipped")
    return _measure_all(todo, run, executor, timeout_s, stop or threading.Event(), progress)


def _plan(models, settings, max_new_tokens, prompt, batch_size, repeats, budget_s, engine, trace, weights) -> list[Cell]:
    models, settings = _many(models), [find_setting(key) for key in _many(settings)]
    if engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ENGINES))
    workloads = [Workload(prompt, length, batch, repeats, budget_s)
                 for length in _many(max_new_tokens) for batch in _many(batch_size)]
    for model in models:
        check_name(model, weights)
    reasons = {setting: why_not(setting) for setting in settings}
    cells = []
    for model in models:
        source = None if all(reasons.values()) else find(model, weights)
        for workload in workloads if source else []:
            check_context(source, workload)
        cells += [Cell(model, setting, workload, engine, None if reasons[setting] else source, reasons[setting],
                   trace)
                  for setting in settings for workload in workloads]
    return cells


def _is_done(cell: Cell, run: Run | None, retry: bool) -> bool:
    key = cell.row("unavailable", None).key
    return any(row.key == key and (row.status == "ok" or not retry) for row in run or ())


def _measure_all(cells: list[Cell], run: Run | None, executor: Executor | str | None, timeout_s: float,
                 stop: threading.Event, progress: bool) -> Iterator[Measurement]:
    with tqdm(total=len(cells), unit="cell", disable=not (progress and cells)) as bar:
        for _, group in groupby(cells, key=lambda cell: (cell.model, cell.setting)):
            with contextlib.closing(_measure_group(list(group), executor, timeout_s, stop, bar)) as rows:
                for row in rows:
                    if run is not None:
                        run.add(row)
                    bar.update()
                    yield row


def _measure_group(cells: list[Cell], executor: Executor | str | None, timeout_s: float, stop: threading.Event,
                   bar: tqdm) -> Iterator[Measurement]:
    """The cells of one model x setting, in one process; in a new one after it died."""
    where: Executor | None = None
    try:
        for cell in cells:
            if stop.is_set():
                return
            bar.set_description(cell.title)
            if cell.reason is not None:
                yield cell.row("unavailable", cell.reason)
                continue
            where = where or (Inline() if executor == "inline" else executor or Child())
            row = _measure(cell, where, timeout_s, stop if executor is None else None)
            if row is None:
                return
            if executor is None and row.status in ("crashed", "timeout"):
                where.shutdown()
                where = None
            yield row
    finally:
        if where is not None:
            _let_go(where, ours=executor is None)


def _measure(cell: Cell, where: Executor, timeout_s: float, stop: threading.Event | None) -> Measurement | None:
    """The cell's row, whatever happens to it; None if `stop` was set before it was done."""
    future = where.submit(measure, cell)
    try:
        return _result(future, timeout_s, stop)
    except TimeoutError:
        future.cancel()
        return cell.row("timeout", f"not done after {timeout_s:g} s")
    except ChildDied as death:
        return cell.row("crashed", str(death))
    except ValueError:
        raise
    except Exception as error:  # of this cell alone: it is said in full, and the others go on
        warnings.warn(f"{cell.title} failed: {error!r}\n" + "\n".join(getattr(error, "__notes__", [])), stacklevel=2)
        return cell.row("failed", f"{type(error).__name__}: {error}")


def _result(future: Future, timeout_s: float, stop: threading.Event | None) -> Measurement | None:
    if stop is None:
        return future.result(timeout_s)
    until = time.monotonic() + timeout_s
    while not stop.is_set():
        left_s = until - time.monotonic()
        if wait([future], min(max(left_s, 0), LOOK_S)).done or left_s <= 0:
            return future.result(0)
    return None


_held: list[LoadedModel] = []  # in the process that measures: the model of the cell before, for the next length


def measure(cell: Cell) -> Measurement:
    """One cell, in whichever process the executor runs it; the model stays loaded for the next length."""
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system's, and a killed child would leave it
    if not _held or (_held[0].name, _held[0].setting, _held[0].revision) != (
            cell.model, cell.setting, cell.source.revision):
        close_held()
        _held.append(load_source(cell.source, cell.setting))
    asked = cell.workload
    return generate(_held[0], asked.prompt, asked.max_new_tokens, batch_size=asked.batch_size, repeats=asked.repeats,
                    budget_s=asked.budget_s, engine=cell.engine, trace=cell.trace, progress=False)


def close_held() -> None:
    """Let the model go that `measure` kept."""
    while _held:
        _held.pop().close()


def _let_go(where: Executor, ours: bool) -> None:
    if ours:
        where.shutdown()
    else:
        with contextlib.suppress(Exception):  # an executor that has just failed has nothing left to close
            where.submit(close_held).result(60)


class Inline(Executor):
    """Runs a job in this process, at once."""

    def submit(self, function, /, *args: object, **named: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def _many(value: object) -> list:
    return [value] if isinstance(value, (str, int)) else list(value)
