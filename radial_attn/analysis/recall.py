"""Measures what a mask keeps of the attention on sampled rows: recall, output error, and the rows themselves.

Dense attention is computed for the sampled query rows alone, one head and a few rows at a time, so memory
grows with the length of the sequence and never with its square.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..grid import TokenGrid, require_int

CHUNK = 1 << 23  # scores held at a time


class Chunk(NamedTuple):
    """Holds the scores of some rows of one head of one sample.

    Attributes:
        sample, head: their numbers.
        places: the rows' positions among all sampled rows, a slice.
        rows: query tokens, int64 `[r]` on the CPU.
        scores: float32 `[r, S]`, `q k^T / sqrt(D)`; `-inf` at padded text.
    """

    sample: int
    head: int
    places: slice
    rows: Tensor
    scores: Tensor


class Kept(NamedTuple):
    """Measures what a mask does to some rows, by sample and head, float64 `[B, H]` on the CPU.

    Attributes:
        recall: mean over the rows of the share of the dense softmax mass on kept keys.
        mse: mean squared difference of masked and dense output.
        dense: mean square of the dense output; `mse / dense` is the relative error.
    """

    recall: Tensor
    mse: Tensor
    dense: Tensor


def sample_rows(grid: TokenGrid, count: int, seed: int = 0) -> Tensor:
    """Samples video tokens, int64 `[R]`, ascending and without repetition.

    Frames get equally many, give or take one. A `count` above the number of video tokens takes them all, one
    below the number of frames is spread evenly over the frames. `seed` draws the positions within a frame.

    Raises ValueError for a count that is not an integer of at least 1.
    """
    require_int("count", count, 1)
    frame, count = grid.tokens_per_frame, min(count, grid.video_tokens)
    frames = [(2 * row + 1) * grid.frames // (2 * count) for row in range(count)]
    generator, rows = torch.Generator().manual_seed(seed), []
    for number in sorted(set(frames)):
        positions = torch.randperm(frame, generator=generator)[: frames.count(number)]
        rows.append(number * frame + positions.sort().values)
    return torch.cat(rows)


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    text_lengths: Tensor | None = None,
    grid: TokenGrid | None = None,
) -> Tensor:
    """Returns dense attention of some rows after the softmax, float32 `[B, H, R, S]`: pass a few at a time.

    Args:
        query, key: `[B, S, H, D]`.
        rows: query tokens, int64 `[R]`.
        text_lengths: valid text tokens of each sample, integers `[B]`, or None for all; needs the grid.

    Raises ValueError if tensors, rows and grid do not fit together.
    """
    if grid is None and text_lengths is not None:
        raise ValueError("text_lengths needs the grid, to find the text: pass grid as well")
    batch, tokens, heads, _ = query.shape
    out = torch.empty(batch, heads, len(rows), tokens, dtype=torch.float32, device=query.device)
    for chunk in score_chunks(query, key, rows, grid, text_lengths):
        out[chunk.sample, chunk.head, chunk.places] = chunk.scores.softmax(-1)
    return out


def recall(
    query: Tensor, key: Tensor, mask: BlockMask, rows: Tensor, *, text_lengths: Tensor | None = None
) -> Tensor:
    """Returns the share of some rows' dense softmax mass on keys that the mask keeps, float32 `[B, H, R]`.

    Args:
        query, key: `[B, S, H, D]`.
        mask: shared by all heads or with one pattern per head.
        rows: query tokens, int64 `[R]`, as from `sample_rows`.
        text_lengths: valid text tokens of each sample, integers `[B]`, or None for all.

    Raises ValueError if tensors, rows and mask do not fit together.
    """
    out = torch.empty(query.shape[0], query.shape[2], len(rows), dtype=torch.float32, device=query.device)
    for chunk, kept in masked_chunks(query, key, rows, mask, text_lengths):
        weights = chunk.scores.softmax(-1)
        out[chunk.sample, chunk.head, chunk.places] = (weights * kept).sum(-1).clamp(max=1)
    return out


def kept_by(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[BlockMask],
    rows: Tensor,
    *,
    text_lengths: Tensor | None = None,
) -> list[Kept]:
    """Measures recall and output error of each mask, on scores computed once for all, in float32.

    Arguments and errors are as in `recall`, with `value` `[B, S, H, D]`. Raises ValueError also for no masks,
    or masks of several grids.
    """
    if len({mask.grid for mask in masks}) != 1:
        raise ValueError(f"masks must be of one grid, got {[str(mask.grid) for mask in masks]}")
    for mask in masks:
        _check_heads(mask, query)
    totals = torch.zeros(len(masks), 3, query.shape[0], query.shape[2], dtype=torch.float64)
    for chunk in score_chunks(query, key, rows, masks[0].grid, text_lengths):
        values = value[chunk.sample, :, chunk.head].float()
        weights = chunk.scores.softmax(-1)
        dense = weights @ values
        for number, mask in enumerate(masks):
            kept = _kept(mask, chunk)
            error = chunk.scores.masked_fill(~kept, -math.inf).softmax(-1) @ values - dense
            mass = (weights * kept).sum(-1).clamp(max=1).double().sum()
            sums = torch.stack([mass, error.double().square().sum(), dense.double().square().sum()])
            totals[number, :, chunk.sample, chunk.head] += sums.cpu()
    totals[:, 0] /= len(rows)
    totals[:, 1:] /= len(rows) * value.shape[-1]
    return [Kept(*measures) for measures in totals]


def score_chunks(
    query: Tensor, key: Tensor, rows: Tensor, grid: TokenGrid | None, text_lengths: Tensor | None
) -> Iterator[Chunk]:
    """Yields the scores of all samples and heads in turn, at most about `CHUNK` numbers at a time.

    Arguments and errors are as in `attention_rows`.
    """
    rows = _check(query, key, rows, grid)
    batch, tokens, heads, width = query.shape
    step = max(1, CHUNK // tokens)
    for sample in range(batch):
        limit = tokens if text_lengths is None else grid.video_tokens + int(text_lengths[sample])
        for head in range(heads):
            keys = key[sample, :, head].float()
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                chosen = query[sample, part.to(query.device), head].float() * width**-0.5
                scores = chosen @ keys.T
                scores[:, limit:] = -math.inf
                yield Chunk(sample, head, slice(start, start + len(part)), part, scores)


def masked_chunks(
    query: Tensor, key: Tensor, rows: Tensor, mask: BlockMask, text_lengths: Tensor | None
) -> Iterator[tuple[Chunk, Tensor]]:
    """Yields each chunk of `score_chunks` with the keys that the mask keeps for its rows, bool `[r, S]`.

    Arguments and errors are as in `recall`.
    """
    _check_heads(mask, query)
    for chunk in score_chunks(query, key, rows, mask.grid, text_lengths):
        yield chunk, _kept(mask, chunk)


def _kept(mask: BlockMask, chunk: Chunk) -> Tensor:
    blocks = mask.blocks if mask.heads is None else mask.blocks[chunk.head]
    kept = blocks[chunk.rows // mask.block_size].to(chunk.scores.device)
    return kept.repeat_interleave(mask.block_size, dim=-1)[:, : mask.grid.tokens]


def _check_heads(mask: BlockMask, query: Tensor) -> None:
    if mask.heads not in (None, query.shape[2]):
        raise ValueError(f"heads must be the {mask.heads} of the per-head mask, got {query.shape[2]}")


def _check(query: Tensor, key: Tensor, rows: Tensor, grid: TokenGrid | None) -> Tensor:
    """Checks the tensors and returns the rows on the CPU."""
    if query.ndim != 4 or key.shape != query.shape:
        raise ValueError(
            f"query and key must be [B, S, H, D] alike, got {list(query.shape)} and {list(key.shape)}"
        )
    tokens = query.shape[1]
    if grid is not None and grid.tokens != tokens:
        raise ValueError(f"sequence length must be the {grid.tokens} tokens of {grid}, got {tokens}")
    rows = torch.as_tensor(rows, dtype=torch.int64, device="cpu")
    limit = tokens if grid is None else grid.video_tokens
    if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= limit:
        raise ValueError(f"rows must be [R] video tokens from 0 to {limit - 1}, got {rows.tolist()[:8]}")
    return rows
