"""Estimates, from what the compiler made and from masks, how busy a GPU's tensor cores can be.

An estimate is not a measurement. It knows instructions, pipes and occupancy, but not latencies, the memory
system or the clock.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from radial_attn import BlockMask
from radial_attn.kernels.triton.configs import padded
from radial_attn.kernels.triton.tiles import Extent, key_tiles, query_tiles
from scripts.benchmarks.cases import CASES
from scripts.benchmarks.kernel_sources import Variant
from scripts.run.results import table

SUB_CORES = 4  # of a multiprocessor; each has a scheduler, a tensor core and a quarter of the registers
REGISTERS = 65_536  # of a multiprocessor


@dataclass(frozen=True)
class Processor:
    """Holds the rates of a multiprocessor of an architecture.

    Attributes:
        flops: of dense products of 16 bits in a cycle; int8, fp8: of 8 bits, 0 if it has none.
        turns: cycles for which a warp's instruction keeps each pipe of a sub-core busy.
        shared: bytes of shared memory; warps: the most at a time.
        count: of a GPU with it.
    """

    flops: int
    int8: int
    fp8: int
    turns: dict[str, int]
    shared: int
    warps: int
    count: int


FULL = {"all": 1, "float": 1, "integer": 2, "exp": 8}
PROCESSORS = {  # A100, RTX 4090, H100 and H200 (SXM)
    "sm80": Processor(2048, 4096, 0, FULL | {"float": 2}, 167_936, 64, 108),
    "sm89": Processor(512, 2048, 1024, FULL, 102_400, 48, 128),
    "sm90": Processor(4096, 8192, 8192, FULL, 233_472, 64, 132),
}
RESERVED = 1024  # bytes of shared memory of a program that the system takes
PROGRAM = 1.5  # tiles that loading queries and storing results cost, about


@dataclass(frozen=True)
class Estimate:
    """Holds what a kernel does with a tile, in cycles of a multiprocessor.

    Attributes:
        programs: that run at a time on a multiprocessor.
        groups: warps of these on a sub-core, whose work can overlap.
        tensor, other: cycles in which a warp keeps the tensor core, and the busiest other pipe.
        pipe: that pipe.
    """

    programs: int
    groups: int
    tensor: float
    other: float
    pipe: str

    @property
    def least(self) -> float:
        """Returns the share of cycles in which the tensor cores work if nothing overlaps."""
        return self.tensor / (self.tensor + self.other)

    @property
    def most(self) -> float:
        """Returns the same if warps overlap as well as they can: a warp waits for its own work alone."""
        together, alone = self.groups * max(self.tensor, self.other), self.tensor + self.other
        return self.groups * self.tensor / max(together, alone)

    @property
    def middle(self) -> float:
        """Returns the middle of both, the estimate: warps of a program wait for each other at every tile."""
        return (self.least + self.most) / 2


def products(kind: str, arch: str, fp8_values: bool) -> list[int]:
    """Returns the FLOPs of a cycle at which a multiprocessor computes each matrix product of a kernel."""
    rates = PROCESSORS[arch]
    if kind in {"int8", "fp8"}:
        return [rates.int8 if kind == "int8" else rates.fp8, rates.fp8 if fp8_values else rates.flops]
    return [rates.flops] * {"forward": 2, "query gradient": 3, "key gradients": 4}[kind]


def estimate(arch: str, variant: Variant, registers: int, shared: int, counts: Counter[str]) -> Estimate:
    """Estimates a kernel from what it uses and what a warp executes for a tile (`loop_instructions`)."""
    rates, launch = PROCESSORS[arch], variant.launch
    of_warp = -(-registers // 8) * 8 * 32
    limits = (
        rates.shared // (shared + RESERVED),
        REGISTERS // (of_warp * launch.warps),
        rates.warps // launch.warps,
    )
    programs = max(1, min(limits))
    flops = 2 * launch.rows * launch.columns * padded(variant.width)
    tensor = sum(flops / rate for rate in products(variant.kind, arch, launch.fp8_values))
    warps = launch.warps / SUB_CORES  # of a program, on each sub-core
    busy = {
        pipe: turns * (counts[pipe] - counts["tensor"] * (pipe == "all"))
        for pipe, turns in rates.turns.items()
    }
    pipe = max(busy, key=busy.__getitem__)
    return Estimate(programs, round(warps * programs), tensor / warps, busy[pipe], pipe)


def launch_order(count: int, by_key: bool) -> list[int]:
    """Returns the tiles in the order in which the programs of the Triton kernels take them."""
    return [(i + count - count // 16) % count if by_key else count - 1 - i for i in range(count)]


def tail(
    mask: BlockMask, heads: int, processors: int, *, rows: int = 128, columns: int = 128, by_key: bool = False
) -> float:
    """Returns the time of all programs divided by the time if all multiprocessors ended at once.

    Each processor takes the next program as it becomes free. Programs cost what their tiles cost and
    `PROGRAM` more.
    """
    grid = mask.grid
    extent = Extent(grid.tokens, mask.block_size, grid.video_tokens if grid.text else grid.tokens)
    tiles = (key_tiles if by_key else query_tiles)(mask.blocks, extent, rows, columns, torch.device("cpu"))
    counts = (tiles.offsets[..., 2] - tiles.offsets[..., 0]).double()
    costs = counts * (rows if by_key else columns) / 128 + PROGRAM
    costs = costs.expand(heads, -1)[:, launch_order(costs.shape[-1], by_key)].flatten().tolist()
    return makespan(costs, processors) * processors / sum(costs)


def makespan(costs: Sequence[float], processors: int) -> float:
    """Returns when the last program ends if each processor takes the next one as it becomes free."""
    free = [0.0] * processors
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


HEAD = """# Speed of the Triton kernels, estimated

`{command}`: **estimates, not measurements**, from compiled kernels and masks.
The last column waits for a GPU.

## Share of the tensor cores' dense rate

Instructions and cycles of a warp for a whole tile: cycles of the tensor core, and of the busiest other pipe
of its sub-core. At least: nothing overlaps. At most: warps overlap as well as they can. The estimate is the
middle, because the warps of a program wait for each other at every tile. Latencies, the memory system and
the clock are left out, so dense kernels do not reach 1 either."""
BACKWARD = """
## Forward and backward

Seven products count: two forward, five backward. The kernels compute nine, because both backward kernels need
the scores and the gradient of the weights. One pass for all three gradients would compute seven. The
second number assumes that it is as busy as the kernel of the key gradients, with atomic sums at no cost."""
ORDER = """
## Order of the programs

Time of all programs, divided by the time if all 132 multiprocessors ended at once. Each takes the next
program as soon as it is free."""
Row = tuple[str, Variant, int, int, Counter[str]]  # architecture, kernel, registers, shared bytes, hot loop


def speed_report(rows: Sequence[Row], command: str) -> str:
    """Returns the file of estimates of compiled kernels, with an empty column for what a GPU will show.

    `command` made it.
    """
    kept = [row for row in rows if _is_modelled(row[1])]
    estimates = {(arch, each.kind, each.width): estimate(arch, each, *used) for arch, each, *used in kept}
    kernels = [
        [
            *(arch, each.kind, each.width, f"{each.launch.rows} x {each.launch.columns}"),
            *(made.programs, loop["all"], loop["barriers"], f"{made.tensor:.0f}"),
            *(f"{made.other:.0f} ({made.pipe})", f"{made.least:.2f}", f"{made.most:.2f}"),
            *(f"**{made.middle:.2f}**", ""),
        ]
        for arch, each, _, _, loop in kept
        for made in [estimates[arch, each.kind, each.width]]
    ]
    both = [
        [*who, f"{7 / time:.2f}", f"{7 / other:.2f}", ""] for *who, time, other in _with_backward(estimates)
    ]
    orders = [
        [
            *(name, case.grid.tokens, f"{tail(case.mask, case.heads, 132):.4f}"),
            f"{tail(case.mask, case.heads, 132, rows=32, by_key=True):.4f}",
        ]
        for name, case in CASES.items()
    ]
    titles = (
        "arch | kernel | head width | tile | programs of a multiprocessor | instructions | barriers | "
        "tensor core, cycles | other, cycles (pipe) | at least | at most | estimate | measured"
    )
    lines = [
        HEAD.format(command=command),
        *table(titles, kernels),
        BACKWARD,
        *table("arch | head width | nine products, estimate | one pass of seven, estimate | measured", both),
        ORDER,
        *table("case | tokens | query tiles | key tiles", orders),
    ]
    return "\n".join(lines) + "\n"


def _is_modelled(variant: Variant) -> bool:
    """Tells whether the model knows the kernel: whole tiles, whose loop is the hot one."""
    far_or_narrow = variant.kind == "far field" or variant.width == 96
    return variant.masks == "whole tiles" and not variant.launch.specialize and not far_or_narrow


def _with_backward(estimates: dict) -> Iterator[tuple[str, int, float, float]]:
    """Yields architecture, head width, and time of forward and backward in products at the dense rate."""
    for arch, kind, width in estimates:
        if kind == "forward":
            forward, query, key = (
                estimates[arch, name, width].middle for name in ("forward", "query gradient", "key gradients")
            )
            yield arch, width, 2 / forward + 3 / query + 4 / key, 2 / forward + 5 / key
