"""Chooses the key blocks of every head by what dropping them would cost, from exact rows of the softmax.

A dense step shows where the attention of a head lies. `measure_blocks` reads it from a sample of query
rows, and a `Budget` turns it into blocks: a floor that every mask keeps, then those that matter most.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .analysis.recall import score_chunks
from .far_field import block_means, video_counts
from .grid import TokenGrid
from .masks.radial import RadialConfig, band_blocks

SELECTIONS = ("static", "dense_step", "profile")
BUDGETS = ("head", "layer", "model")
SAMPLED_ROWS = 4  # query rows of a block whose softmax is computed
MOST = 3.0  # of a correction: a factor of 20
SHIFT = 14  # bits that rounding takes from a float32: 0.2 %
BINS = 0x7F800000 >> SHIFT  # finite float32 values from 0 on, by their bits, which order as the values do


def block_rows(grid: TokenGrid, block_size: int, count: int = SAMPLED_ROWS) -> Tensor:
    """Returns `count` video tokens of each block, evenly spread, or all if it has fewer; int64, ascending."""
    starts = range(0, grid.video_tokens, block_size)
    sizes = [min(block_size, grid.video_tokens - start) for start in starts]
    rows = [
        start + (2 * torch.arange(min(count, size), device="cpu") + 1) * size // (2 * min(count, size))
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(rows)


class Measured(NamedTuple):
    """Holds what each key block is for each query block, float32 `[B, H, Q, K]`, mean over sampled rows.

    Rows of blocks without video are zeros.

    Attributes:
        mass: of the softmax.
        pooled: the mass that the block's mean key would have, without a correction; 0 without video.
        loss: root of the mean squared change of the output, without the softmax's own change, if the block is
            dropped: its contribution, less that of its mean if there is a far field.
    """

    mass: Tensor
    pooled: Tensor
    loss: Tensor


def measure_blocks(
    tensors: Sequence[Tensor],
    grid: TokenGrid,
    block_size: int,
    *,
    far_field: bool,
    rows: Tensor | None = None,
    text_lengths: Tensor | None = None,
) -> Measured:
    """Measures the blocks on the device of the query.

    A few rows are computed at a time, so memory grows with the number of blocks squared, not of tokens.

    Args:
        tensors: query, key and value, `[B, S, H, D]`.
        far_field: whether dropped blocks take part by their means.
        rows: query rows that count, int64 `[R]`, video tokens; by default those of `block_rows`.
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    query, key, value = tensors
    rows = block_rows(grid, block_size) if rows is None else rows
    batch, _, heads, width = query.shape
    blocks, device = grid.num_blocks(block_size), query.device
    total = Measured(*(torch.zeros(batch, heads, blocks, blocks, device=device) for _ in range(3)))
    keys, values = (block_means(x, grid, block_size) for x in (key, value))
    logs = video_counts(grid, block_size).to(device).log()
    missing, video = -query.shape[1] % block_size, len(logs)
    for chunk in score_chunks(query, key, rows, grid, text_lengths):
        to, at = (chunk.rows // block_size).to(device), (chunk.sample, chunk.head)
        sums = chunk.scores.logsumexp(-1, keepdim=True)
        weights = F.pad((chunk.scores - sums).exp(), (0, missing)).unflatten(-1, (blocks, block_size))
        by_token = F.pad(value[at[0], :, at[1]].float(), (0, 0, 0, missing)).unflatten(0, (blocks, -1))
        change = torch.einsum("rkb,kbd->rkd", weights, by_token)
        queries = query[at[0], chunk.rows.to(device), at[1]].float() * width**-0.5
        pooled = (queries @ keys[at[0], :, at[1]].T + logs - sums).exp()
        if far_field:
            change[:, :video] -= pooled[..., None] * values[at[0], :, at[1]]
        total.mass[at].index_add_(0, to, weights.sum(-1))
        total.pooled[at][:, :video].index_add_(0, to, pooled)
        total.loss[at].index_add_(0, to, change.square().sum(-1))
    counts = torch.bincount(rows // block_size, minlength=blocks).clamp(min=1).to(device)[:, None]
    return Measured(total.mass / counts, total.pooled / counts, (total.loss / counts).sqrt())


def far_correction(measured: Measured, kept: Tensor) -> Tensor:
    """Returns the bias of each head's far field, `[B, H, 1, 1]`, that gives dropped blocks their exact mass.

    `kept`: bool, broadcast to `[B, H, Q, K]`. One number for each head does as well as one for each pair of
    blocks, measured on the bundled Wan. It is at most `MOST` either way.
    """
    left_out = kept | (measured.pooled == 0)
    exact, pooled = (x.masked_fill(left_out, 0).sum((2, 3), keepdim=True) for x in measured[:2])
    ratio = exact.clamp(min=1e-9) / pooled.clamp(min=1e-9)
    return ratio.log().clamp(-MOST, MOST)


def floor_blocks(grid: TokenGrid, config: RadialConfig) -> Tensor:
    """Returns the blocks that every chosen mask keeps, bool `[Q, K]`: the diagonal and all blocks with text.

    The sink is no part of it: heads that look at the first frame choose it by its mass.
    """
    bare = RadialConfig(block_size=config.block_size, sink=False)
    return torch.from_numpy(band_blocks(grid, bare, lambda distance: None))


class Budget:
    """Chooses the blocks of largest worth, as many as a density allows to a head, a layer or the whole model.

    Every sample has its own budget. Worths are compared after rounding, and of equal ones all or none are
    kept, so at most the allowed token pairs are kept, and processes that share the heads agree.

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

    def histogram(self, worth: Tensor) -> Tensor:
        """Counts token pairs above the floor by the worth of their blocks, float64 `[groups, BINS]`.

        A group is a head of a sample, or a sample: the layers of a model add up their histograms. `worth`
        is float32 `[B, H, Q, K]`.
        """
        free = ~self._floor.flatten()
        bits = _bits(worth).flatten(2)[..., free.to(worth.device)]
        pairs = self._pairs.flatten()[free].to(worth.device).expand(bits.shape)
        by_head = self.shared_by == "head"
        bits, pairs = (x.flatten(0, 1) if by_head else x.flatten(1) for x in (bits, pairs))
        offsets = BINS * torch.arange(len(bits), device=worth.device)[:, None]
        bins = BINS * len(bits)
        counts = torch.bincount((bits + offsets).flatten(), pairs.flatten(), minlength=bins).view(-1, BINS)
        return counts if by_head else self._total(counts)

    def cuts(self, histogram: Tensor) -> Tensor:
        """Returns the least worth, as a bin, that each level keeps, int64 `[groups, levels]`."""
        everything = self._pairs.sum().item()
        floor = (self._pairs * self._floor).sum().item()
        heads = histogram.sum(-1, keepdim=True) / max(1.0, everything - floor)
        densities = torch.tensor(self.densities, dtype=torch.float64, device=histogram.device)
        allowed = (densities * everything - floor) * heads
        above = histogram.flip(-1).cumsum(-1)  # token pairs in the last 1, 2, ... bins
        return BINS - torch.searchsorted(above, allowed + 0.5, right=True)

    def levels(self, worth: Tensor, cuts: Tensor) -> Tensor:
        """Counts the levels that keep each block, uint8 `[B, H, Q, K]` on the CPU.

        The denser level keeps what the sparser one keeps: level i of the descending `densities` keeps a block
        if this count is above i.
        """
        shape = (*worth.shape[:2], 1, 1) if self.shared_by == "head" else (len(worth), 1, 1, 1)
        bits, count = _bits(worth), torch.zeros(worth.shape, dtype=torch.uint8, device=worth.device)
        for cut in cuts.unbind(-1):
            count += bits >= cut.view(shape)
        return count.cpu().masked_fill_(self._floor, len(self.densities))


def _bits(worth: Tensor) -> Tensor:
    """Returns the bin of each worth, int64."""
    return (worth.float().nan_to_num().contiguous().view(torch.int32) >> SHIFT).long()
