"""Compiles every Triton kernel for every architecture of the launch table, on any machine, and reports it.

    python -m scripts.kernel_report [--out results/kernels_compiled.md] [--arch sm90 ...]
                                    [--speed results/kernels_speed_estimates.md]

Exit code 1 if a kernel spills registers, needs more shared memory than the architecture has, does not use the
tensor cores, or on sm90 prefetches fewer tiles than it has stages, copies tiles or waits too often.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radial_attn.kernels.triton.configs import KINDS, LAUNCHES
from scripts.benchmarks.hot_loop import Tiles, cuobjdump, loop_instructions, tiles_of
from scripts.benchmarks.kernel_sources import Variant, source, variants
from scripts.benchmarks.pool import pooled
from scripts.benchmarks.speed_model import PROCESSORS, speed_report
from scripts.run.errors import OneLineParser, exit_code
from scripts.run.files import write_text
from scripts.run.results import RESULTS, table

SHARED_BYTES = {  # the most that one program may have
    "sm80": 166_912,
    "sm86": 101_376,
    "sm89": 101_376,
    "sm90": 232_448,
    "sm100": 232_448,
    "sm120": 101_376,
    "gfx942": 65_536,
}
MOST_BARRIERS = 3  # of a program at a tile on sm90
TENSOR_CORES = {"sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}  # else mma.sync


@dataclass(frozen=True)
class Compiled:
    """Holds what the compiler made of one kernel."""

    arch: str
    variant: Variant
    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    instructions: int  # of the tensor cores
    tiles: Tiles
    loop: Counter[str] = field(default_factory=Counter)  # of loop_instructions, if the model reads it
    moved_twice: bool = False  # rows of the second group of specialised warps

    @property
    def faults(self) -> list[str]:
        """Lists what is wrong with it."""
        faults = [f"{self.spilled} B spilled"] if self.spilled else []
        if self.moved_twice:
            faults.append("the compiler moves the rows of the second group of warps twice")
        if self.shared > SHARED_BYTES[self.arch]:
            faults.append(f"shared memory over {SHARED_BYTES[self.arch]} B")
        if self.variant.kind in KINDS and not self.instructions:
            faults.append(f"no {tensor_cores(self.arch)}")
        return faults + (self._loop_faults() if self.arch == "sm90" and self.variant.kind in KINDS else [])

    def _loop_faults(self) -> list[str]:
        launch, faults = self.variant.launch, []
        if launch.specialize:  # other warps load, and their loop names no buffers
            return faults
        if self.variant.kind != "far field" and self.tiles.buffers < launch.stages:
            faults.append(f"{self.tiles.buffers} buffers in {launch.stages} stages")
        if self.tiles.moved:
            faults.append(f"{self.tiles.moved} copies of tiles in a turn of the loop")
        if self.loop["barriers"] > MOST_BARRIERS:
            faults.append(f"{self.loop['barriers']} barriers in a turn of the loop")
        return faults


def tensor_cores(arch: str) -> str:
    """Returns the matrix instruction that a kernel of this architecture has to use."""
    return TENSOR_CORES.get(arch, "mma.sync")


def compile_kernel(arch: str, variant: Variant) -> Compiled:
    """Compiles one kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)
    options = {"num_warps": variant.launch.warps, "num_stages": variant.launch.stages}
    return examined(arch, variant, triton.compile(source(variant), target=target, options=options))


def examined(arch: str, variant: Variant, made: Any) -> Compiled:
    """Reads a kernel that Triton compiled."""
    cuda, launch = arch.startswith("sm"), variant.launch
    registers, spilled = cuda_usage(made.asm["cubin"]) if cuda else amd_usage(made.asm["amdgcn"])
    count = made.asm["ptx" if cuda else "amdgcn"].count(tensor_cores(arch))
    loop = Counter()
    if arch in PROCESSORS and variant.kind in KINDS:
        loop = loop_instructions(cuobjdump(made.asm["cubin"], "-sass"))
    return Compiled(
        arch,
        variant,
        registers,
        spilled,
        made.metadata.shared,
        count,
        tiles_of(made.asm["ttgir"]),
        loop,
        launch.specialize and moves_rows_twice(made.asm["ttgir"]),
    )


def moves_rows_twice(code: str) -> bool:
    """Returns whether Triton's IR adds a range that begins half a tile on to a start that is half a tile on.

    If warps specialise, the compiler gives each group half of the rows. It moves ranges, and the coordinates
    at which descriptors are read, whatever else they are used for: rows made of both would move twice.
    """
    attributes = r"(?: \{[^}]*\})?"
    for part in re.split(r"partition\d+\(", code)[1:]:
        halves = set(re.findall(r"(%\S+) = tt\.make_range \{[^}]*\bstart = [1-9]\d* : i32\}", part))
        starts = set(re.findall(rf"(%\S+) = arith\.addi %\S+, %c\d+_i32\S*{attributes} : i32", part))
        splats = re.findall(rf"(%\S+) = tt\.splat (%\S+){attributes} : i32", part)
        moved = {name for name, start in splats if start in starts}
        sums = re.findall(rf"= arith\.addi (%\S+), (%\S+){attributes} : tensor", part)
        if any({*pair} & halves and {*pair} & moved for pair in sums):
            return True
    return False


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Returns registers and stack bytes of a thread, by `cuobjdump -res-usage` of Triton's own toolchain."""
    text = cuobjdump(cubin, "-res-usage")
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def amd_usage(assembly: str) -> tuple[int, int]:
    """Returns vector registers and spilled bytes of a thread, from the metadata of the assembly."""
    used, spilled = (re.search(rf"\.vgpr_{name}:\s+(\d+)", assembly)[1] for name in ("count", "spill_count"))
    return int(used), 4 * int(spilled)


def compile_all(archs: list[str]) -> list[Compiled]:
    """Compiles every kernel, width and kind of mask, on all cores."""
    return list(pooled(compile_kernel, [(arch, variant) for arch in archs for variant in variants(arch)]))


def report(rows: list[Compiled], command: str) -> str:
    """Returns the results file; `command` made it."""
    import triton

    cells = []
    for row in rows:
        variant, chosen = row.variant, row.variant.launch
        tile = f"{chosen.rows} x {chosen.columns}" if variant.kind in KINDS else f"{chosen.rows} tokens"
        kernel = row.arch, variant.kind, variant.width, variant.masks
        launch = tile, chosen.warps, chosen.stages, "yes" if chosen.descriptors else ""
        memory = row.registers, row.spilled, f"{row.shared} ({SHARED_BYTES[row.arch]})"
        loop = row.tiles.buffers or "", row.loop["barriers"] if row.loop else ""
        cells.append([*kernel, *launch, *memory, *loop, f"{row.instructions} {tensor_cores(row.arch)}"])
    titles = "arch | kernel | head width | mask | tile | warps | stages | TMA | registers | spilled, B"
    lines = [
        "# The Triton kernels as compiled",
        "",
        f"`{command}`: compiled, not run, by Triton "
        f"{triton.__version__} from the launch table of radial_attn/kernels/triton/configs.py.",
        "Buffers: of each tile that is loaded, in the loop with the fewest. Barriers: of a program, a tile.",
        *table(f"{titles} | shared, B (limit) | buffers | barriers | tensor core instructions", cells),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Writes the table; returns 1 if a kernel has a fault."""
    parser = OneLineParser(prog="python -m scripts.kernel_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_compiled.md", help="file of the table")
    parser.add_argument("--arch", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    speed = RESULTS / "kernels_speed_estimates.md"
    parser.add_argument("--speed", type=Path, default=speed, help="file of the estimated speed")
    options = parser.parse_args(argv)
    return exit_code(lambda: run(options), "nothing was written")


def run(options: argparse.Namespace) -> int:
    """Compiles the kernels and writes the tables; returns 1 if a kernel has a fault."""
    rows = compile_all(options.arch)
    some = "" if options.arch == list(LAUNCHES) else f" --arch {' '.join(options.arch)}"
    command = f"python -m scripts.kernel_report{some}"
    write_text(options.out, report(rows, command))
    measured = [(row.arch, row.variant, row.registers, row.shared, row.loop) for row in rows if row.loop]
    write_text(options.speed, speed_report(measured, command))
    for row in rows:
        for fault in row.faults:
            about = f"{row.arch} {row.variant.kind} width {row.variant.width} {row.variant.masks}"
            print(f"{about}: {fault}", file=sys.stderr)
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
