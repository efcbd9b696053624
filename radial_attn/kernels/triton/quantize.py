"""Quantises query, key and value to 8 bits in Triton, as the quantised forward reads them.

Queries get one scale a token. Keys get one scale a tile, after the mean key is subtracted; this shifts all
scores of a row equally and leaves the softmax unchanged (SageAttention, arXiv 2410.02367, section 4.2).
Values get one scale a channel (SageAttention2, arXiv 2411.10958, section 3.3) and are transposed, so the keys
of a product are contiguous. A value that is not finite makes its scale NaN, and the rows that meet it.
"""

import triton
import triton.language as tl

from .forward import load_tile

LEAST = tl.constexpr(1e-12)  # a scale is never zero


@triton.jit
def to_bits(numbers, out):
    """Converts `numbers` to the element type of `out`, int8 by rounding to the nearest."""
    if out.dtype.element_ty == tl.int8:
        bits = tl.where(numbers >= 0, numbers + 0.5, numbers - 0.5).to(tl.int8)
    else:
        bits = numbers.to(out.dtype.element_ty)
    return bits


@triton.jit
def store_rows(base, tile, first, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Writes `[ROWS, PADDED]` from token `first` on into a padded, contiguous `[tokens, PADDED]`."""
    at = (first + tl.arange(0, ROWS)).to(tl.int64) * PADDED
    tl.store(base + at[:, None] + tl.arange(0, PADDED)[None, :], tile)


@triton.jit
def quantize_queries_kernel(
    query, mean, out, scales, shifts, batch_stride, token_stride, head_stride, tokens, room, heads, scale,
    TOP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes `out` `[B, H, room, PADDED]`, float32 `scales` and `shifts` `[B, H, room]` of query.

    The query is first multiplied by `scale`. A shift is what the mean key, float32 `[B, H, WIDTH]`, adds to
    all scores of the row.
    """
    pair = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    queries = query + pair // heads * batch_stride + pair % heads * head_stride
    tile = load_tile(queries, 0, first, 0, token_stride, tokens, ROWS, WIDTH, PADDED, True, "")
    tile = tile.to(tl.float32) * scale
    factor = tl.maximum(tl.max(tl.abs(tile), 1), LEAST) / TOP + tl.sum(tile * 0.0, 1)
    store_rows(out + pair * room * PADDED, to_bits(tile / factor[:, None], out), first, ROWS, PADDED)
    lane = tl.arange(0, PADDED)
    means = tl.load(mean + pair * WIDTH + lane, mask=lane < WIDTH, other=0.0)
    rows = pair * room + first + tl.arange(0, ROWS)
    tl.store(scales + rows, factor)
    tl.store(shifts + rows, tl.sum(tile * means[None, :], 1))


@triton.jit
def quantize_keys_kernel(
    key, mean, out, scales, batch_stride, token_stride, head_stride, tokens, room, heads,
    TOP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes `out` `[B, H, room, PADDED]` and float32 `scales` `[B, H, room / ROWS]` of key less mean key."""
    pair = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    keys = key + pair // heads * batch_stride + pair % heads * head_stride
    tile = load_tile(keys, 0, first, 0, token_stride, tokens, ROWS, WIDTH, PADDED, True, "")
    lane = tl.arange(0, PADDED)
    means = tl.load(mean + pair * WIDTH + lane, mask=lane < WIDTH, other=0.0)
    inside = (first + tl.arange(0, ROWS) < tokens)[:, None]
    tile = tl.where(inside, tile.to(tl.float32) - means[None, :], 0.0)
    factor = tl.maximum(tl.max(tl.max(tl.abs(tile), 1), 0), LEAST) / TOP
    factor += tl.sum(tl.sum(tile * 0.0, 1), 0)
    store_rows(out + pair * room * PADDED, to_bits(tile / factor, out), first, ROWS, PADDED)
    tl.store(scales + pair * tl.num_programs(0) + tl.program_id(0), factor)


@triton.jit
def quantize_values_kernel(
    value, tops, out, batch_stride, token_stride, head_stride, tokens, room, heads,
    TOP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes `out` `[B, H, PADDED, room]`: value over its largest magnitude a channel, `[B, H, WIDTH]`."""
    pair = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    values = value + pair // heads * batch_stride + pair % heads * head_stride
    tile = load_tile(values, 0, first, 0, token_stride, tokens, ROWS, WIDTH, PADDED, True, "")
    lane = tl.arange(0, PADDED)
    top = tl.load(tops + pair * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    tile = tile.to(tl.float32) * (TOP / tl.maximum(top, LEAST))[None, :]
    at = out + (pair * PADDED + lane.to(tl.int64)) * room + first
    tl.store(at[:, None] + tl.arange(0, ROWS)[None, :], to_bits(tile, out).T)
