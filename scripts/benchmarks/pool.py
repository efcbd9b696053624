"""Shares work among processes that Ctrl-C ends without a traceback."""

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children
from typing import Any

from scripts.run.processes import end_with_parent


def pooled(
    function: Callable[..., Any],
    calls: Iterable[tuple],
    jobs: int | None = None,
    start: Callable[[], object] = int,
) -> Iterator[Any]:
    """Yields the results of `function(*call)` for each of `calls`, in order, from `jobs` processes.

    Makes a process for each core if `jobs` is None. Each process calls `start` first. At an error all end at
    once. No call is ever cancelled: Python 3.11 prints a traceback if a process dies while one is.
    """
    with ProcessPoolExecutor(jobs, initializer=_start, initargs=(start,)) as pool:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until _start has set what it does
            try:
                results = [pool.submit(function, *call) for call in calls]
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for result in results:
                yield result.result()
        except BaseException:
            for process in active_children():
                process.kill()
            raise


def _start(start: Callable[[], object]) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    start()
