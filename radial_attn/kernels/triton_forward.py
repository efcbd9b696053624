"""Triton: forward of block-sparse flash attention, one query tile a program, online softmax in base 2.

A program walks the list of its key tiles (radial_attn/tiles.py): the whole ones without any masking, then the
mixed ones. Algorithm: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1, over the listed tiles only.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_tile(
    tensor,
    batch,
    start,
    head,
    token_stride,
    limit,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BOUNDED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """`[TOKENS, PADDED]` from token `start` on, zeros beyond `WIDTH` and, if `BOUNDED`, from `limit` on.

    `tensor` is a tensor descriptor of `[B, S, H, D]`, or a pointer to the first token of sample and head.
    """
    if DESCRIPTOR:
        tile = tensor.load([batch, start, head, 0]).reshape([TOKENS, PADDED])
    else:
        token = tl.arange(0, TOKENS)
        lane = tl.arange(0, PADDED)
        at = tensor + start.to(tl.int64) * token_stride + token[:, None] * token_stride + lane[None, :]
        if BOUNDED:
            tile = tl.load(at, mask=(start + token < limit)[:, None] & (lane < WIDTH)[None, :], other=0.0)
        elif WIDTH != PADDED:
            tile = tl.load(at, mask=(lane < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def kept_pairs(
    table,
    blocks,
    rows,
    columns,
    tokens,
    limit,
    SIZE: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Which token pairs of a mixed tile count: keys below `limit`, and kept by the block table where read."""
    keep = (columns < limit)[None, :]
    if TABLE:
        inside = (rows < tokens)[:, None] & keep
        at = table + (rows // SIZE)[:, None] * blocks + (columns // SIZE)[None, :]
        keep = tl.load(at, mask=inside, other=0) != 0
    return keep


@triton.jit
def attend(
    acc,
    total,
    peak,
    query,
    keys,
    values,
    batch,
    head,
    key_stride,
    value_stride,
    starts,
    first,
    last,
    rows,
    tokens,
    limit,
    table,
    blocks,
    scale,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    MIXED: tl.constexpr,
    TABLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Adds the listed key tiles `first .. last - 1` to the running sum, its weight and the maximum."""
    for i in tl.range(first, last, warp_specialize=SPECIALIZE):
        start = tl.load(starts + i)
        key = load_tile(
            keys, batch, start, head, key_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, DESCRIPTOR
        )
        scores = tl.dot(query, key.T, input_precision="ieee")
        if MIXED:
            columns = start + tl.arange(0, COLUMNS)
            keep = kept_pairs(table, blocks, rows, columns, tokens, limit, SIZE, TABLE)
            scores = tl.where(keep, scores, -INFINITY)
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = higher
        if MIXED:  # a row without keys so far: exp2(-inf) instead of exp2(-inf + inf)
            base = tl.where(higher == -INFINITY, 0.0, higher)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        value = load_tile(
            values, batch, start, head, value_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, DESCRIPTOR
        )
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    return acc, total, peak


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    offsets,
    starts,
    table,
    lengths,
    query_batch,
    query_token,
    query_head,
    key_batch,
    key_token,
    key_head,
    value_batch,
    value_token,
    value_head,
    out_batch,
    out_token,
    out_head,
    tokens,
    heads,
    blocks,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TABLE: tl.constexpr,
    LENGTHS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Output `[B, S, H, D]` and natural log-sum-exp `[B, H, S]` of one query tile of one head.

    `scale` is that of the scores times log2(e) and positive; `lengths` the tokens of each sample that count.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    pattern = head if PER_HEAD else 0
    limit = tokens
    if LENGTHS:
        limit = tl.load(lengths + batch)
    first = tile * ROWS
    rows = first + tl.arange(0, ROWS)
    queries = query + batch.to(tl.int64) * query_batch + head * query_head
    q = load_tile(queries, batch, first, head, query_token, tokens, ROWS, WIDTH, PADDED, True, False)
    if DESCRIPTOR:
        keys = key
        values = value
    else:
        keys = key + batch.to(tl.int64) * key_batch + head * key_head
        values = value + batch.to(tl.int64) * value_batch + head * value_head
    acc = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    peak = tl.full([ROWS], -INFINITY, dtype=tl.float32)
    listed = offsets + (pattern * tl.num_programs(0) + tile) * 3
    whole, mixed, end = tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    table += pattern * blocks * blocks
    # fmt: off
    acc, total, peak = attend(
        acc, total, peak, q, keys, values, batch, head, key_token, value_token, starts, whole, mixed, rows,
        tokens, limit, table, blocks, scale, COLUMNS, WIDTH, PADDED, SIZE, False, TABLE, DESCRIPTOR,
        SPECIALIZE,
    )
    acc, total, peak = attend(
        acc, total, peak, q, keys, values, batch, head, key_token, value_token, starts, mixed, end, rows,
        tokens, limit, table, blocks, scale, COLUMNS, WIDTH, PADDED, SIZE, True, TABLE, DESCRIPTOR, False,
    )
    # fmt: on
    seen = (total > 0) & (rows < limit)
    acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    sums = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, -INFINITY)
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + rows, sums, mask=rows < tokens)
    lane = tl.arange(0, PADDED)
    at = out + batch.to(tl.int64) * out_batch + head * out_head + first.to(tl.int64) * out_token
    at += tl.arange(0, ROWS)[:, None] * out_token + lane[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (lane < WIDTH)[None, :])
