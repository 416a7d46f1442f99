"""A fresh process behind the standard Executor interface: whatever happens in it, its parent goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

# what the first load and generate would import, and what bitsandbytes would; not bitsandbytes itself, because it
# asks CUDA at import, and a process forked after that cannot use CUDA
PRELOAD = ["quantbench.sweep", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"]


class ChildDied(RuntimeError):
    """The child ended before it answered; `exitcode` is negative for a signal."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        super().__init__(self._words())

    def _words(self) -> str:
        if self.exitcode is None or self.exitcode >= 0:
            return f"the process ended with exit code {self.exitcode}"
        name = signal.Signals(-self.exitcode).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"


class Child(Executor):
    """One process forked from a server that has torch and transformers imported, and no CUDA context.

    Jobs run in it one after the other. A job whose process dies raises `ChildDied` from its future. `shutdown`
    kills what is still running. Where there is no fork server (Windows) the process is spawned.

    The first job starts the process, in a thread: the first server of all needs seconds, and a `shutdown` meanwhile
    does not wait for it.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._ended = False
        self._turn = threading.Lock()

    def submit(self, function: Callable, /, *args: object, **named: object) -> Future:
        future: Future = Future()
        threading.Thread(target=self._run, args=(future, function, args, named), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._ended = True
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _without_main():
            process.start()
        theirs.close()
        self._process = process
        if self._ended:  # while it started
            process.kill()

    def _run(self, future: Future, function: Callable, args: tuple, named: dict) -> None:
        with self._turn:
            future.set_running_or_notify_cancel()
            try:
                if self._process is None:
                    self._start()
            except Exception as error:  # raised again where the result is asked for
                future.set_exception(error)
                return
            try:
                self._pipe.send((function, args, named))
                value, error = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                future.set_exception(ChildDied(self._process.exitcode))
                return
        future.set_exception(error) if error is not None else future.set_result(value)


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """The child's life: one job after the other, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args, named = pipe.recv()
            try:
                answer = function(*args, **named), None
            except Exception as error:  # not handled here: raised again in the parent, the traceback as its note
                error.add_note("".join(traceback.format_exception(error)))
                answer = None, error
            try:
                pipe.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                pipe.send((None, RuntimeError(f"{answer[1] or answer[0]!r} cannot leave its process: {error}")))


def _die_with_parent() -> None:
    """Leave no orphan behind a killed parent, in the middle of a job too."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start a process that does not import the caller's script again: none of our jobs lives there."""
    main = sys.modules["__main__"]
    hidden = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)
