"""Reads the hot loop of a compiled Triton kernel: tiles in Triton's IR, instructions of NVIDIA GPUs."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile

TILE = 1024  # elements from which a tensor counts as a tile
MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA", "UTCQMMA")
PIPES = {  # of an instruction, by the start of its name; all others only take a turn of the scheduler
    "tensor": MATRIX,
    "exp": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2"),
    "integer": (
        "FMNMX",
        "F2FP",
        "FSEL",
        "SEL",
        "ISETP",
        "FSETP",
        "LOP3",
        "SHF",
        "IADD3",
        "PRMT",
        "I2FP",
        "LEA",
    ),
}


@dataclass(frozen=True)
class Tiles:
    """Tells what Triton's IR does with the tiles of its loops over tiles, in the worst of these loops.

    Attributes:
        loops: how many there are.
        buffers: in shared memory for each tile that is loaded; 0 if the IR names none.
        moved: copies of tiles between shared memory and registers in a turn.
    """

    loops: int
    buffers: int
    moved: int


def tiles_of(code: str) -> Tiles:
    """Reads the IR of a kernel for GPUs (TTGIR)."""
    bodies = [
        body for body in _loops(code) if re.search(r"\bttng\.\w+_dot\b|\btt\.dot\b|\bttng\.\w+mma", body)
    ]
    buffers, moved = [], []
    for body in bodies:
        indexed = re.findall(r"ttg\.memdesc_index [^:]*: !ttg\.memdesc<(\d+)x((?:\d+x)+)[^>]*#smem", body)
        buffers += [int(count) for count, sides in indexed if _elements(sides) >= TILE]
        loaded = re.findall(r"ttg\.local_load .*-> tensor<((?:\d+x)+)", body)
        stored = re.findall(r"ttg\.local_alloc %\S+ .*: \(tensor<((?:\d+x)+)", body)
        moved.append(sum(_elements(sides) >= TILE for sides in loaded + stored))
    return Tiles(len(bodies), min(buffers, default=0), max(moved, default=0))


def _loops(code: str) -> list[str]:
    """Returns the text of every loop without a loop in it; the IR indents what is inside."""
    lines, bodies = code.splitlines(), []
    for first, line in enumerate(lines):
        if "scf.for" in line:
            indent = len(line) - len(line.lstrip())
            last = next(i for i in range(first + 1, len(lines)) if lines[i].startswith(" " * indent + "}"))
            body = "\n".join(lines[first + 1 : last])
            bodies += [body] * ("scf.for" not in body)
    return bodies


def _elements(sides: str) -> int:
    """Multiplies the sides of a shape such as `128x64x`."""
    return prod(int(side) for side in sides.strip("x").split("x"))


def cuobjdump(cubin: bytes, option: str) -> str:
    """Returns what cuobjdump of Triton's own toolchain prints about a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loop_instructions(code: str) -> Counter[str]:
    """Counts the instructions of a warp in a turn of the hot loop, by pipe; `code`: by `cuobjdump -sass`.

    The hot loop is the shortest one with a matrix instruction: that over whole tiles. "all" counts every
    instruction, "barriers" the waits for all warps of the program.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9.]*)([^;]*);", code)
    listed, spans = [(int(at, 16), name, rest) for at, name, rest in lines], []
    for at, name, rest in listed:
        target = re.search(r"\b0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    counted = [
        Counter(_kinds(name for at, name, _ in listed if first <= at <= last)) for first, last in spans
    ]
    return min(
        (count for count in counted if count["tensor"]), key=lambda count: count["all"], default=Counter()
    )


def _kinds(names: Iterable[str]) -> Iterator[str]:
    """Yields the keys of `loop_instructions` that each instruction counts for."""
    for name in names:
        yield "all"
        yield next((pipe for pipe, starts in PIPES.items() if name.startswith(starts)), "other")
        if name.startswith("BAR.SYNC"):
            yield "barriers"
