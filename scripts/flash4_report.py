"""Compiles the kernels of FlashAttention-4 for Hopper and Blackwell without a GPU, and reports what they use.

    python -m scripts.flash4_report [--out results/kernels_flash4.md] [--arch sm90 sm100]

Needs flash-attn-4, and Triton for its programs that read GPU code. Exit code 1 if a thread of a kernel keeps
more than 64 B in local memory, or if a kernel does not use the tensor cores.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from radial_attn.kernels.flash4 import library
from radial_attn.kernels.flash4.op import BLACKWELL, HOPPER
from scripts.benchmarks.flash4_kernels import (
    KINDS,
    Usage,
    Wanted,
    compile_kernel,
    gpu_code,
    prepare_compiler,
    usage,
    wanted,
)
from scripts.benchmarks.pool import pooled
from scripts.run.errors import OneLineParser, exit_code, positive
from scripts.run.files import write_text
from scripts.run.results import RESULTS, table

ARCHITECTURES = {"sm90": HOPPER, "sm100": BLACKWELL}
TENSOR_CORES = {"sm90": "HGMMA", "sm100": "UTCHMMA"}
LOADS = "UTMALDG"  # a tile through TMA
LOCAL = ("STL", "LDL")  # what is spilled
MOST_STACK = 64  # bytes; the backward spills if it looks up blocks of 64 tokens
WITHOUT_PRODUCTS = ("prepare", "finish")


@dataclass(frozen=True)
class Row:
    """Holds what one function of a kernel uses."""

    arch: str
    name: str
    step: str
    usage: Usage

    @property
    def products(self) -> int:
        """Counts the instructions of the tensor cores."""
        return self.usage.instructions[TENSOR_CORES[self.arch]]

    @property
    def faults(self) -> list[str]:
        """Lists what is wrong with it."""
        faults = [f"{self.usage.stack} B of stack"] if self.usage.stack > MOST_STACK else []
        if not self.products and self.step not in WITHOUT_PRODUCTS:
            faults.append(f"no {TENSOR_CORES[self.arch]}")
        return faults


def measure(call: Wanted, arch: str) -> list[Row]:
    """Compiles one kernel, and reads what each of its functions uses."""
    made = compile_kernel(call, ARCHITECTURES[arch])
    return [
        Row(arch, made.name, step, usage(gpu_code(function))) for step, function in made.functions.items()
    ]


def report(rows: list[Row]) -> str:
    """Returns the results file."""
    cells = []
    for row in rows:
        kind, _, width, pattern, *more = row.name.split("-")
        step = row.step if row.step == kind else f"{kind}: {row.step}"
        counts = row.usage.instructions
        spilled = sum(counts[name] for name in LOCAL)
        used = row.usage.registers, row.usage.stack, spilled, counts.total(), counts[LOADS]
        products = f"{row.products} {TENSOR_CORES[row.arch]}" if row.products else ""
        cells.append([row.arch, step, width, pattern, " ".join(more), *used, products])
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in (library.PACKAGE, library.COMPILER))
    titles = (
        "arch | kernel | head width | tile | mask | registers | stack, B | spills | instructions | TMA loads"
    )
    lines = [
        "# The kernels of FlashAttention-4 as compiled",
        "",
        f"`python -m scripts.flash4_report`: compiled, not run, by {versions}, for bfloat16. Registers are",
        "those with which a thread starts; later, warps give some to each other. Spills are instructions",
        'that use local memory. "prepare" and "finish" run before and after the backward.',
        *table(f"{titles} | tensor core instructions", cells),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Writes the table; returns 1 if a kernel has a fault."""
    parser = OneLineParser(prog="python -m scripts.flash4_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_flash4.md", help="file of the table")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument(
        "--width", nargs="+", type=int, choices=(64, 128), default=[64, 128], help="of a head"
    )
    parser.add_argument("--jobs", type=positive, default=1, help="kernels compiled at the same time")
    options = parser.parse_args(argv)
    if options.out.is_dir():
        parser.error(f"--out must be a file, got {options.out}")
    if (reason := library.problem()) is not None:
        parser.error(reason)
    return exit_code(lambda: run(options), "nothing was written")


def run(options: argparse.Namespace) -> int:
    """Compiles the kernels and writes the table; returns 1 if a kernel has a fault."""
    rows = []
    for arch in options.arch:
        capability = ARCHITECTURES[arch]
        calls = wanted(capability, [torch.bfloat16], options.width, list(KINDS))
        work, start = [(call, arch) for call in calls], partial(prepare_compiler, capability)
        for made in pooled(measure, work, options.jobs, start):
            rows += made
    write_text(options.out, report(rows))
    faults = [f"{row.arch} {row.name} {row.step}: {fault}" for row in rows for fault in row.faults]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
