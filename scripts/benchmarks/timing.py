"""Times calls for the benchmarks."""

import statistics
import time
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch

from scripts.run.system import synchronizer

REPEATS, ENOUGH_MS = 10, 1500.0  # of a call of the GPU benchmark
BUSY_SIZE, BUSY_PRODUCTS = 16_384, 80  # 7e14 FLOPs


def timed_call(run: Callable[[], Any], wait: Callable[[], None]) -> tuple[Any, float]:
    """Returns the result of `run()` and its wall seconds, from an idle device to an idle device."""
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return result, time.perf_counter() - start


def median_seconds(
    run: Callable[[], object], repeats: int, device: str = "cpu", enough: float = inf
) -> float:
    """Returns the median wall time of `run()` after an uncounted call; `enough`: seconds to stop after."""
    wait, seconds = synchronizer(device), []
    run()
    while len(seconds) < repeats and sum(seconds) < enough:
        seconds.append(timed_call(run, wait)[1])
    return statistics.median(seconds)


def medians_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Returns the median wall time of each call. They take turns, so a slow moment hits all of them.

    An uncounted turn comes first.
    """
    wait = synchronizer(device)
    turns = [{name: timed_call(run, wait)[1] for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in runs}


class Stopwatch:
    """Measures milliseconds of named spans, by events on a GPU, by the clock on a CPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._open: dict[str, Any] = {}

    def start(self, name: str) -> None:
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        self._spans.setdefault(name, []).append((self._open.pop(name), self._mark()))

    def read(self, name: str) -> list[float]:
        """Returns the spans of a name, in their order; waits for the device."""
        if not self._cuda:
            return [(end - start) * 1e3 for start, end in self._spans.get(name, [])]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in self._spans.get(name, [])]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Timer:
    """Measures milliseconds of calls on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def once(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """Returns the result of `run()` and its wall milliseconds, from an idle device to an idle device."""
        result, seconds = timed_call(run, synchronizer(self.device))
        return result, seconds * 1e3

    def behind_work(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """Returns the result of `run()` and its milliseconds, for a call that is made only once.

        A GPU multiplies matrices for about a second first, so that what the host prepares is not timed.
        """
        if self.device == "cuda":
            square = torch.ones(BUSY_SIZE, BUSY_SIZE, device="cuda", dtype=torch.bfloat16)
            for _ in range(BUSY_PRODUCTS):
                square @ square
        watch = Stopwatch(self.device)
        watch.start("call")
        result = run()
        watch.stop("call")
        return result, watch.read("call")[0]

    def repeated(self, run: Callable[[], object]) -> list[float]:
        """Times up to `REPEATS` calls, fewer once `ENOUGH_MS` are spent; call `run` once before."""
        return self.in_turn(run)[0]

    def in_turn(self, *runs: Callable[[], object]) -> list[list[float]]:
        """Times rounds of calls, so that a GPU that heats up slows all alike; limits are as in `repeated`."""
        times: list[list[float]] = [[] for _ in runs]
        while len(times[0]) < REPEATS and sum(map(sum, times)) < ENOUGH_MS:
            for run, spans in zip(runs, times, strict=True):
                watch = Stopwatch(self.device)
                watch.start("call")
                run()
                watch.stop("call")
                spans.extend(watch.read("call"))
        return times
