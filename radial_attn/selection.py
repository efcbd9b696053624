"""Chooses the key blocks of every head by the attention that they hold, from exact rows of the softmax.

A dense step shows where the attention of a head lies. `block_mass` reads it from a sample of query rows, and
a `Budget` turns it into blocks: a floor that every mask keeps, then the blocks with the largest mass.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .analysis.recall import score_chunks
from .far_field import block_means, video_counts
from .grid import TokenGrid
from .masks.radial import RadialConfig, band_blocks

SELECTIONS = ("static", "dense_step", "profile")
BUDGETS = ("head", "layer", "model")
SAMPLED_ROWS = 4  # query rows of a block whose softmax is computed
SCALE = 2.0**14  # of a mass in [0, 1], before it is rounded to float16
MOST = 3.0  # of a correction: a factor of 20
BINS = 0x7C00  # finite float16 values from 0 on, by their bits, which order as the values do


def block_rows(grid: TokenGrid, block_size: int, count: int = SAMPLED_ROWS) -> Tensor:
    """Returns `count` video tokens of each block, evenly spread, or all if it has fewer; int64, ascending."""
    starts = range(0, grid.video_tokens, block_size)
    sizes = [min(block_size, grid.video_tokens - start) for start in starts]
    rows = [
        start + (2 * torch.arange(min(count, size), device="cpu") + 1) * size // (2 * min(count, size))
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(rows)


class BlockMass(NamedTuple):
    """Holds the mean softmax mass of each key block for each query block, float32 `[B, H, Q, K]`.

    Rows of blocks without video are zeros.

    Attributes:
        exact: from the scores of all keys.
        pooled: what the mean keys of the blocks would have, without a correction; 0 for blocks without video.
    """

    exact: Tensor
    pooled: Tensor


def block_mass(
    query: Tensor,
    key: Tensor,
    grid: TokenGrid,
    block_size: int,
    *,
    rows: Tensor | None = None,
    text_lengths: Tensor | None = None,
) -> BlockMass:
    """Measures the mass of blocks on the device of the query.

    A few rows are computed at a time, so memory grows with the number of blocks squared, not of tokens.

    Args:
        query, key: `[B, S, H, D]`.
        rows: query rows that count, int64 `[R]`, video tokens; by default those of `block_rows`.
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    rows = block_rows(grid, block_size) if rows is None else rows
    batch, tokens, heads, width = query.shape
    blocks, device = grid.num_blocks(block_size), query.device
    mass = BlockMass(*(torch.zeros(batch, heads, blocks, blocks, device=device) for _ in range(2)))
    columns = torch.arange(tokens, device=device) // block_size
    means, logs = block_means(key, grid, block_size), video_counts(grid, block_size).to(device).log()
    for chunk in score_chunks(query, key, rows, grid, text_lengths):
        to = (chunk.rows // block_size).to(device)
        sums = chunk.scores.logsumexp(-1, keepdim=True)
        exact = torch.zeros(len(to), blocks, device=device)
        exact.index_add_(1, columns, (chunk.scores - sums).exp())
        mass.exact[chunk.sample, chunk.head].index_add_(0, to, exact)
        queries = query[chunk.sample, chunk.rows.to(device), chunk.head].float() * width**-0.5
        pooled = (queries @ means[chunk.sample, :, chunk.head].T + logs - sums).exp()
        mass.pooled[chunk.sample, chunk.head, :, : len(logs)].index_add_(0, to, pooled)
    counts = torch.bincount(rows // block_size, minlength=blocks).clamp(min=1).to(device)
    return BlockMass(*(x / counts[:, None] for x in mass))


def far_correction(mass: BlockMass, kept: Tensor) -> Tensor:
    """Returns the bias of each head's far field, `[B, H, 1, 1]`, that gives dropped blocks their exact mass.

    `kept`: bool, broadcast to `[B, H, Q, K]`. One number for each head does as well as one for each pair of
    blocks, measured on the bundled Wan. It is at most `MOST` either way.
    """
    exact, pooled = (x.masked_fill(kept | (mass.pooled == 0), 0).sum((2, 3), keepdim=True) for x in mass)
    ratio = exact.clamp(min=1e-9) / pooled.clamp(min=1e-9)
    return ratio.log().clamp(-MOST, MOST)


def floor_blocks(grid: TokenGrid, config: RadialConfig) -> Tensor:
    """Returns the blocks that every chosen mask keeps, bool `[Q, K]`: the diagonal and all blocks with text.

    The sink is no part of it: heads that look at the first frame choose it by its mass.
    """
    return torch.from_numpy(band_blocks(grid, replace(config, sink=False), lambda distance: None))


class Budget:
    """Chooses blocks by mass: as many as the density allows, shared by a head, a layer or the whole model.

    Every sample has its own budget. Masses are compared after rounding to float16, and of equal ones all or
    none are kept, so at most the allowed token pairs are kept, and processes that share the heads agree.

    Args:
        floor: blocks that are always kept, bool `[Q, K]` on the CPU; they count.
        tokens: of each block, int64 `[Q]`.
        densities: kept shares of the token pairs, in (0, 1], one for each level.
        shared_by: one of `BUDGETS`.
        total: returns the sum of a tensor over the processes that share the heads; None if one has them all.

    Raises:
        ValueError: a density below the floor's.
    """

    def __init__(
        self,
        floor: Tensor,
        tokens: Tensor,
        densities: Sequence[float],
        shared_by: str,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        tokens = tokens.double()
        self._pairs = torch.outer(tokens, tokens)
        share = (self._pairs * floor).sum().item() / self._pairs.sum().item()
        if min(densities) < share:
            raise ValueError(
                f"density must be at least {share:.4f}, which the diagonal and the blocks with text take, "
                f"got {min(densities):g}"
            )
        self.densities, self.shared_by = tuple(sorted(densities, reverse=True)), shared_by
        self._floor, self._total = floor, total or (lambda counts: counts)

    def histogram(self, mass: Tensor) -> Tensor:
        """Counts token pairs above the floor by the mass of their blocks, float64 `[groups, BINS]`.

        A group is a head of a sample, or a sample: the layers of a model add up their histograms. `mass` is
        float32 `[B, H, Q, K]`.
        """
        free = ~self._floor.flatten()
        bits = _bits(mass).flatten(2)[..., free.to(mass.device)]
        pairs = self._pairs.flatten()[free].to(mass.device).expand(bits.shape)
        by_head = self.shared_by == "head"
        bits, pairs = (x.flatten(0, 1) if by_head else x.flatten(1) for x in (bits, pairs))
        offsets = BINS * torch.arange(len(bits), device=mass.device)[:, None]
        bins = BINS * len(bits)
        counts = torch.bincount((bits + offsets).flatten(), pairs.flatten(), minlength=bins).view(-1, BINS)
        return counts if by_head else self._total(counts)

    def cuts(self, histogram: Tensor) -> Tensor:
        """Returns the least mass, as a bin, that each level keeps, int64 `[groups, levels]`."""
        everything = self._pairs.sum().item()
        floor = (self._pairs * self._floor).sum().item()
        heads = histogram.sum(-1, keepdim=True) / max(1.0, everything - floor)
        densities = torch.tensor(self.densities, dtype=torch.float64, device=histogram.device)
        allowed = (densities * everything - floor) * heads
        above = histogram.flip(-1).cumsum(-1)  # token pairs in the last 1, 2, ... bins
        return BINS - torch.searchsorted(above, allowed + 0.5, right=True)

    def levels(self, mass: Tensor, cuts: Tensor) -> Tensor:
        """Counts the levels that keep each block, uint8 `[B, H, Q, K]` on the CPU.

        The denser level keeps what the sparser one keeps: level i of the descending `densities` keeps a block
        if this count is above i.
        """
        shape = (*mass.shape[:2], 1, 1) if self.shared_by == "head" else (len(mass), 1, 1, 1)
        bits, count = _bits(mass), torch.zeros(mass.shape, dtype=torch.uint8, device=mass.device)
        for cut in cuts.unbind(-1):
            count += bits >= cut.view(shape)
        return count.cpu().masked_fill_(self._floor, len(self.densities))


def _bits(mass: Tensor) -> Tensor:
    """Returns the bin of each mass, int64."""
    return (mass.clamp(0, 1) * SCALE).half().view(torch.int16).long()
