"""Benchmarks attention and denoising steps on one GPU within a few minutes, the goals first.

    python -m scripts.benchmark_gpu [--part 1] [--out FOLDER] [--only wan-69 ...] [--backends triton ...]
    python -m scripts.benchmark_gpu --device cpu --tiny          rehearses the same path on tiny shapes
    python -m scripts.benchmark_gpu --merge part1.json part2.json     makes one report of several runs

Part 1 measures the goals: kernels at two lengths, launch configurations, steps. Part 2 measures the rest.
Each takes 4 minutes on a machine on which nothing was prepared. Without --part both run, in 8.

Writes gpu_<name>_<date>.md, .json and .png after every measurement. A child process measures: what crashes,
hangs or runs out of memory becomes a line of the table. Missing libraries, and what does not fit into the
time, are listed; the exit code is 0 all the same. Needs torch and numpy; steps need diffusers, the plot
matplotlib.
"""

import argparse
import datetime
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.benchmarks.cases import CASES, DENSE, MEASURED, SPARSE, Case, Task, compilations, tasks
from scripts.benchmarks.findings import Findings, merge
from scripts.benchmarks.gpu_report import report, write
from scripts.benchmarks.machine import QUERY, Session, flashinfer_obstacle, run_tests, short_name, smi
from scripts.benchmarks.worker import Answer, Workers
from scripts.run.errors import OneLineParser, one_line, positive_number, reason_of
from scripts.run.results import RESULTS

TEST_SECONDS, START_SECONDS, COMPILE_SECONDS, RESERVE_SECONDS = 90.0, 60.0, 60.0, 8.0
BUILD_SECONDS = 480.0
LEAST_SECONDS, LEAST_TEST_SECONDS = 3.0, 20.0  # that must be left to begin a measurement, and the tests
# a dense kernel that is behind the best by this factor is not timed again: for the same stage, for another
SLOWER, MUCH_SLOWER = 1.03, 1.25
MOST_LOST, MOST_LOST_OF_ONE = 12, 2  # children that may be lost before the run, or a variant, ends
IN_PROCESS = ("flash4",)  # kernels without a cache on disk: the child that measures compiles them
USING = {"radial": ("flash4", "triton", "flex", "blocks"), "radial 8 bit": ("triton-int8", "triton-fp8")}


class NoDeviceError(RuntimeError):
    """Reports in one line that there is no GPU, or that its process does not start."""


class Run:
    """Holds one benchmark: its results so far, the time left, and where they are saved."""

    def __init__(self, options: argparse.Namespace, workers: Any = None) -> None:
        self.options = options
        self._workers = workers or Workers(Session, options.device, options.tiny, options.profile)
        self._clock = self._workers.clock
        self._start = self._clock()
        self._deadline = self._start + 60 * options.minutes - RESERVE_SECONDS
        self._lost: Counter[str] = Counter()
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
            "compiled": {},
            "checks": {},
            "rows": [],
            "steps": [],
            "left_out": [],
        }

    @property
    def path(self) -> Path:
        part = self.options.part
        return self.options.out / file_name(self.data, "" if part is None else f"_part{part}")

    def go(self) -> None:
        """Measures all in order; NoDeviceError without a device, OSError if results cannot be saved."""
        parts, chosen = (1, 2) if self.options.part is None else (self.options.part,), self.options
        listed = [x for part in parts for x in tasks(part, chosen.only, chosen.backends, tiny=chosen.tiny)]
        listed = [task for task in listed if task.kind != "step" or not chosen.skip_steps]
        try:
            self._prepare(listed)
            for task in listed:
                if self._lost.total() > MOST_LOST:
                    self._leave_out(task, "too many processes were lost")
                else:
                    self._measure(task)
            self._workers.close()
            if 2 in parts and not chosen.skip_tests and chosen.device == "cuda":
                seconds = min(TEST_SECONDS, self._left())
                late = {"note": f"the {chosen.minutes:g} minutes were over"}
                self.data["tests"] = run_tests(seconds) if seconds > LEAST_TEST_SECONDS else late
                self._done(f"kernel tests: {self.data['tests']}")
            self.data["finished"] = True
        finally:
            self._workers.close()
            if self.data["machine"]:
                self.data["smi"]["after"] = smi()
                self.save(picture=True)

    def save(self, picture: bool = False) -> None:
        """Writes the results so far."""
        self.data["minutes"] = (self._clock() - self._start) / 60
        write(self.path, self.data, picture=picture)

    def _left(self) -> float:
        return self._deadline - self._clock()

    def _done(self, line: str) -> None:
        """Prints a line about the latest result, and saves all results."""
        print(f"{self._clock() - self._start:4.0f} s  {line}", flush=True)
        self.save()

    def _prepare(self, listed: Sequence[Task]) -> None:
        """Describes machine and masks while other processes compile the kernels."""
        made = compilations(listed) if self.options.device == "cuda" else []
        self._workers.begin([x for x in made if x.variant not in IN_PROCESS], COMPILE_SECONDS)
        answer = self._workers.ask(Task("machine"), START_SECONDS)
        if answer.result is None:
            raise NoDeviceError(answer.failure)
        self.data["machine"] = answer.result
        for case in dict.fromkeys(task.case for task in listed if task.case.name in CASES):
            self.data["cases"][case.name] = _about(case)
        for task in (x for x in made if x.variant in IN_PROCESS):
            self._compiled(task, self._workers.ask(task, COMPILE_SECONDS))
        for task, answer in self._workers.compiled():
            self._compiled(task, answer)
        self._done(f"{len(self.data['compiled'])} kernels")

    def _compiled(self, task: Task, answer: Answer) -> None:
        self.data["compiled"][task.detail[0].title] = answer.outcome

    def _measure(self, task: Task) -> None:
        if task.kind in {"check", "gradients"}:
            self._check(task)
        elif task.kind == "step":
            self._step(task)
        else:
            self._attention(task)

    def _ask(self, task: Task, limit: float) -> Answer | None:
        """Returns the answer; None if too little time is left to begin."""
        if self._left() < LEAST_SECONDS:
            self._leave_out(task, f"the {self.options.minutes:g} minutes were over")
            return None
        answer = self._workers.ask(task, min(limit, self._left()))
        self._lost[task.variant] += answer.lost
        return answer

    def _check(self, task: Task) -> None:
        """Runs a check. If it is late, but nothing was wrong, its variant is still timed."""
        checks = self.data["checks"].setdefault(task.variant, {})
        if {"failure", "right" if task.kind == "check" else "gradients"} & checks.keys():
            return  # the other part ran it
        obstacle = flashinfer_obstacle() if task.variant == "flashinfer" else None
        result: dict[str, Any] = {"failure": obstacle}
        if not obstacle or (self.options.build_flashinfer and "not built" in obstacle):
            begin = self._clock()
            if obstacle:  # building its kernels is no part of the time that was asked for
                self._deadline += BUILD_SECONDS
            answer = self._ask(task, BUILD_SECONDS if obstacle else task.limit)
            if obstacle:
                self._deadline += self._clock() - begin - BUILD_SECONDS
            if answer is None:
                return
            result = answer.result or {"late" if answer.late else "failure": answer.failure}
            if task.kind == "gradients" and answer.result is None:
                result = {"gradients": answer.failure}
        checks |= result
        self._done(f"{task.title}: {result}")

    def _attention(self, task: Task) -> None:
        findings = Findings(self.data)
        if findings.row(task.kind, task.case.name, task.variant):
            return  # the other part measured it
        obstacle = self._obstacle(task)
        if obstacle is None:
            dense = findings.best_dense(task.kind.replace("launch", "forward"), task.case.name)
            if dense and not task.is_dense and not task.case.long:
                task = replace(task, dense=dense[0])
            answer = self._ask(task, task.limit)
            if answer is None:
                return
            result = answer.outcome | ({"dense": task.dense} if task.dense else {})
        elif task.is_dense:
            return  # its first case has the reason, or the time
        else:
            result = {"failure": obstacle}
        if "ms" in result:
            flops = task.case.flops(task.is_dense, task.kind == "backward")
            result["tflops"] = flops / result["ms"] / 1e9
        variant = result.pop("launch", task.title) if task.kind == "launch" else task.variant
        self.data["rows"].append({"stage": task.kind, "case": task.case.name, "variant": variant, **result})
        outcome = f"{result['ms']:.2f} ms" if "ms" in result else result.get("failure", "wrong output")
        self._done(f"{task.title}: {outcome}")

    def _obstacle(self, task: Task) -> str | None:
        """Returns why a variant is not timed: it failed its check, or as a dense kernel an earlier case."""
        if task.is_dense:
            return self._dense_obstacle(task)
        check = self.data["checks"].get(task.variant, {})
        wrong = [name for name in ("right", "gradients_right") if check.get(name) is False]
        if "right" in wrong or (wrong and task.kind == "backward"):
            return "wrong on the small case"
        if self._lost[task.variant] >= MOST_LOST_OF_ONE:
            return "its process was lost twice"
        return check.get("failure")

    def _dense_obstacle(self, task: Task) -> str | None:
        rows = [row for row in self.data["rows"] if row["variant"] in DENSE]
        timed = [
            row for row in rows if "ms" in row and (row["stage"], row["case"]) == (task.kind, task.case.name)
        ]
        if task.variant == "sdpa" and timed:
            return "another was timed"
        earlier = (row for row in rows if row["variant"] == task.variant)
        first = min(earlier, key=lambda row: row["stage"] != task.kind, default=None)
        if first is None:
            return None
        if "ms" not in first:
            return "failed before"
        alike = [row for row in rows if (row["stage"], row["case"]) == (first["stage"], first["case"])]
        best = min(row["ms"] for row in alike if "ms" in row)
        margin = SLOWER if first["stage"] == task.kind else MUCH_SLOWER
        return "slower before" if first["ms"] > best * (1 if task.case.long else margin) else None

    def _step(self, task: Task) -> None:
        findings, case = Findings(self.data), task.case.name
        dense = findings.best_dense("forward", case) or ("sdpa", 0.0)
        times = {name: findings.ms("forward", case, name) for name in USING.get(task.variant, ())}
        using = min((name for name in times if times[name]), key=times.get, default="")
        result = {"failure": "no variant that is right and fast enough"}
        if using or task.variant == "dense":
            answer = self._ask(replace(task, using=using, dense=dense[0]), task.limit)
            if answer is None:
                return
            result = answer.outcome
        self.data["steps"].append({"case": case, "variant": task.variant, **result})
        outcome = f"{result['ms']:.1f} ms" if "ms" in result else result["failure"]
        self._done(f"{task.title}: {outcome}")

    def _leave_out(self, task: Task, reason: str) -> None:
        self.data["left_out"].append(f"{task.title}: {reason}")


def file_name(data: dict[str, Any], end: str) -> str:
    """Returns the name of a report; `end` tells those of one GPU and day apart."""
    about = data["machine"]
    name = short_name(about["gpu"]) if "gpu" in about else about["device"]
    return f"{'rehearsal' if data['rehearsal'] else 'gpu'}_{name}_{data['date']}{end}.md"


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
    about = "Attention and denoising steps on one GPU within a few minutes, the goals first."
    parser = OneLineParser(prog="scripts/benchmark_gpu.sh", description=about)
    parser.add_argument("--part", type=int, choices=(1, 2), help="1: the goals, 2: the rest (default: both)")
    parser.add_argument(
        "--minutes", type=positive_number, help="time for the whole run (default: 8, or 4 for one part)"
    )
    parser.add_argument("--out", type=Path, help=f"folder ({RESULTS}, of a rehearsal outputs)")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="joins these results into one report; measures nothing",
    )
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
    options.minutes = options.minutes or (8.0 if options.part is None else 4.0)
    options.backends = options.backends or (("blocks",) if options.device == "cpu" else MEASURED)
    options.command = " ".join(["bash scripts/benchmark_gpu.sh", *argv])
    return options


def join(files: Sequence[Path], out: Path) -> Path:
    """Writes one report of several results, beside that of a whole run.

    Raises ValueError for files that are damaged or not of one GPU, OSError for those that cannot be read.
    """
    parts = [_results(file) for file in files]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise ValueError(f"{files[i]} has the same results as {files[parts.index(part)]}; name each once")
    data = merge(parts)
    path = out / file_name(data, "_merged")
    write(path, data, picture=True)
    return path


def _results(file: Path) -> dict[str, Any]:
    """Reads the results of a part; ValueError if a report cannot be made of them."""
    content = file.read_bytes()
    try:
        data = json.loads(content)
        merge([data, data])
        report(data, file)
    except Exception as error:  # whatever is missing, or of another type
        raise ValueError(f"{file} is damaged, or has no results of this benchmark") from error
    return data


def _cut_off(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for a wrong option, no device or nowhere to write."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.merge:
        try:
            print(join(options.merge, options.out))
        except OSError as error:
            print(f"error: --merge: {error.filename}: {reason_of(error)}", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"error: --merge: {one_line(error)}; name the .json files of one GPU", file=sys.stderr)
            return 2
        return 0
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
    if run.data["machine"]:
        print(run.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
