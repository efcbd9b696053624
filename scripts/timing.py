"""How the benchmarks time a call."""

import statistics
import time
from collections.abc import Callable
from math import inf

from scripts.record import synchronizer


def median_seconds(
    run: Callable[[], object], repeats: int, device: str = "cpu", enough: float = inf
) -> float:
    """Median wall time of `run()` after one uncounted call; stops early once `enough` seconds are spent."""
    wait, seconds = synchronizer(device), []
    run()
    while len(seconds) < repeats and sum(seconds) < enough:
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
