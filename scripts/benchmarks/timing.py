"""Times calls for the benchmarks."""

import statistics
import time
from collections.abc import Callable, Mapping
from math import inf

from scripts.run.system import synchronizer


def median_seconds(
    run: Callable[[], object], repeats: int, device: str = "cpu", enough: float = inf
) -> float:
    """Returns the median wall time of `run()` after an uncounted call; `enough`: seconds to stop after."""
    wait, seconds = synchronizer(device), []
    run()
    while len(seconds) < repeats and sum(seconds) < enough:
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def medians_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Returns the median wall time of each call. They take turns, so a slow moment hits all of them.

    An uncounted turn comes first.
    """
    wait = synchronizer(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
