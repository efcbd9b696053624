"""Deals the blocks of a sequence to a ring of devices, or heads to processes, for equal work on each.

A radial mask is denser near its diagonal and at the sink, and thins out by frame distance. Short runs of
blocks are therefore dealt in turn, twice around for each frame. Every rank holds strips of all frames, and
the rectangle of any rank's rows and any rank's keys keeps about equally many blocks.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .block_mask import BlockMask, Part
from .grid import TokenGrid

GAIN = 1.01  # less than 1 % is not worth a deal


@dataclass(frozen=True, eq=False)
class Shards:
    """Holds the blocks and tokens of each rank of a ring, all ascending.

    Attributes:
        blocks: int64, for each rank the blocks that video fills. The last rank also holds what follows: the
            end of the video and the text.
        tokens: int64, for each rank its video tokens.
    """

    grid: TokenGrid
    block_size: int
    blocks: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]

    @property
    def degree(self) -> int:
        return len(self.blocks)

    @property
    def most_tokens(self) -> int:
        """Counts the video tokens of the largest share."""
        return max(len(tokens) for tokens in self.tokens)

    @property
    def front(self) -> int:
        """Counts the video tokens of the block in which the text begins, or of a short last block."""
        return self.grid.video_tokens % self.block_size

    def part(self, mask: BlockMask, row_rank: int, key_rank: int) -> Part:
        """Returns the mask of a rank's video tokens and a rank's keys, which include the text on the last."""
        rows = self.blocks[row_rank]
        if row_rank == self.degree - 1 and self.front:
            rows = torch.cat([rows, rows.new_tensor([self._first_mixed])])
        return self._part(mask, ("rows", row_rank), rows, key_rank)

    def text_part(self, mask: BlockMask, key_rank: int) -> Part:
        """Returns the mask of the text, with the `front` tokens in its first block, and a rank's keys."""
        return self._part(mask, "text", self._mixed, key_rank)

    def kept(self, mask: BlockMask) -> Tensor:
        """Counts the kept blocks of each rank's rows and each rank's keys, float64 `[R, R]`, mean over heads.

        Every rank computes the rows of the text, over its own keys: they count on the diagonal.
        """
        ranks = range(self.degree)
        kept = [[self._count(self.part(mask, row, key)) for key in ranks] for row in ranks]
        for rank in ranks if self.grid.text else ():
            kept[rank][rank] += self._count(self.text_part(mask, rank))
        return torch.tensor(kept, dtype=torch.float64, device="cpu")

    @property
    def _first_mixed(self) -> int:
        return self.grid.video_tokens // self.block_size

    @property
    def _mixed(self) -> Tensor:
        """Returns the blocks from the end of the video on."""
        return torch.arange(self._first_mixed, self.grid.num_blocks(self.block_size), device="cpu")

    def _part(self, mask: BlockMask, name: object, rows: Tensor, key_rank: int) -> Part:
        texts = self.grid.text if name == "text" else 0, 0
        keys = self.blocks[key_rank]
        if key_rank == self.degree - 1:
            keys, texts = torch.cat([keys, self._mixed]), (texts[0], self.grid.text)

        def build() -> Part:
            blocks = mask.blocks.index_select(-2, rows).index_select(-1, keys)
            return Part(blocks, self.block_size, *texts)

        return mask.cached(("part", self.degree, name, key_rank), build)

    @staticmethod
    def _count(part: Part) -> float:
        return part.blocks.sum().item() / (part.blocks.shape[0] if part.blocks.ndim == 3 else 1)


@lru_cache(maxsize=8)
def deal(grid: TokenGrid, block_size: int, degree: int) -> Shards:
    """Deals shares to `degree` ranks, each of equally many whole video blocks or one less."""
    whole = grid.video_tokens // block_size
    # deal blocks in rounds of runs, two rounds to a frame
    run = max(1, grid.tokens_per_frame // block_size // (2 * degree))
    rounds = max(1, round(whole / (run * degree)))
    quotas = np.array([whole // degree + (rank < whole % degree) for rank in range(degree)])
    ends = np.arange(rounds + 1)[:, None] * quotas // rounds
    ranks = np.tile(np.arange(degree), rounds)
    owner = torch.from_numpy(np.repeat(ranks, np.diff(ends, axis=0).flatten()))
    with torch.inference_mode(False):
        blocks = tuple((owner == rank).nonzero().flatten() for rank in range(degree))
        inside = torch.arange(block_size, device="cpu")
        tokens = [(part.unsqueeze(1) * block_size + inside).flatten() for part in blocks]
        rest = torch.arange(whole * block_size, grid.video_tokens, device="cpu")
        tokens[-1] = torch.cat([tokens[-1], rest])
    return Shards(grid, block_size, blocks, tuple(tokens))


class HeadDeal(NamedTuple):
    """Holds which heads each process computes.

    Attributes:
        heads: of each process, int64 `[P, H / P]`, ascending.
        loads: work of each process, int64 `[P]`.
    """

    heads: Tensor
    loads: Tensor

    @property
    def in_order(self) -> bool:
        """Tells whether the first process has the first heads, the next one those that follow, and so on."""
        return bool((self.heads.flatten().diff() == 1).all())


def deal_heads(work: Tensor, processes: int) -> HeadDeal:
    """Deals heads to processes, the same number to each, for about equal work.

    Begins with the heads in order. The two that even out the work of their processes most change places,
    again and again, until nothing is gained. If the busiest process gains less than 1 %, all stay in order.

    Args:
        work: of each head, int64 `[H]` on the CPU, at least one above 0; `processes` divides H.
    """
    amounts = work.numpy()
    owner = np.repeat(np.arange(processes), len(amounts) // processes)
    less = amounts[:, None] - amounts  # for the owner of the row's head, if the two change places
    while True:
        loads = np.bincount(owner, weights=amounts)
        gain = less * ((loads[:, None] - loads)[owner][:, owner] - less)
        if gain.max() <= 0:
            break
        pair = list(np.unravel_index(gain.argmax(), gain.shape))
        owner[pair] = owner[pair[::-1]]
    orders = np.arange(len(amounts)), owner.argsort(kind="stable")
    heads = (torch.from_numpy(order.reshape(processes, -1)) for order in orders)
    before, after = (HeadDeal(x, work[x].sum(1)) for x in heads)
    return after if before.loads.max() > GAIN * after.loads.max() else before


def imbalance(kept: Tensor) -> tuple[float, float]:
    """Compares the busiest rank with the mean: over all steps, and if all wait for the busiest at each step.

    `kept` is from `Shards.kept`. 1.0 is even; at step `j` rank `r` attends to the keys of rank `r - j`.
    """
    degree, mean = len(kept), kept.sum() / len(kept)
    ranks = torch.arange(degree, device="cpu")
    steps = [kept[ranks, (ranks - step) % degree].max() for step in range(degree)]
    return (kept.sum(dim=1).max() / mean).item(), (sum(steps) / mean).item()
