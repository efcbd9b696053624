"""Answers the GPU benchmark as an H200 might, on a simulated clock.

A call takes its FLOPs over an assumed rate; the seconds before it are assumed too. All are meant to be on the
slow side. No number says anything about a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from scripts.benchmarks.cases import DENSE, STEPS, Task
from scripts.benchmarks.timing import ENOUGH_MS, REPEATS
from scripts.benchmarks.worker import MOST_COMPILERS, Answer

DENSE_RATE, OTHER_RATE = 500e12, 400e12  # FLOP/s of dense attention and of projections
EFFICIENCY = {"flash4": 0.9, "triton": 0.6, "triton-int8": 0.7, "triton-fp8": 0.7, "flex": 0.5}
BACKWARD = 0.6  # of the efficiency of a forward
SLOW_DENSE = {"cudnn": 1.0, "flash4-dense": 0.95, "flash": 0.5, "sdpa": 1.0}
START, COMPILE, LONG_COMPILE = 20.0, 25.0, 45.0  # a child; a kernel of Triton; one of torch.compile
BUSY = 1.5  # for which a GPU is kept busy before a call that is made once
MACHINE = {"gpu": "NVIDIA Simulated", "gpu_memory_bytes": 2**37, "multiprocessors": 132, "device": "cuda"}
MACHINE |= {"cuda": "13", "cudnn": 9, "versions": {"torch": "2.11.0"}}
FIXED = {  # results of these tasks, and their seconds
    "machine": (MACHINE, 1.0),
    "compile": ({"seconds": COMPILE}, COMPILE),
    "check": ({"out": 1e-3, "padded": 1e-3, "right": True}, 2.0),
    "gradients": ({"gradients": 1e-3, "gradients_right": True}, 3.0),
}
WIDTHS = {"wan-69": (5120, 13_824), "hunyuan-117": (3072, 12_288), "hunyuan-509": (3072, 12_288)}
ABSENT = ("flash-attn", "flash-attn-3", "flashinfer", "sage")


class SimulatedWorkers:
    """Stands in for `Workers`.

    Args:
        absent: variants and packages that are missing, besides `ABSENT`.
        late: titles of tasks that never end.
        before: called with each task before it is answered.
    """

    def __init__(
        self,
        absent: Sequence[str] = (),
        late: Sequence[str] = (),
        before: Callable[[Task], None] = lambda task: None,
    ) -> None:
        self.now, self.log = 1000.0, []  # title of each task, and the second at which it was answered
        self._absent, self._late, self._before = {*ABSENT, *absent}, late, before
        self._started, self._compiling, self._case = False, [], None
        self._ready = self.now

    def clock(self) -> float:
        return self.now

    def begin(self, compilations: Sequence[Task], seconds: float) -> None:
        self._compiling, ends = list(compilations), [0.0] * MOST_COMPILERS
        for task in compilations:
            ends[ends.index(min(ends))] += LONG_COMPILE if task.variant == "flex" else COMPILE
        self._ready = self.now + min(START + max(ends), seconds)

    def compiled(self) -> Iterator[tuple[Task, Answer]]:
        self.now = max(self.now, self._ready)
        yield from ((task, Answer({"seconds": 1.0})) for task in self._compiling)

    def close(self) -> None:
        """There is nothing to end."""

    def ask(self, task: Task, seconds: float) -> Answer:
        self._before(task)
        spent = 0.0 if self._started else START
        self._started = True
        if task.title in self._late:
            self.now, self._started = self.now + seconds, False
            self.log.append((task.title, self.now))
            return Answer(failure=f"given up after {seconds:.0f} s", lost=True, late=True)
        if task.variant in self._absent:
            answer = Answer(failure=f"needs {task.variant}")
        elif task.kind == "step" and "diffusers" in self._absent:
            answer = Answer(failure="needs diffusers")
        else:
            result, more = self._result(task)
            answer, spent = Answer(result), spent + more
        self.now += min(spent, seconds)
        self.log.append((task.title, self.now))
        return answer if spent <= seconds else Answer(failure="late", lost=True, late=True)

    def _result(self, task: Task) -> tuple[dict[str, Any], float]:
        """Returns the result of a task, and the seconds that it takes."""
        if task.kind in FIXED:
            return FIXED[task.kind]
        return self._step(task) if task.kind == "step" else self._attention(task)

    def _attention(self, task: Task) -> tuple[dict[str, Any], float]:
        new_case, self._case = task.case != self._case, task.case
        host = task.case.grid.tokens / 2e5 if new_case else 0.0  # inputs, mask and the exact result
        ms, lists = call_ms(task, task.variant), 0.0 if task.is_dense else task.case.grid.tokens / 5e5
        result = {"relative_l2": 1e-3, "cosine": 1.0, "first_ms": ms + 1e3 * lists}
        if task.is_dense and task.case.long:
            return result | {"times_ms": [ms], "ms": ms}, host + BUSY + ms / 1e3
        turn = [ms, call_ms(task, task.dense)] if task.dense else [ms]
        rounds = next(n for n in range(1, REPEATS + 1) if n == REPEATS or n * sum(turn) >= ENOUGH_MS)
        result |= {"times_ms": [ms] * rounds, "ms": median([ms])}
        if task.dense:
            result["dense_ms"] = turn[1]
        fresh = task.kind == "forward" and not (task.is_dense or task.case.long)  # again with a new mask
        calls = (2 + fresh) * ms + sum(turn[1:]) + rounds * sum(turn)
        return result, host + (1 + fresh) * lists + 0.5 + calls / 1e3

    def _step(self, task: Task) -> tuple[dict[str, Any], float]:
        spec, case = STEPS[task.case.name], task.case
        self._case = None
        width, inner = WIDTHS[case.name]
        linear = 2 * case.grid.tokens * (4 * width**2 + 2 * width * inner) / OTHER_RATE
        attention = call_ms(Task("forward", case, task.using or task.dense), task.using or task.dense) / 1e3
        blocks = {where: [1e3 * (linear + attention)] * spec.built for where in spec.counts}
        ms = sum(map(sum, blocks.values())) + 50
        calls = 1 if task.variant == "dense" and case.long else 2
        result = {"ms": ms, "blocks_ms": blocks, "attention_ms": 1.0, "attention_calls": 1, "using": "x"}
        return result, 5.0 + calls * ms / 1e3 + case.grid.tokens / 2e5


def call_ms(task: Task, variant: str) -> float:
    """Returns milliseconds of one call at the stated rates."""
    backward = task.kind == "backward"
    flops = task.case.flops(variant in DENSE, backward)
    rate = DENSE_RATE * SLOW_DENSE.get(variant, EFFICIENCY.get(variant, 1.0))
    return 1e3 * flops / (rate * (BACKWARD if backward and variant not in DENSE else 1))
