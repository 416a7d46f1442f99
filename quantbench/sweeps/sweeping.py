"""Many cells, in rounds: what is compared sees the same machine at the same time, and every failure is a row."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, product

from tqdm import tqdm as std_tqdm
from tqdm.auto import tqdm

from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.settings import PROMPT, Workload, amount, expect, many, unknown
from quantbench.sweeps.plan import Cell, missing, plan
from quantbench.sweeps.rounds import Rounds, joined
from quantbench.sweeps.workers import Jobs


def sweep(models: str | Iterable[str], settings: str | Iterable[str], max_new_tokens: int | Iterable[int] = (128, 256),
          *, prompt: str = PROMPT, batch_size: int | Iterable[int] = 1, repeats: int | None = None,
          prompt_tokens: int | Iterable[int] | None = None, depth: int | Iterable[int] = 0,
          cache: str | Iterable[str] = "default", budget_s: float = 30.0, engine: str | Iterable[str] = "eager",
          gpus: int | str | Iterable[int] = 1, trace: bool = False, weights: str | None = None, run: Run | None = None,
          executor: object = None, timeout_s: float = 900.0, retry: bool = False, stop: threading.Event | None = None,
          progress: bool | std_tqdm = True) -> Iterator[Measurement]:
    """Measure every model under every setting ("all": that this machine can run), engine, number of GPUs (where more
    than one can be), and what else a `Workload` says, in rounds; yield each measurement.

    All settings and engines of a model and workload take one sample each per round, in random order, each in a process
    of its own that stays loaded (models that do not fit together are loaded in turn): their ratios are of the same
    moments. At least 6 rounds, at most 30: until every ratio to the baseline (GPU FP16, else CPU FP32) is known within
    5%, or `budget_s` seconds per cell are spent; `repeats` fixes their number. A process that stands out is checked
    against a second one, in 6 more rounds: the row holds both and says so.

    A killed child is a `crashed` row, one over `timeout_s` seconds for its cell a `timeout`, any other error `failed`;
    the others go on. With `run`, each row is added before it is yielded, cells that it holds get the rounds that they
    lack, and its baseline joins those that are new; `retry` measures again what is not ok; `trace` adds where the time
    goes. `executor="inline"` stays in this process (no timeout). `progress` may be a tqdm bar. Once `stop` is set,
    children are killed and unfinished cells give no row. A `concurrent.futures.Executor` or a Dask `distributed.Client`
    takes a model's cells as one job for one worker (Dask's have one each; where a setting needs a GPU, those that offer
    the resource GPU): rows come, and reach `run`, when a model ends, and what a lost worker had is `crashed`.
    Raises ValueError at once, before anything is loaded, for a mistake in any argument."""
    axes = map(many, ("max_new_tokens", "batch_size", "prompt_tokens", "depth", "cache"),
               (max_new_tokens, batch_size, prompt_tokens, depth, cache))
    workloads = [Workload(prompt, length, batch, repeats, budget_s, *rest) for length, batch, *rest in product(*axes)]
    cells = plan(models, settings, engine, workloads, weights, gpus)
    if executor not in (None, "inline") and not hasattr(executor, "submit"):
        raise ValueError(unknown("executor", executor, ("inline",)))
    timeout_s, run = amount("timeout_s", timeout_s), Run.given(run)
    stop = expect(stop or threading.Event(), threading.Event, "stop must be a threading.Event")
    known = {row.key: row for row in run}
    todo = missing(cells, known, retry, trace)
    if kept := len({cell.key for cell in cells} - {cell.key for cell in todo}):
        tqdm.write(f"{kept} of {len(cells)} cells are in the run already: skipped")
    jobs = Jobs(executor, cells, known, weights, timeout_s, trace, retry, stop)
    rounds = partial(_by_model, todo, executor == "inline", timeout_s, trace, stop)
    return _measured(len(todo), rounds if executor in (None, "inline") else jobs.measure, known, run, progress)


def _by_model(cells: list[Cell], *how: object) -> Iterator[Measurement]:
    for _, mine in groupby(cells, key=lambda cell: cell.model):
        yield from Rounds(list(mine), *how).measure()


def _measured(count: int, measure: Callable, known: dict[tuple, Measurement], run: Run,
              progress: bool | std_tqdm) -> Iterator[Measurement]:
    with contextlib.nullcontext(progress) if isinstance(progress, std_tqdm) else \
            tqdm(total=count, unit="cell", disable=not (progress and count)) as bar, \
            contextlib.closing(measure(bar.set_description)) as rows:
        bar.reset(count)
        for row in rows:
            row = run.add(joined(known.get(row.key), row))
            bar.update()
            yield row
