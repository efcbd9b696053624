"""Computes the forward of block-sparse attention on 8-bit operands (quantize.py) in Triton, fp32 sums.

The scores come from int8 or fp8 products. The weights multiply the values in fp8 if the tensor cores have it,
else in the 16 bits of the values. Algorithm: SageAttention2, arXiv 2411.10958, over the listed tiles only.
"""

import triton
import triton.language as tl

from .forward import INFINITY, LN2, find_work, finish, kept_pairs, load_tile, program_tile, store_tile, weigh

BOOST = tl.constexpr(8)  # weights reach 2^8, well within fp8 e4m3 (448), before they are rounded


@triton.jit
def load_keys(keys, row, start, COLUMNS: tl.constexpr, PADDED: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """Loads `[COLUMNS, PADDED]` of `[rows, PADDED]` from row `row + start` on."""
    if DESCRIPTOR:
        tile = keys.load([(row + start).to(tl.int32), 0])
    else:
        token = (row + start + tl.arange(0, COLUMNS)).to(tl.int64)
        tile = tl.load(keys + token[:, None] * PADDED + tl.arange(0, PADDED)[None, :])
    return tile


@triton.jit
def load_channels(
    values, row, start, room, COLUMNS: tl.constexpr, PADDED: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """Loads `[PADDED, COLUMNS]` of `[rows, room]` from row `row` and token `start` on."""
    if DESCRIPTOR:
        tile = values.load([row.to(tl.int32), start])
    else:
        channel = (row + tl.arange(0, PADDED)).to(tl.int64) * room + start
        tile = tl.load(values + channel[:, None] + tl.arange(0, COLUMNS)[None, :])
    return tile


@triton.jit
def quantized_attend(
    acc, total, peak, query, query_scale, keys, key_scales, values, pair, room, value_stride, starts,
    patterns, first, last, tokens, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, SIZE: tl.constexpr, MIXED: tl.constexpr, BLOCKS: tl.constexpr,
    FP8_VALUES: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Adds the listed key tiles `first .. last - 1` to the running sum, its weight and the maximum."""
    start = tl.load(starts + first)
    for i in tl.range(first, last):
        key = load_keys(keys, pair * room, start, COLUMNS, PADDED, DESCRIPTOR)
        scores = tl.dot(query, key.T).to(tl.float32)
        scale = query_scale * tl.load(key_scales + start // COLUMNS)
        if MIXED:
            columns = start + tl.arange(0, COLUMNS)
            keep = kept_pairs(patterns, i, columns, limit, ROWS, COLUMNS, SIZE, BLOCKS, False)
            scores = tl.where(keep, scores, -INFINITY)
        if FP8_VALUES:
            weights, shrink, peak, total = weigh(scores, scale, scale[:, None], peak, total, MIXED, BOOST)
            value = load_channels(values, pair * PADDED, start, room, COLUMNS, PADDED, DESCRIPTOR)
            # tensor cores keep few bits of a sum of fp8 products: sum one tile, then add it in fp32
            part = tl.dot(weights.to(value.dtype), value.T, max_num_imprecise_acc=COLUMNS)
            acc = acc * shrink[:, None] + part
        else:
            weights, shrink, peak, total = weigh(scores, scale, scale[:, None], peak, total, MIXED, 0)
            value = load_tile(values, 0, start, 0, value_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, "")
            acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])
        start = tl.load(starts + i + 1)
    return acc, total, peak


@triton.jit
def quantized_forward_kernel(
    query, key, value, query_scales, shifts, key_scales, tops, out, lse, offsets, starts, patterns, lengths,
    value_batch, value_token, value_head, out_batch, out_token, out_head, tokens, room, heads,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, PER_HEAD: tl.constexpr, MIXED: tl.constexpr, BLOCKS: tl.constexpr,
    LENGTHS: tl.constexpr, FP8_VALUES: tl.constexpr, TOP: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Computes output `[B, S, H, D]` and natural log-sum-exp `[B, H, S]` of one query tile of one head.

    query and key are `[B, H, room, PADDED]`. value is `[B, H, PADDED, room]` with the largest magnitude of
    each channel, `tops`, scaled to `TOP`; or it is the unchanged input. Scales and shifts are in base 2.
    """
    batch, head, limit, whole, mixed, end = find_work(
        offsets, lengths, tokens, heads, PER_HEAD, LENGTHS, False
    )
    pair = tl.program_id(1).to(tl.int64)
    first = program_tile(False) * ROWS
    rows = first + tl.arange(0, ROWS)
    q = load_keys(query, pair * room, first, ROWS, PADDED, False)
    query_scale = tl.load(query_scales + pair * room + rows)
    scales = key_scales + pair * (room // COLUMNS)
    values = value
    if not FP8_VALUES:
        values = value + batch * value_batch + head * value_head
    acc = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    peak = tl.full([ROWS], -INFINITY, dtype=tl.float32)
    acc, total, peak = quantized_attend(
        acc, total, peak, q, query_scale, key, scales, values, pair, room, value_token, starts, patterns,
        whole, mixed, tokens, limit, ROWS, COLUMNS, WIDTH, PADDED, SIZE, False, BLOCKS, FP8_VALUES,
        DESCRIPTOR,
    )  # fmt: skip
    if MIXED:
        acc, total, peak = quantized_attend(
            acc, total, peak, q, query_scale, key, scales, values, pair, room, value_token, starts, patterns,
            mixed, end, tokens, limit, ROWS, COLUMNS, WIDTH, PADDED, SIZE, True, BLOCKS, FP8_VALUES,
            DESCRIPTOR,
        )  # fmt: skip
    result, sums = finish(acc, total, peak, rows, limit)
    lane = tl.arange(0, PADDED)
    if FP8_VALUES:
        top = tl.load(tops + pair * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
        result = result * (top / TOP)[None, :]
        sums = sums - BOOST * LN2
    sums += tl.load(shifts + pair * room + rows) * LN2
    tl.store(lse + pair * tokens + rows, sums, mask=rows < tokens)
    outs = out + batch * out_batch + head * out_head
    store_tile(outs, result, first, out_token, tokens, ROWS, WIDTH, PADDED)
