"""A fresh process behind the standard Executor interface: whatever happens in it, its parent goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

from tqdm.auto import tqdm

# what the first load and generate would import, and what bitsandbytes would; not bitsandbytes itself, because it
# asks CUDA at import, and a process forked after that cannot use CUDA
PRELOAD = ["quantbench.sweeps.measuring", "transformers.models.gpt2.modeling_gpt2",
           "transformers.models.llama.modeling_llama"]
_how = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class ChildDied(RuntimeError):
    """The child ended before it answered; `exitcode` is negative for a signal."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        words = f"the process ended with exit code {exitcode}"
        if exitcode is not None and exitcode < 0:
            name = signal.Signals(-exitcode).name
            hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            words = f"the process was killed by {name}{hint}"
        super().__init__(words)


class ChildFailed(RuntimeError):
    """What was raised in the child, as text: not every exception can be rebuilt in another process."""


class Child(Executor):
    """One process forked from a server that has torch and transformers imported, and no CUDA context.

    Jobs run in it one after the other, in the parent's environment of now. A job whose process dies raises `ChildDied`
    from its future, one that raises `ChildFailed`. `shutdown` kills what is still running. Where there is no fork
    server (Windows), or where a package has asked CUDA in it (any may, at import), the process is spawned.

    The first job starts the process, in a thread: the first server of all needs seconds, and a `shutdown` meanwhile
    does not wait for it.
    """

    def __init__(self, needs_cuda: bool = False) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._needs_cuda, self._ended, self._turn = needs_cuda, False, threading.Lock()

    def submit(self, function: Callable, /, *args: object, **named: object) -> Future:
        future: Future = Future()
        threading.Thread(target=self._run, args=(future, function, args, named), daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._ended = True
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _start(self) -> None:
        global _how
        self._launch()
        if self._needs_cuda and _how == "forkserver" and not self._ask(cuda_works, (), {}):
            tqdm.write("a package asked CUDA before the measuring processes were forked: they are spawned instead, "
                       "which takes some seconds more each")
            _how = "spawn"
            self._kill()
            self._launch()

    def _launch(self) -> None:
        context = multiprocessing.get_context(_how)
        if _how == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
        with _without_main():
            process.start()
        theirs.close()
        self._process = process
        if self._ended:  # while it started
            process.kill()

    def _ask(self, function: Callable, args: tuple, named: dict) -> object:
        try:
            self._pipe.send((function, args, named))
            value, failure = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ChildDied(self._process.exitcode) from None
        if failure is None:
            return value
        error = ChildFailed(failure[0])
        error.add_note(failure[1])
        raise error

    def _run(self, future: Future, function: Callable, args: tuple, named: dict) -> None:
        with self._turn:
            future.set_running_or_notify_cancel()
            try:
                if self._process is None:
                    self._start()
                future.set_result(self._ask(function, args, named))
            except Exception as error:  # raised again where the result is asked for
                future.set_exception(error)


def cuda_works() -> bool:
    """Whether this process can use CUDA: not if its server had a context when it forked it. No GPU is no trouble."""
    import torch

    try:
        torch.cuda.is_available() and torch.cuda.init()
    except RuntimeError:
        return False
    return not torch.cuda._is_in_bad_fork()


def _serve(pipe: multiprocessing.connection.Connection, environment: dict[str, str]) -> None:
    """The child's life: one job after the other, until its parent is gone."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args, named = pipe.recv()
            try:
                answer = function(*args, **named), None
            except Exception as error:  # raised again in the parent
                answer = None, (f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
            try:
                pipe.send(answer)
            except (EOFError, OSError):
                raise
            except Exception as error:  # what cannot be pickled raises anything
                pipe.send((None, (f"{answer[0]!r} cannot leave its process: {error}", "")))


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
