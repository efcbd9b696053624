"""Counts what Ulysses sends and copies around the attention of a layer, on one of several processes.

    python -m tests.support.exchange_cost

Nothing is sent: the process group answers at once. Sizes are those of the paper's videos with fewer tokens,
and grow in proportion.
"""

from collections import Counter
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from radial_attn import TokenGrid
from radial_attn.models.parallel.ulysses import SequenceParallel

SHORTER = 64  # times fewer tokens than counted
CASES = {  # processes, batch, heads, tokens of video and text, whether heads are dealt
    "Wan 69 frames, 8 processes": (8, 1, 40, 69_120, 0, False),
    "Wan 69 frames, 8, batch 2": (8, 2, 40, 69_120, 0, False),
    "Wan 69 frames, 8, heads dealt": (8, 1, 40, 69_120, 0, True),
    "Wan 69 frames, 6 (40 heads)": (6, 1, 40, 69_120, 0, False),
    "HunyuanVideo 117 frames, 8": (8, 1, 24, 115_200, 256, False),
    "HunyuanVideo 509 frames, 8": (8, 1, 24, 460_800, 256, False),
}
COPIES = {"clone", "copy_", "cat", "index_select", "index", "constant_pad_nd", "stack"}


class Count(TorchDispatchMode):
    """Counts collectives, the bytes that they send, and the bytes that copies write."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes, self.counts = processes, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")
        if name[0] == "c10d":
            size = args[1].nbytes if "alltoall" in name[1] else sum(x.nbytes for x in args[1])
            share = (self.processes - 1) / self.processes if "alltoall" in name[1] else self.processes - 1
            self.counts += Counter(exchanges=1, sent=size * share)
        elif name[1] in COPIES:
            self.counts["copied"] += sum(x.nbytes for x in tree_leaves(out))
            self.counts["copies"] += 1
        return out


def count(case: tuple) -> Counter:
    """Counts one layer in bfloat16 with heads of 128, on the first process."""
    processes, batch, heads, video, text, dealt = case
    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        shared = SequenceParallel(torch.distributed.group.WORLD)
        grid = TokenGrid(1, 1, video // SHORTER, text // SHORTER)
        shared.begin(grid, 128)
        own = -(-grid.video_tokens // processes) + grid.text
        tensors = [torch.zeros(batch, own, heads, 128, dtype=torch.bfloat16) for _ in range(3)]
        order = torch.arange(heads).flip(0).view(processes, -1) if dealt else None
        with torch.no_grad(), Count(processes) as counted:
            shared.exchange(*tensors, grid, lambda query, *_: torch.empty_like(query), heads=order)
        return counted.counts
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Prints a table."""
    print("| video | exchanges | sent, MB | copies | copied, MB |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        counts = count(case)
        sent, copied = (SHORTER * counts[key] / 1e6 for key in ("sent", "copied"))
        print(f"| {name} | {counts['exchanges']} | {sent:.0f} | {counts['copies']} | {copied:.0f} |")


if __name__ == "__main__":
    main()
