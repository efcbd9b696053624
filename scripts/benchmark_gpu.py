"""Benchmarks attention and whole denoising steps on one GPU, correctness first, within a few minutes.

    python -m scripts.benchmark_gpu [--minutes 8] [--out FOLDER] [--only wan-69 ...] [--backends triton ...]
    python -m scripts.benchmark_gpu --device cpu --tiny       rehearses the same path on tiny shapes

Writes gpu_<name>_<date>.md, .json and .png after every measurement. A child process measures: what crashes,
hangs or runs out of memory becomes a line of the table. Missing libraries, and what does not fit into the
time, are listed; the exit code is 0 all the same. Needs torch and numpy; steps need diffusers, the plot
matplotlib.
"""

import argparse
import datetime
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.benchmarks.cases import CASES, DENSE, MEASURED, SPARSE, STEPS, Case, Task, shrink, tasks
from scripts.benchmarks.findings import Findings
from scripts.benchmarks.gpu_report import write
from scripts.benchmarks.machine import QUERY, Session, flashinfer_obstacle, run_tests, short_name, smi
from scripts.benchmarks.worker import Answer, Worker
from scripts.run.errors import OneLineParser, one_line, positive_number
from scripts.run.results import RESULTS

TEST_SECONDS, START_SECONDS, RESERVE_SECONDS = 90.0, 120.0, 8.0
BUILD_SECONDS = 480.0
SLOWER = 1.25  # a dense kernel this much behind the best in its first case is not timed again
MOST_LOST = 12  # children that may be lost before the run ends


class NoDeviceError(RuntimeError):
    """Reports in one line that there is no GPU, or that its process does not start."""


class Run:
    """Holds one benchmark: its results so far, the time left, and where they are saved."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self._start = options, time.monotonic()
        self._deadline = self._start + 60 * options.minutes - RESERVE_SECONDS
        self._worker = Worker(Session, options.device, options.tiny, options.profile)
        self._lost = 0
        self.data: dict[str, Any] = {
            "command": options.command,
            "date": datetime.date.today().isoformat(),
            "minutes": 0.0,
            "rehearsal": options.tiny,
            "finished": False,
            "machine": {},
            "smi": {"query": QUERY, "before": smi(), "after": ""},
            "tests": {"note": "left out"},
            "cases": {},
            "checks": {},
            "rows": [],
            "steps": [],
            "left_out": [],
        }

    @property
    def path(self) -> Path:
        about = self.data["machine"]
        name = short_name(about["gpu"]) if "gpu" in about else about["device"]
        start = "rehearsal" if self.options.tiny else "gpu"
        return self.options.out / f"{start}_{name}_{self.data['date']}.md"

    def go(self) -> None:
        """Measures all in order; NoDeviceError without a device, OSError if results cannot be saved."""
        try:
            answer = self._worker.ask(Task("machine"), START_SECONDS)
            if answer.result is None:
                raise NoDeviceError(answer.failure)
            self.data["machine"] = answer.result
            cases = {name: shrink(case) if self.options.tiny else case for name, case in CASES.items()}
            self.data["cases"] = {name: _about(case) for name, case in cases.items()}
            self.save()
            if not self.options.skip_tests and self.options.device == "cuda":
                self.data["tests"] = run_tests(min(TEST_SECONDS, self._left()))
                print(f"kernel tests: {self.data['tests']}", flush=True)
                self.save()
            self._measure()
            self.data["finished"] = True
        finally:
            self._worker.close()
            if self.data["cases"]:
                self.data["smi"]["after"] = smi()
                self.save(picture=True)

    def save(self, picture: bool = False) -> None:
        """Writes the results so far."""
        self.data["minutes"] = (time.monotonic() - self._start) / 60
        write(self.path, self.data, picture=picture)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _measure(self) -> None:
        chosen = self.options
        for task in tasks(chosen.only, chosen.backends, tiny=chosen.tiny, steps=not chosen.skip_steps):
            if self._lost > MOST_LOST:
                self._leave_out(task, "too many processes were lost")
            elif task.kind == "check":
                self._check(task)
            elif task.kind == "step":
                self._step(task)
            else:
                self._attention(task)

    def _ask(self, task: Task, limit: float) -> Answer | None:
        """Returns the answer; None if too little time is left to begin."""
        if self._left() < task.least:
            self._leave_out(task, f"the {self.options.minutes:g} minutes were over")
            return None
        answer = self._worker.ask(task, min(limit, self._left()))
        self._lost += answer.lost
        return answer

    def _check(self, task: Task) -> None:
        obstacle = flashinfer_obstacle() if task.variant == "flashinfer" else None
        result: dict[str, Any] = {"failure": obstacle}
        if not obstacle or (self.options.build_flashinfer and "not built" in obstacle):
            begin = time.monotonic()
            if obstacle:  # building its kernels is no part of the time that was asked for
                self._deadline += BUILD_SECONDS
            answer = self._ask(task, BUILD_SECONDS if obstacle else task.limit)
            if obstacle:
                self._deadline += time.monotonic() - begin - BUILD_SECONDS
            if answer is None:
                return
            result = answer.outcome
        self.data["checks"][task.variant] = result
        print(f"check {task.variant}: {result}", flush=True)
        self.save()

    def _attention(self, task: Task) -> None:
        obstacle = self._obstacle(task)
        if obstacle is None:
            answer = self._ask(task, task.limit)
            if answer is None:
                return
            result = answer.outcome
        elif task.is_dense:
            return  # its first case has the reason, or the time
        else:
            result = {"failure": obstacle}
        if "ms" in result:
            flops = task.case.flops(task.is_dense, task.kind == "backward")
            result["tflops"] = flops / result["ms"] / 1e9
        row = {"stage": task.kind, "case": task.case.name, "variant": task.variant, **result}
        self.data["rows"].append(row)
        outcome = f"{result['ms']:.2f} ms" if "ms" in result else result.get("failure", "wrong output")
        print(f"{task.title}: {outcome}", flush=True)
        self.save()

    def _obstacle(self, task: Task) -> str | None:
        """Returns why a variant is not timed: it failed its check, or as a dense kernel an earlier case."""
        if not task.is_dense:
            check = self.data["checks"].get(task.variant)
            if check is None:
                return "there was no time for its check"
            if "failure" in check:
                return check["failure"]
            right = check["right"] and (task.kind == "forward" or check["gradients_right"])
            return None if right else "wrong on the small case"
        rows = [row for row in self.data["rows"] if row["variant"] in DENSE and row["stage"] == task.kind]
        first = next((row for row in rows if row["variant"] == task.variant), None)
        if first is None:
            return None
        if "ms" not in first:
            return "failed before"
        best = min(row["ms"] for row in rows if row["case"] == first["case"] and "ms" in row)
        return None if first["ms"] <= SLOWER * best else "slower before"

    def _step(self, task: Task) -> None:
        task = self._equip(task)
        result = {"failure": "no variant that is right and fast enough"}
        if task.using or task.variant == "dense":
            answer = self._ask(task, task.limit)
            if answer is not None and answer.failure == "out of memory" and not task.reduced:
                answer = self._ask(replace(task, reduced=True), task.limit)
            if answer is None:
                return
            result = answer.outcome
        self.data["steps"].append({"case": task.case.name, "variant": task.variant, **result})
        outcome = f"{result['ms']:.1f} ms" if "ms" in result else result["failure"]
        print(f"{task.title}: {outcome}", flush=True)
        self.save()

    def _equip(self, task: Task) -> Task:
        """Adds the kernels to a task, and reduces the model if the whole one would take too long."""
        findings, case = Findings(self.data), task.case.name
        dense = findings.best_dense("forward", case) or ("sdpa", 0.0)
        kinds = {"radial": ("triton", "flex", "blocks"), "radial 8 bit": ("triton-int8", "triton-fp8")}
        times = {name: findings.ms("forward", case, name) for name in kinds.get(task.variant, ())}
        timed = [name for name, ms in times.items() if ms]
        using = min(timed, key=times.get, default="")
        if task.variant == "radial" and "triton" in timed:
            using = "triton"
        seconds = STEPS[case].depth * 3 * dense[1] / 1e3 + 15  # dense, radial and what is no attention
        earlier = findings.step(case, "dense")
        reduced = seconds > self._left() if earlier is None else earlier["reduced"]
        return replace(task, using=using, dense=dense[0], reduced=reduced)

    def _leave_out(self, task: Task, reason: str) -> None:
        self.data["left_out"].append(f"{task.title}: {reason}")


def _about(case: Case) -> dict[str, Any]:
    """Describes a case for the report; the mask is built once more and timed."""
    from radial_attn import radial_mask

    radial_mask.cache_clear()
    start = time.perf_counter()
    mask = case.mask
    built = time.perf_counter()
    again = case.mask is mask and time.perf_counter() - built
    config, grid = case.config, case.grid
    return {name: getattr(case, name) for name in ("title", "heads", "width")} | {
        "tokens": grid.tokens,
        "grid": [grid.frames, grid.height, grid.width, grid.text],
        "mask": f"decay {config.decay_factor:g}, neighbour {config.neighbour}, sink {config.sink}",
        "density": mask.density,
        "paper_sparsity": case.sparsity,
        "mask_ms": (built - start) * 1e3,
        "mask_again_ms": again * 1e3,
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; a wrong option ends the program with one line."""
    about = "Attention and denoising steps on one GPU, correctness first, within a few minutes."
    parser = OneLineParser(prog="scripts/benchmark_gpu.sh", description=about)
    parser.add_argument(
        "--minutes", type=positive_number, default=8.0, help="time for all of it (default: 8)"
    )
    parser.add_argument("--out", type=Path, help=f"folder ({RESULTS}, of a rehearsal outputs)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--backends", nargs="+", choices=SPARSE, metavar="BACKEND")
    parser.add_argument("--skip-steps", action="store_true", help="attention alone")
    parser.add_argument("--skip-tests", action="store_true", help="without the kernel tests")
    parser.add_argument("--profile", action="store_true", help="lists the kernels of every call")
    parser.add_argument("--build-flashinfer", action="store_true", help="builds its kernels: minutes of nvcc")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal, no measurement")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu only rehearses: it needs --tiny")
    options.out = options.out or (Path("outputs") if options.tiny else RESULTS)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, got {options.out}")
    options.backends = options.backends or (("blocks",) if options.device == "cpu" else MEASURED)
    options.command = " ".join(["bash scripts/benchmark_gpu.sh", *argv])
    return options


def _cut_off(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for a wrong option, no device or nowhere to write."""
    options = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _cut_off)
    run = Run(options)
    try:
        run.go()
    except (NoDeviceError, OSError) as error:
        line = f"{error}; --device cpu --tiny rehearses without a GPU"
        if not isinstance(error, NoDeviceError):
            line = f"--out {options.out}: {one_line(error)}"
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cut off", file=sys.stderr)
    if run.data["cases"]:
        print(run.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
