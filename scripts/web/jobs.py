"""Runs the jobs of a page one after the other, in the thread that serves them."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

BEAT = 1.0  # seconds after which the latest status is told again


class Stopped(BaseException):
    """Ends a job that nobody waits for; no handler of ordinary errors takes it for one."""


@dataclass(frozen=True)
class Status:
    """Says what a job does, how many steps of it are done, and what the user should know."""

    text: str
    done: int = 0
    total: int = 0
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Job:
    work: Callable[[Callable[[Status], None]], Any]
    told: SimpleQueue = field(default_factory=SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    future: Future = field(default_factory=Future)

    def tell(self, status: Status) -> None:
        if self.stop.is_set():
            raise Stopped
        self.told.put(status)


class Jobs:
    """Takes jobs from any thread, and runs them in the one that calls `serve`.

    That is the main thread of the command, the only one that Ctrl-C ends and that may handle signals.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue = SimpleQueue()
        self._open: list[_Job] = []  # that wait or run, in their order

    def run(self, work: Callable[[Callable[[Status], None]], Any]) -> Iterator[Any]:
        """Yields how many jobs come first, each `Status` that a job tells, and its result last.

        The latest status is told again every second. Raises the job's error. The job stops at what it tells
        next, or never begins, if its reader ends before it.
        """
        job, latest = _Job(work), None
        self._open.append(job)
        self._queue.put(job)
        try:
            while not job.future.done():
                yield latest or self._place(job)
                with suppress(Empty):
                    latest = job.told.get(timeout=BEAT) or latest
            yield job.future.result()
        finally:
            job.stop.set()
            self._end(job)

    def _place(self, job: _Job) -> Status:
        first = self._open.index(job) if job in self._open else 0
        runs = f"{first} run{'s' if first > 1 else ''} before yours"
        return Status(f"waiting in the queue: {runs}" if first else "beginning")

    def _end(self, job: _Job) -> None:
        with suppress(ValueError):  # ended by the other thread
            self._open.remove(job)

    def serve(self) -> None:
        """Runs jobs until `close` is called; a job that ends with an error is no reason to stop."""
        while (job := self._queue.get()) is not None:
            try:
                job.future.set_result(None if job.stop.is_set() else job.work(job.tell))
            except BaseException as error:
                job.future.set_exception(error)
                if not isinstance(error, Exception | Stopped):
                    raise
            finally:
                self._end(job)
                job.told.put(None)

    def close(self) -> None:
        """Ends `serve` after the jobs that are queued."""
        self._queue.put(None)
