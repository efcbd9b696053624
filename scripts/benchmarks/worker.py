"""Runs measurements in a child process, which may crash, hang or run out of memory.

After an illegal memory access a CUDA process can do nothing more, and a kernel may never return. So the child
takes one task at a time. The parent gives up a task that is late or lost, notes it, and starts a fresh child.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from scripts.run.errors import one_line
from scripts.run.processes import end_with_parent

MOST_COMPILERS = 14
LONGEST = 200  # characters of a failure that a table has room for


@dataclass(frozen=True)
class Answer:
    """Holds the result of a task, or one line that says why there is none."""

    result: dict[str, Any] | None = None
    failure: str = ""
    lost: bool = False  # the child is gone too
    late: bool = False  # it was given up

    @property
    def outcome(self) -> dict[str, Any]:
        """Returns the result, or the failure as one."""
        return self.result or {"failure": self.failure}


class Worker:
    """Asks the child; `make(*arguments)` there returns an object whose `run(task)` returns a dict."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._make, self._arguments = make, arguments
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, task: Any, seconds: float) -> Answer:
        """Runs one task, in a fresh child if there is none; gives up after `seconds`."""
        self.start()
        try:
            self._connection.send(task)
            if not self._connection.poll(seconds):
                self.close()
                return Answer(failure=f"given up after {seconds:.0f} s", lost=True, late=True)
            answer = self._connection.recv()
        except (EOFError, OSError):
            code = self._end()
            ending = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return Answer(failure=f"its process ended ({ending})", lost=True)
        if answer.lost:
            self.close()
        return answer

    def close(self) -> None:
        """Ends the child and its children."""
        if self._process is not None:
            self._end()

    def kill(self) -> None:
        """Ends the child from another thread than the one that asks, which then gets an answer."""
        if (process := self._process) is not None:
            process.kill()

    def start(self) -> None:
        """Starts a child, if there is none."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._make, self._arguments))
        self._process.start()
        theirs.close()

    def _end(self) -> int | None:
        process, self._process = self._process, None
        self._connection.close()
        process.join(1)
        with suppress(ProcessLookupError, PermissionError):  # its group is its own from serve() on
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(10)
        return process.exitcode


class Workers:
    """Holds the child that measures, and before it others that compile all kernels at once.

    Arguments are those of `Worker`. `clock` counts seconds.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._new = partial(Worker, make, *arguments)
        self._worker = self._new()
        self._threads = ThreadPoolExecutor(MOST_COMPILERS)
        self._compilers: list[Worker] = []
        self._jobs: list[Future] = []
        self._closed = False

    def ask(self, task: Any, seconds: float) -> Answer:
        """Measures one task; see `Worker`."""
        return self._worker.ask(task, seconds)

    def begin(self, compilations: Sequence[Any], seconds: float) -> None:
        """Begins to compile in other processes, which are given up after `seconds`; starts the child too."""
        self._worker.start()
        if compilations:
            count = max(1, min(len(compilations), (os.cpu_count() or 1) - 2, MOST_COMPILERS))
            self._compilers = [self._new() for _ in range(count)]
            waiting, deadline = deque(compilations), self.clock() + seconds
            self._jobs = [
                self._threads.submit(self._compile, worker, waiting, deadline) for worker in self._compilers
            ]

    def compiled(self) -> Iterator[tuple[Any, Answer]]:
        """Yields each compilation with its outcome, once its process is done."""
        for job in as_completed(self._jobs):
            yield from job.result()

    def _compile(self, worker: Worker, waiting: deque, deadline: float) -> list[tuple[Any, Answer]]:
        """Compiles in one process as long as something waits."""
        answers = []
        while waiting and not self._closed:
            with suppress(IndexError):  # another took the last one
                task = waiting.popleft()
                answers.append((task, worker.ask(task, max(0.1, deadline - self.clock()))))
        worker.close()
        return answers

    def close(self) -> None:
        """Ends all children."""
        self._closed = True
        for worker in self._compilers:
            worker.kill()
        self._threads.shutdown()
        self._worker.close()


def serve(connection: Connection, make: Callable[..., Any], arguments: tuple) -> None:
    """Answers tasks in the child until the parent is gone."""
    end_with_parent()
    with suppress(OSError):
        os.setpgid(0, 0)
    session = make(*arguments)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        answer = answer_of(session, task)
        connection.send(answer)
        if answer.lost:
            return


def answer_of(session: Any, task: Any) -> Answer:
    """Answers one task; every exception becomes a line."""
    try:
        return Answer(session.run(task))
    except Exception as error:
        failure = describe(error)
        traceback.clear_frames(error.__traceback__)  # frees the tensors that they hold
    return Answer(failure=failure, lost=not recovered())


def describe(error: BaseException) -> str:
    """Returns one line for a table."""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "out of memory"
    line = one_line(error).replace("|", "/")
    if not isinstance(error, ValueError | ImportError) or line == type(error).__name__:
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def recovered() -> bool:
    """Returns whether the device still works after an error; frees what it left behind."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
