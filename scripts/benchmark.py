"""Times dense SDPA, cpp, blocks and flex side by side on radial masks, and measures their memory.

    python -m scripts.benchmark [--quick] [--device cpu] [--out results]
    python -m scripts.benchmark --mask | --quantized | --length

Writes attention_<device>_<date>.md, .png and .json. Every time is the median of up to `REPEATS` calls after
one that is not counted; memory is the growth of a fresh process. The second form writes another table.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from radial_attn import radial_attention
from radial_attn.dispatch import obstacle
from radial_attn.kernels.contract import Call
from radial_attn.masks.draw import save_figure
from scripts.benchmarks.attention import dense_attention
from scripts.benchmarks.cpu_report import Case, Row
from scripts.benchmarks.timing import median_seconds
from scripts.run.errors import OneLineParser, exit_code
from scripts.run.files import write_text
from scripts.run.results import RESULTS

REPEATS = 5
CALL_SECONDS = 5  # a measurement stops repeating after this long
FLEX_SECONDS = 60  # flex is left out if the shape before says that it would take longer
DTYPES = ("float32", "bfloat16")
BACKENDS = ("dense", "cpp", "blocks", "flex")
TRAINABLE = ("dense", "cpp", "blocks")  # everywhere
OTHERS = {  # modules of scripts/benchmarks
    "mask": "seconds to build the mask, and kept blocks as the video grows",
    "quantized": "error of attention on 8-bit operands",
    "length": "training and inference steps at growing length",
}


def call(backend: str, case: Case) -> Callable[[], object]:
    """Returns the call to time, forward or forward and backward."""
    inputs, mask = case.inputs(), case.mask
    radial = partial(radial_attention, mask=mask, backend=backend)
    attend = dense_attention("sdpa") if backend == "dense" else radial
    if not case.backward:
        return partial(attend, *inputs)
    grad = torch.ones_like(inputs[0])
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def show(case: Case, text: str) -> None:
    print(f"{case.grid.tokens:6d} tokens {case.dtype:9} {text}", flush=True)


def measure(backend: str, case: Case) -> Row:
    seconds = median_seconds(call(backend, case), REPEATS, case.device, CALL_SECONDS)
    kind = "forward+backward" if case.backward else "forward"
    show(case, f"{kind:16} {backend:7} {seconds * 1e3:9.1f} ms")
    return Row(backend, case, 1.0 if backend == "dense" else case.mask.density, seconds)


def measured_rows(cases: Iterable[Case]) -> list[Row]:
    """Measures all cases with the backends that train."""
    return [measure(backend, case) for case in cases for backend in serving(TRAINABLE, case)]


def serving(names: tuple[str, ...], case: Case) -> list[str]:
    """Returns which of the backends serve a case."""
    asked = Call(torch.device(case.device), getattr(torch, case.dtype), case.head_width, case.backward)
    return [name for name in names if name == "dense" or obstacle(name, asked) is None]


def growing(device: str, frame_counts: tuple[int, ...]) -> Iterator[Row]:
    """Measures forward times of all backends over video length."""
    for dtype in DTYPES:
        flex_seconds = 0.0
        for case in (Case(frames, dtype, device=device) for frames in frame_counts):
            for backend in serving(BACKENDS, case):
                if backend != "flex" or 4 * flex_seconds < FLEX_SECONDS:
                    row = measure(backend, case)
                else:
                    row = Row(backend, case, case.mask.density, None, f"over {FLEX_SECONDS} s expected")
                yield row
                flex_seconds = row.seconds if backend == "flex" and row.seconds else flex_seconds


def training(device: str, frame_counts: tuple[int, ...]) -> list[Row]:
    """Measures forward and backward of the backends that have one everywhere."""
    options = {"device": device, "backward": True}
    return measured_rows(Case(frames, dtype, **options) for dtype in DTYPES for frames in frame_counts)


def small(device: str) -> list[Row]:
    """Measures the bundled model's shapes: blocks of 16, 4 heads of 48, 33 and 129 video frames, batch 2."""
    shape = {"block_size": 16, "batch": 2, "heads": 4, "head_width": 48, "device": device}
    return measured_rows(Case(frames, dtype, 8, 8, **shape) for frames in (9, 33) for dtype in DTYPES)


def memory(device: str, frames: int) -> dict[str, dict[str, float]]:
    """Measures peak MiB of a call with its inputs by data type and backend, each in a process of its own."""
    peaks: dict[str, dict[str, float]] = {}
    for case in (Case(frames, dtype, device=device) for dtype in DTYPES):
        for backend in serving(TRAINABLE, case):
            words = ["--memory-of", backend, json.dumps(asdict(case))]
            command = [sys.executable, "-P", "-m", "scripts.benchmark", *words]
            mib = float(subprocess.check_output(command, text=True))
            peaks.setdefault(case.dtype, {})[backend] = mib
            show(case, f"memory {backend:7} {mib:7.1f} MiB")
    return peaks


def memory_of(backend: str, case: Case) -> float:
    """Returns the MiB that inputs and a call add to the peak of a process that has made a small call."""
    with torch.no_grad():
        call(backend, replace(case, frames=4))()
        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call(backend, case)()
            return torch.cuda.max_memory_allocated() / 2**20
        case.mask.is_dense  # noqa: B018 (the mask is made before anything is measured)
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
        before = _status_mib("VmRSS")
        call(backend, case)()
        return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def cpu_of_others() -> float:
    """Returns the processor seconds since boot that other programs took."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _wait, *interrupts = map(int, path.read_text().splitlines()[0].split()[1:9])
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def other_table(name: str, argv: list[str]) -> int:
    """Writes the table and the picture of a module of scripts/benchmarks; returns the exit code."""
    module = import_module(f"scripts.benchmarks.{name}")
    parser = OneLineParser(prog=f"scripts/benchmark.sh --{name}", description=module.__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder ({RESULTS})")
    if hasattr(module, "arguments"):
        module.arguments(parser)
    options = parser.parse_args(argv)
    command = shlex.join(["bash", "scripts/benchmark.sh", f"--{name}", *argv])
    stem = f"{module.NAME.format(**vars(options))}_{time.strftime('%Y-%m-%d')}"

    def work() -> None:
        lines, figure = module.measured(options, command, f"{stem}.png")
        file = write_text(options.out / f"{stem}.md", "\n".join(lines) + "\n")
        if figure is not None:
            save_figure(figure, file.with_suffix(".png"))
        print(f"written    {file}")

    return exit_code(work, "nothing was written")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for name in OTHERS:
        if f"--{name}" in argv:
            return other_table(name, [word for word in argv if word != f"--{name}"])
    parser = OneLineParser(prog="scripts/benchmark.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2k to 8k tokens only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", default=str(RESULTS), help=f"folder of table and plot ({RESULTS})")
    for name, about in OTHERS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"instead: {about}; has its own --help")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        print(memory_of(options.memory_of[0], Case(**json.loads(options.memory_of[1]))))
        return 0
    attention_table(options, argv)
    return 0


def attention_table(options: argparse.Namespace, argv: list[str]) -> None:
    """Measures and writes the times and the memory of the kernels."""
    from scripts.benchmarks.cpu_report import write

    start, device, others = time.perf_counter(), options.device, cpu_of_others()
    frames = (2, 4, 8) if options.quick else (2, 4, 8, 16, 32)
    with torch.no_grad():
        parts = {"growing": list(growing(device, frames)), "small": small(device)}
    parts["training"] = training(device, frames[1:3] if options.quick else (4, 8, 16))
    most = frames[-1] if options.quick else 16
    peaks = memory(device, most)
    busy = (cpu_of_others() - others) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    command = "bash scripts/benchmark.sh" + "".join(f" {argument}" for argument in argv)
    seconds = time.perf_counter() - start
    about = f"{seconds / 60:.1f} minutes; other programs took {busy:.0%} of the processor meanwhile"
    print(write(options.out, device, command, about, parts=parts, peaks=peaks, tokens=most * 1024))


if __name__ == "__main__":
    sys.exit(main())
