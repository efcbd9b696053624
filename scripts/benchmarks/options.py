"""The command line of the GPU benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.cases import CASES, MEASURED, SPARSE
from scripts.run.errors import OneLineParser, positive_number

ABOUT = "Attention and denoising steps on one GPU, correctness first, within a few minutes."


@dataclass(frozen=True)
class Options:
    """The command line; `tiny` makes it a rehearsal."""

    device: str
    tiny: bool
    minutes: float
    out: Path
    only: tuple[str, ...]
    backends: tuple[str, ...]
    steps: bool
    tests: bool
    profile: bool
    build_flashinfer: bool
    command: str


def parse(argv: Sequence[str]) -> Options:
    """The options; a wrong one ends the program with one line."""
    parser = OneLineParser(prog="scripts/benchmark_gpu.sh", description=ABOUT)
    parser.add_argument(
        "--minutes", type=positive_number, default=8.0, help="time for all of it (default: 8)"
    )
    parser.add_argument("--out", type=Path, help="folder (default: results, of a rehearsal outputs)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--backends", nargs="+", choices=SPARSE, metavar="BACKEND")
    parser.add_argument("--skip-steps", action="store_true", help="attention alone")
    parser.add_argument("--skip-tests", action="store_true", help="without the kernel tests")
    parser.add_argument("--profile", action="store_true", help="lists the kernels of every call")
    parser.add_argument("--build-flashinfer", action="store_true", help="builds its kernels: minutes of nvcc")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal, no measurement")
    words = parser.parse_args(argv)
    if words.device == "cpu" and not words.tiny:
        parser.error("--device cpu only rehearses: it needs --tiny")
    if words.out is not None and words.out.exists() and not words.out.is_dir():
        parser.error(f"--out must be a folder, got {words.out}")
    usual = ("blocks",) if words.device == "cpu" else MEASURED
    return Options(
        device=words.device,
        tiny=words.tiny,
        minutes=words.minutes,
        out=words.out or Path("outputs" if words.tiny else "results"),
        only=tuple(words.only),
        backends=tuple(words.backends or usual),
        steps=not words.skip_steps,
        tests=not words.skip_tests,
        profile=words.profile,
        build_flashinfer=words.build_flashinfer,
        command=" ".join(["bash scripts/benchmark_gpu.sh", *argv]),
    )
