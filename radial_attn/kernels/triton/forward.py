"""Computes the forward of block-sparse flash attention in Triton: one query tile a program.

A program walks the list of its key tiles (tiles.py), the whole ones without any masking, then the mixed ones,
with an online softmax in base 2. Algorithm: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 1, over the
listed tiles only. With a far field (far_field.py) it first walks the mean keys of all blocks.
"""

import triton
import triton.language as tl

from . import configs

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(configs.LOG2E)
FAR_TILE = tl.constexpr(configs.FAR_TILE)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def head_of(
    tensor, batch, head, tokens, batch_stride, token_stride, head_stride, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Returns one sample's head of `[B, S, H, D]` as `load_tile` takes it, in tiles of `ROWS` tokens."""
    part = tensor
    if DESCRIPTOR != "whole":
        part = tensor + batch * batch_stride + head * head_stride
    if DESCRIPTOR == "head":
        part = tl.make_tensor_descriptor(part, [tokens, WIDTH], [token_stride, 1], [ROWS, PADDED])
    return part


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
    """Loads `[TOKENS, PADDED]` from token `start` on; zeros beyond `WIDTH` and, if `BOUNDED`, `limit`.

    `tensor` is a tensor descriptor of `[B, S, H, D]` ("whole"), or a descriptor ("head") or pointer ("") of
    one sample's head.
    """
    if DESCRIPTOR == "whole":
        tile = tensor.load([batch.to(tl.int32), start, head.to(tl.int32), 0]).reshape([TOKENS, PADDED])
    elif DESCRIPTOR == "head":
        tile = tensor.load([start, 0])
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
def store_tile(
    base, tile, start, token_stride, tokens, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """Writes `[ROWS, PADDED]` from token `start` on, up to `tokens` and `WIDTH`."""
    token, lane = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = base + start.to(tl.int64) * token_stride + token[:, None] * token_stride + lane[None, :]
    inside = (start + token < tokens)[:, None] & (lane < WIDTH)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def program_tile(BY_KEY: tl.constexpr):
    """Returns the tile of this program, a tile of keys if `BY_KEY`.

    Tiles with the most work come first: the text, at the end, and the keys of the first frame (the sink). So
    query tiles go from the end, and key tiles begin with the last sixteenth and go on from the start.
    """
    program, count = tl.program_id(0), tl.num_programs(0)
    return (program + count - count // 16) % count if BY_KEY else count - 1 - program


@triton.jit
def find_work(
    offsets, lengths, tokens, heads, PER_HEAD: tl.constexpr, LENGTHS: tl.constexpr, BY_KEY: tl.constexpr
):
    """Returns this program's sample, head, tokens that count, and the bounds of its lists of tiles.

    Sample and head are int64, because a stride times either may exceed 2^31.
    """
    tile, pair = program_tile(BY_KEY), tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    limit = tokens
    if LENGTHS:
        limit = tl.load(lengths + batch)
    pattern = pair % heads if PER_HEAD else 0
    listed = offsets + (pattern * tl.num_programs(0) + tile) * 3
    return batch, head, limit, tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)


@triton.jit
def kept_pairs(
    patterns,
    place,
    columns,
    limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """Marks the token pairs of a mixed tile that count: keys below `limit`; in kept blocks if `BLOCKS`.

    `patterns[place]` holds the blocks of the tile, `SIZE` tokens each way, as bits (tiles.py). The result is
    `[ROWS, COLUMNS]`, or transposed if `BY_KEY`.
    """
    across: tl.constexpr = COLUMNS // SIZE if COLUMNS > SIZE else 1
    key: tl.constexpr = 0 if BY_KEY else 1  # the axis of the keys
    keep = tl.expand_dims(columns < limit, 1 - key)
    if BLOCKS:
        line = tl.arange(0, ROWS) // SIZE * across
        bits = (tl.load(patterns + place) >> line.to(tl.int64)).to(tl.int32)
        block = tl.expand_dims(tl.arange(0, COLUMNS) // SIZE, 1 - key)
        keep = keep & (((tl.expand_dims(bits, key) >> block) & 1) != 0)
    return keep


@triton.jit
def weigh(scores, scale, wide_scale, peak, total, MIXED: tl.constexpr, BOOST: tl.constexpr):
    """Takes one step of the online softmax, in base 2.

    Returns the weights of a tile times `2^BOOST`, the factor by which earlier sums shrink, the new maximum
    and the new sum. `scale` is a number, or one for each row; `wide_scale` then holds it as a column.
    """
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = higher
    if MIXED:  # a row without keys so far: exp2(-inf) instead of exp2(-inf + inf)
        base = tl.where(higher == -INFINITY, 0.0, higher)
    weights = tl.exp2(scores * wide_scale - (base - BOOST)[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def finish(acc, total, peak, rows, limit):
    """Returns normalised output and natural log-sum-exp; zeros in rows without keys and from `limit` on."""
    seen = (total != 0) & (rows < limit)  # true for NaN, which has to come out
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / total[:, None], 0.0)
    return out, tl.where(seen, (peak + tl.log2(total)) * LN2, -INFINITY)


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
    patterns,
    first,
    last,
    tokens,
    limit,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Adds the listed key tiles `first .. last - 1` to the running sum, its weight and the maximum.

    The start of a tile is loaded one tile ahead, here and in the other kernels: the compiler holds as many
    tiles as there are stages only if their addresses do not come from a load of the same turn.
    """
    ahead = tl.load(starts + first)
    for i in tl.range(first, last, warp_specialize=SPECIALIZE):
        start = tl.load(starts + i) if SPECIALIZE else ahead  # carried starts stop the specialising pass
        key = load_tile(
            keys, batch, start, head, key_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, DESCRIPTOR
        )
        scores = tl.dot(query, key.T, input_precision="ieee")
        if MIXED:
            columns = start + tl.arange(0, COLUMNS)
            keep = kept_pairs(patterns, i, columns, limit, ROWS, COLUMNS, SIZE, BLOCKS, False)
            scores = tl.where(keep, scores, -INFINITY)
        weights, shrink, peak, total = weigh(scores, scale, scale, peak, total, MIXED, 0)
        value = load_tile(
            values, batch, start, head, value_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, DESCRIPTOR
        )
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        if not SPECIALIZE:
            ahead = tl.load(starts + i + 1)
    return acc, total, peak


@triton.jit
def attend_far(
    acc, total, peak, query, key, value, bias, slope, batch, head, first, count, heads, tokens, scale,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Adds `count` mean keys, then the first-order term times their weight, to empty sums.

    The rows begin at `first`. `bias` is `[Q, count]` of this head.
    """
    step = heads * WIDTH
    keys = head_of(key, batch, head, count, count * step, step, WIDTH, FAR_TILE, WIDTH, PADDED, DESCRIPTOR)
    values = head_of(
        value, batch, head, count, count * step, step, WIDTH, FAR_TILE, WIDTH, PADDED, DESCRIPTOR
    )
    blocks: tl.constexpr = ROWS // SIZE if ROWS > SIZE else 1
    block = tl.minimum(first // SIZE + tl.arange(0, blocks), (tokens - 1) // SIZE)[:, None]
    for i in tl.range(0, count, FAR_TILE, num_stages=2):
        start = tl.cast(i, tl.int32)  # a Python integer in the interpreter
        tile = load_tile(keys, batch, start, head, step, count, FAR_TILE, WIDTH, PADDED, True, DESCRIPTOR)
        columns = (start + tl.arange(0, FAR_TILE))[None, :]
        logs = tl.load(bias + block * count + columns, mask=columns < count, other=-INFINITY)
        logs = tl.broadcast_to(logs[:, None, :], [blocks, ROWS // blocks, FAR_TILE])
        scores = tl.dot(query, tile.T, input_precision="ieee") * scale
        scores += logs.reshape([ROWS, FAR_TILE]) * LOG2E
        weights, shrink, peak, total = weigh(scores, 1.0, 1.0, peak, total, True, 0)
        tile = load_tile(values, batch, start, head, step, count, FAR_TILE, WIDTH, PADDED, True, DESCRIPTOR)
        acc = tl.dot(weights.to(tile.dtype), tile, acc * shrink[:, None], input_precision="ieee")
    if slope is not None:
        matrix = slope + (batch * heads + head) * WIDTH * WIDTH
        row = tl.cast(0, tl.int32)
        tile = load_tile(matrix, batch, row, head, WIDTH, WIDTH, PADDED, WIDTH, PADDED, WIDTH != PADDED, "")
        weight = tl.where(total == 0, 1.0, total)[:, None]  # divided by and multiplied: one accumulator
        acc = tl.dot(query, tile, acc / weight, input_precision="ieee") * total[:, None]
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
    patterns,
    lengths,
    row_lengths,
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
    key_tokens,
    heads,
    scale,
    far_key,
    far_value,
    far_bias,
    far_slope,
    far_tokens,
    bias_batch,
    bias_head,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    LENGTHS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Computes output `[B, S, H, D]` and natural log-sum-exp `[B, H, S]` of one query tile of one head.

    `scale` is the positive scale of the scores times log2(e). `tokens` are rows; `lengths` and `row_lengths`
    are the keys and rows of each sample that count. The far field, if there is one, has contiguous means
    `[B, far_tokens, H, D]`, bias and, or None, `far_slope` times the scale of the scores, `[B, H, D, D]`.
    """
    batch, head, limit, whole, mixed, end = find_work(
        offsets, lengths, key_tokens, heads, PER_HEAD, LENGTHS, False
    )
    row_limit = tokens
    if LENGTHS:
        row_limit = tl.load(row_lengths + batch)
    # rows get a separate value: if warps specialise, the compiler (3.6, 3.7) moves the coordinate at which a
    # descriptor is read to the rows of each group of warps, and with it all that is computed from that value
    first = (program_tile(False).to(tl.int64) * ROWS).to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    source: tl.constexpr = "head" if DESCRIPTOR == "head" else ""
    # fmt: off
    queries = head_of(
        query, batch, head, tokens, query_batch, query_token, query_head, ROWS, WIDTH, PADDED, source
    )
    keys = head_of(
        key, batch, head, key_tokens, key_batch, key_token, key_head, COLUMNS, WIDTH, PADDED, DESCRIPTOR
    )
    values = head_of(
        value, batch, head, key_tokens, value_batch, value_token, value_head, COLUMNS, WIDTH, PADDED,
        DESCRIPTOR,
    )
    at = program_tile(False) * ROWS
    q = load_tile(queries, batch, at, head, query_token, tokens, ROWS, WIDTH, PADDED, True, source)
    acc = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    peak = tl.full([ROWS], -INFINITY, dtype=tl.float32)
    if far_key is not None:
        acc, total, peak = attend_far(
            acc, total, peak, q, far_key, far_value, far_bias + batch * bias_batch + head * bias_head,
            far_slope, batch, head, first, far_tokens, heads, tokens, scale, ROWS, WIDTH, PADDED, SIZE,
            DESCRIPTOR,
        )
    if SPECIALIZE:  # the compiler takes one loop only: whole tiles are masked as well if any is mixed
        acc, total, peak = attend(
            acc, total, peak, q, keys, values, batch, head, key_token, value_token, starts, patterns, whole,
            end, key_tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE, MIXED, BLOCKS, DESCRIPTOR,
            True,
        )
    else:
        acc, total, peak = attend(
            acc, total, peak, q, keys, values, batch, head, key_token, value_token, starts, patterns, whole,
            mixed, key_tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE, False, BLOCKS, DESCRIPTOR,
            False,
        )
        if MIXED:
            acc, total, peak = attend(
                acc, total, peak, q, keys, values, batch, head, key_token, value_token, starts, patterns,
                mixed, end, key_tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE, True, BLOCKS,
                DESCRIPTOR, False,
            )
    # fmt: on
    result, sums = finish(acc, total, peak, rows, row_limit)
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + rows, sums, mask=rows < tokens)
    outs = out + batch * out_batch + head * out_head
    store_tile(outs, result, first, out_token, tokens, ROWS, WIDTH, PADDED)
