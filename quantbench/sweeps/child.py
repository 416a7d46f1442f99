"""One cell at its desk, here or in a fresh process: whatever happens in that, its parent goes on."""

import contextlib
import multiprocessing.connection
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from unittest import mock

import torch
from tqdm.auto import tqdm

import quantbench
from quantbench.loading import AuditError, LoadedModel, load_source
from quantbench.records import Measurement
from quantbench.sweeps.plan import Cell
from quantbench.timing import Timed
from quantbench.wording import cut

# what the first load and generate would import; not bitsandbytes: it asks CUDA at import, and no fork can then
PRELOAD = [__name__, "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"]
LOOK_S = 0.2  # between two looks at `stop`, while a child measures
_how = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Stopped(Exception):
    """`stop` was set: nobody waits for an answer."""


class ChildDied(Exception):
    """The process ended before it answered."""


class Desk:
    """One cell at its desk: the model stays loaded between turns and workloads. A Measurement ends the cell."""

    lm: LoadedModel | None = None

    def ask(self, method: str, *args: object, timeout_s: float | None = None) -> tuple[object, str | None]:
        """A method's answer, or a `failed` row and the traceback: not every exception can travel."""
        try:
            return getattr(self, method)(*args), None
        except Exception as error:  # of this cell alone: the others go on
            row = self.cell.row("failed", cut(f"{type(error).__name__}: {error}", 290))
            return row, "".join(traceback.format_exception(error))

    def prepare(self, cell: Cell) -> Measurement | None:
        """Load, unless the model is here already, and warm up. What `load` refuses is a row with its sentence."""
        self.cell = cell
        try:
            if self.lm is None or self.lm.status != "ok":
                self.lm = load_source(cell.source, cell.setting)
        except (AuditError, ValueError, OSError) as error:
            return cell.row("failed", cut(str(error).removeprefix(f"{cell.setting.label}: "), 290))
        self.timed = Timed(self.lm, cell.workload, cell.engine)
        return self.finish(False) if self.timed.ended else None

    def sample(self, round_name: str) -> float | Measurement:
        """Tokens per second of one more sample."""
        self.timed.sample(round_name)
        tokens = self.timed.workload.batch_size * self.timed.workload.max_new_tokens
        return self.finish(False) if self.timed.ended else tokens / self.timed.samples["latencies_s"][-1]

    def finish(self, trace: bool) -> Measurement:
        """The row, with a trace of one more generation if it is asked for."""
        row = self.timed.measurement()
        self.timed = None  # an engine's graph and cache go before another is made
        return quantbench.trace(self.lm, row) if trace and row.status == "ok" else row

    def close(self) -> None:
        if self.lm is not None:
            self.timed = None
            self.lm.close()

    def can_use_cuda(self) -> bool:
        """Not if this process's server had a context when it forked it. No GPU is no trouble."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.is_available() and torch.cuda.init()
            return not torch.cuda._is_in_bad_fork()
        return False


class Child:
    """A `Desk` in a process forked from a server that has torch and transformers imported (the first one needs seconds
    for that), with the parent's environment and threads of now. Where there is no such server (Windows), or a package
    has asked CUDA in it (any may, at import), the process is spawned."""

    def __init__(self, stop: threading.Event, needs_cuda: bool) -> None:
        global _how
        self.stop = stop
        self._start()
        if needs_cuda and _how == "forkserver" and not self.ask("can_use_cuda", timeout_s=float("inf"))[0]:
            tqdm.write("a package asked CUDA before the measuring processes were forked: they are spawned instead, "
                       "which takes some seconds more each")
            _how = "spawn"
            self.close()
            self._start()

    def ask(self, *asked: object, timeout_s: float) -> tuple[object, str | None]:
        """What `Desk.ask` says to this. Raises ChildDied, TimeoutError, and Stopped once `stop` is set: the process is
        then still at work, and to be closed."""
        until = time.monotonic() + timeout_s
        try:
            self.pipe.send(asked)
            while not self.pipe.poll(min(LOOK_S, max(until - time.monotonic(), 0))):
                if self.stop.is_set():
                    raise Stopped
                if time.monotonic() >= until:
                    raise TimeoutError
            return self.pipe.recv()
        except TimeoutError:
            raise
        except (EOFError, OSError):
            self.process.join()
            raise ChildDied(_death(self.process.exitcode)) from None

    def close(self) -> None:
        self.process.kill()  # in the middle of its work too
        self.process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context(_how)
        if _how == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        self.pipe, theirs = context.Pipe()
        asked = theirs, dict(os.environ), torch.get_num_threads(), multiprocessing.util.get_temp_dir()
        self.process = context.Process(target=_serve, args=asked, daemon=True)
        main = sys.modules["__main__"]  # the caller's script, which is not to be run again: no job of ours lives there
        with mock.patch.multiple(main, create=True, __file__=None, __spec__=None):
            self.process.start()
        theirs.close()


def _death(exitcode: int) -> str:
    if exitcode >= 0:
        return f"the process ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"the process was killed by {name}" + ", as the system does when memory runs out" * (name == "SIGKILL")


def _serve(pipe: multiprocessing.connection.Connection, environment: dict[str, str], threads: int, folder: str) -> None:
    """The child's life, until its parent is gone. `folder` is the parent's, of its fork server's socket."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)  # the parent's, which the cell's key has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    threading.Thread(target=_die_with_parent, args=[folder], daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, and a killed child would leave it
    desk = Desk()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(desk.ask(*pipe.recv()))
    _die_with_parent(folder, 5)


def _die_with_parent(folder: str, within_s: float | None = None) -> None:
    """Leave no orphan and no folder behind a killed parent, in the middle of a job too."""
    if multiprocessing.connection.wait([multiprocessing.parent_process().sentinel], within_s):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
