"""Computes the backward of block-sparse flash attention in Triton.

Gradients of queries walk the key tiles of a query tile. Gradients of keys and values walk the query tiles of
a key tile. So nothing is added atomically.

Algorithm: Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2, over the listed tiles only.
"""

import triton
import triton.language as tl

from .forward import INFINITY, LOG2E, find_work, kept_pairs, load_tile, program_tile, store_tile


@triton.jit
def row_products_kernel(
    out, grad, products, tokens, heads, batch_stride, token_stride, head_stride,
    grad_batch, grad_token, grad_head, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Sums output x gradient over the width, float32 `[B, H, S]`."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    first = tl.program_id(0) * ROWS
    outs = out + batch * batch_stride + head * head_stride
    grads = grad + batch * grad_batch + head * grad_head
    o = load_tile(outs, 0, first, head, token_stride, tokens, ROWS, WIDTH, PADDED, True, "")
    g = load_tile(grads, 0, first, head, grad_token, tokens, ROWS, WIDTH, PADDED, True, "")
    rows = first + tl.arange(0, ROWS)
    sums = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(products + pair.to(tl.int64) * tokens + rows, sums, mask=rows < tokens)


@triton.jit
def row_weights(lse, pair, rows, tokens):
    """Loads the log-sum-exp of some rows in base 2; +inf, which makes weights 0, for rows without keys."""
    sums = tl.load(lse + pair.to(tl.int64) * tokens + rows, mask=rows < tokens, other=-INFINITY) * LOG2E
    return tl.where(sums == -INFINITY, INFINITY, sums)


@triton.jit
def query_gradient(
    total, query, grad, sums, products, keys, values, key_stride, value_stride, starts, patterns, first, last,
    tokens, limit, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, SIZE: tl.constexpr, MIXED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds what the listed key tiles `first .. last - 1` give to the gradient of a query tile."""
    start = tl.load(starts + first)
    for i in tl.range(first, last):
        key = load_tile(keys, 0, start, 0, key_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, "")
        value = load_tile(values, 0, start, 0, value_stride, tokens, COLUMNS, WIDTH, PADDED, MIXED, "")
        weights = tl.exp2(tl.dot(query, key.T, input_precision="ieee") * scale - sums[:, None])
        if MIXED:
            columns = start + tl.arange(0, COLUMNS)
            keep = kept_pairs(patterns, i, columns, limit, ROWS, COLUMNS, SIZE, BLOCKS, False)
            weights = tl.where(keep, weights, 0.0)
        change = weights * (tl.dot(grad, value.T, input_precision="ieee") - products[:, None])
        total = tl.dot(change.to(key.dtype), key, total, input_precision="ieee")
        start = tl.load(starts + i + 1)
    return total


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, result, lse, products, offsets, starts, patterns, lengths,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head, grad_batch, grad_token, grad_head,
    result_batch, result_token, result_head, tokens, heads, scale, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, PER_HEAD: tl.constexpr, MIXED: tl.constexpr, BLOCKS: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of one query tile of one head.

    `factor` is the scale of the scores; `scale` is `factor` times log2(e).
    """
    batch, head, limit, whole, mixed, end = find_work(
        offsets, lengths, tokens, heads, PER_HEAD, LENGTHS, False
    )
    pair = tl.program_id(1)
    first = program_tile(False) * ROWS
    rows = first + tl.arange(0, ROWS)
    queries = query + batch * query_batch + head * query_head
    grads = grad + batch * grad_batch + head * grad_head
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    q = load_tile(queries, 0, first, head, query_token, tokens, ROWS, WIDTH, PADDED, True, "")
    g = load_tile(grads, 0, first, head, grad_token, tokens, ROWS, WIDTH, PADDED, True, "")
    sums = row_weights(lse, pair, rows, tokens)
    dots = tl.load(products + pair.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)
    total = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    total = query_gradient(
        total, q, g, sums, dots, keys, values, key_token, value_token, starts, patterns, whole, mixed,
        tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE, False, BLOCKS,
    )  # fmt: skip
    if MIXED:
        total = query_gradient(
            total, q, g, sums, dots, keys, values, key_token, value_token, starts, patterns, mixed, end,
            tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE, True, BLOCKS,
        )  # fmt: skip
    results = result + batch * result_batch + head * result_head
    store_tile(results, total * factor, first, result_token, tokens, ROWS, WIDTH, PADDED)


@triton.jit
def key_gradients(
    key_total, value_total, key, value, queries, grads, lse, products, pair, query_stride, grad_stride,
    starts, patterns, first, last, columns, tokens, limit, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, MIXED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds what the listed query tiles `first .. last - 1` give to the gradients of a key tile."""
    start = tl.load(starts + first)
    for i in tl.range(first, last):
        rows = start + tl.arange(0, ROWS)
        query = load_tile(queries, 0, start, 0, query_stride, tokens, ROWS, WIDTH, PADDED, MIXED, "")
        grad = load_tile(grads, 0, start, 0, grad_stride, tokens, ROWS, WIDTH, PADDED, MIXED, "")
        sums = row_weights(lse, pair, rows, tokens)
        dots = tl.load(products + pair.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)
        # [COLUMNS, ROWS], so that the products below read weights and changes as they lie in the registers
        weights = tl.exp2(tl.dot(key, query.T, input_precision="ieee") * scale - sums[None, :])
        if MIXED:
            keep = kept_pairs(patterns, i, columns, limit, ROWS, COLUMNS, SIZE, BLOCKS, True)
            weights = tl.where(keep, weights, 0.0)
        value_total = tl.dot(weights.to(grad.dtype), grad, value_total, input_precision="ieee")
        change = weights * (tl.dot(value, grad.T, input_precision="ieee") - dots[None, :])
        key_total = tl.dot(change.to(query.dtype), query, key_total, input_precision="ieee")
        start = tl.load(starts + i + 1)
    return key_total, value_total


@triton.jit
def key_gradients_kernel(
    query, key, value, grad, key_result, value_result, lse, products, offsets, starts, patterns, lengths,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head, grad_batch, grad_token, grad_head,
    result_batch, result_token, result_head, tokens, heads, scale, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, PER_HEAD: tl.constexpr, MIXED: tl.constexpr, BLOCKS: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one tile of keys and values of one head; both results have equal strides."""
    batch, head, limit, whole, mixed, end = find_work(
        offsets, lengths, tokens, heads, PER_HEAD, LENGTHS, True
    )
    pair = tl.program_id(1)
    first = program_tile(True) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    queries = query + batch * query_batch + head * query_head
    grads = grad + batch * grad_batch + head * grad_head
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    k = load_tile(keys, 0, first, head, key_token, tokens, COLUMNS, WIDTH, PADDED, True, "")
    v = load_tile(values, 0, first, head, value_token, tokens, COLUMNS, WIDTH, PADDED, True, "")
    key_total = tl.zeros([COLUMNS, PADDED], dtype=tl.float32)
    value_total = tl.zeros([COLUMNS, PADDED], dtype=tl.float32)
    key_total, value_total = key_gradients(
        key_total, value_total, k, v, queries, grads, lse, products, pair, query_token, grad_token, starts,
        patterns, whole, mixed, columns, tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE, False,
        BLOCKS,
    )  # fmt: skip
    if MIXED:
        key_total, value_total = key_gradients(
            key_total, value_total, k, v, queries, grads, lse, products, pair, query_token, grad_token,
            starts, patterns, mixed, end, columns, tokens, limit, scale, ROWS, COLUMNS, WIDTH, PADDED, SIZE,
            True, BLOCKS,
        )  # fmt: skip
    at = batch * result_batch + head * result_head
    store_tile(key_result + at, key_total * factor, first, result_token, tokens, COLUMNS, WIDTH, PADDED)
    store_tile(value_result + at, value_total, first, result_token, tokens, COLUMNS, WIDTH, PADDED)
