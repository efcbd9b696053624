"""Runs a plan of rectangles: dense attention on each, merged through the log-sum-exp; and its gradients.

The keys of a rectangle are gathered, or viewed if they are consecutive. The backward gathers again instead
of keeping copies. `dense` is one of the functions below, for the CPU or for any device.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Group, Piece, Span

Tensors = Sequence[Tensor]


def forward_plan(
    tensors: Tensors,
    plan: tuple[Group, ...],
    size: int,
    limit: int,
    dense: Callable,
    *,
    key_limit: int | None = None,
) -> Tensors:
    """Returns output `[B, S, H, D]` and log-sum-exp `[B, S, H]`: zeros and -inf from position `limit` on.

    `key_limit`: the number of key tokens that count, if it is not `limit`.
    """
    limits = limit, limit if key_limit is None else key_limit
    query = tensors[0]
    batch, length, heads, width = query.shape
    count = -(-length // size)
    out = query.new_zeros(batch, count, size, heads, width)
    lse = query.new_full((batch, count, size, heads), -torch.inf, dtype=torch.float32)
    for group in plan:
        if not group.merge:
            for piece in group.pieces:
                parts = _attend(piece, tensors, size, limits, dense)
                _store((out, lse), piece.rows, parts)
            continue
        rows = group.rows.blocks.shape[1]
        partial = (
            query.new_zeros(batch, rows, size, heads, width, dtype=torch.float32),
            query.new_full((batch, rows, size, heads), -torch.inf, dtype=torch.float32),
        )
        for piece in group.pieces:
            _merge(partial, piece.slots, _attend(piece, tensors, size, limits, dense))
        _store((out, lse), group.rows, partial)
    flat = out.flatten(1, 2)[:, :length], lse.flatten(1, 2)[:, :length]
    return [x.contiguous() for x in flat]


def _attend(
    piece: Piece, tensors: Tensors, size: int, limits: tuple[int, int], dense: Callable
) -> Tensors | None:
    """Computes attention of a piece in whole blocks, `[B, G r, size, H, D]`, and log-sum-exp, without `D`."""
    query, key, value = tensors
    rows, keys = piece.rows.tokens(size, limits[0]), piece.keys.tokens(size, limits[1])
    if not rows or not keys:
        return None
    by_key = (_take(x, piece.keys, size, keys) for x in (key, value))
    out, lse = dense(_take(query, piece.rows, size, rows), *by_key)
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    shape = len(query), piece.rows.blocks.numel(), size
    missing = piece.rows.blocks.shape[1] * size - rows
    if missing:
        out = F.pad(out, (0, 0, 0, 0, 0, missing))
        lse = F.pad(lse, (0, 0, 0, missing), value=-torch.inf)
    return out.reshape(*shape, *out.shape[2:]), lse.reshape(*shape, lse.shape[2])


def _take(x: Tensor, span: Span, size: int, tokens: int) -> Tensor:
    """Gathers the first `tokens` of each rectangle's blocks, `[B G, H, tokens, D]`; a run is only viewed."""
    if span.first is not None:
        return x[:, span.first * size : span.first * size + tokens].transpose(1, 2)
    index = (span.blocks.unsqueeze(-1) * size + torch.arange(size, device=x.device)).flatten(1)
    if len(index) > 1 or x.element_size() < 4:
        taken = x.index_select(1, index[:, :tokens].flatten())
        return taken.view(-1, tokens, *x.shape[2:]).transpose(1, 2)
    # float32 products are faster if the keys of each head are contiguous
    return x.transpose(1, 2).index_select(2, index[0, :tokens])


def _store(targets: Tensors, span: Span, parts: Tensors | None) -> None:
    """Writes whole blocks, `[B, G r, size, ...]`, to their blocks in `[B, blocks, size, ...]`."""
    for target, part in zip(targets, parts or (), strict=False):
        if span.first is not None:
            target[:, span.first : span.first + part.shape[1]] = part
        else:
            target.index_copy_(1, span.blocks.flatten(), part.to(target.dtype))


def _merge(partial: Tensors, slots: Span, parts: Tensors | None) -> None:
    """Adds attention over further keys to the sum over earlier ones, weighted by their log-sum-exp."""
    if parts is None:
        return
    run = slots.first is not None
    index = slice(slots.first, slots.first + slots.blocks.numel()) if run else slots.blocks.flatten()
    out, lse = (x[:, index] for x in partial)
    # exp(new) / (exp(old) + exp(new)); if neither row has keys, both are -inf
    weight = torch.sigmoid(parts[1] - lse).nan_to_num_(nan=0.0).unsqueeze(-1)
    out.lerp_(parts[0].to(out.dtype), weight)
    total = torch.logaddexp(lse, parts[1])
    if run:
        lse.copy_(total)
        return
    partial[0].index_copy_(1, index, out)
    partial[1].index_copy_(1, index, total)


def backward_plan(
    tensors: Tensors, plan: tuple[Group, ...], size: int, limit: int, dense: Callable
) -> Tensors:
    """Returns gradients of query, key and value, `[B, S, H, D]`, summed in float32 over the rectangles."""
    grad, query, key, value, out, lse = tensors
    # exp(score - lse) of a row without keys: exp(-inf - inf) is 0, exp(-inf + inf) would be NaN
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    batch, length, heads, width = query.shape
    shape = batch, -(-length // size), size, heads, width
    sums = [query.new_zeros(shape, dtype=torch.float32) for _ in range(3)]
    for piece in (piece for group in plan for piece in group.pieces):
        rows, keys = piece.rows.tokens(size, limit), piece.keys.tokens(size, limit)
        if not rows or not keys:
            continue
        by_row = [_take(x, piece.rows, size, rows) for x in (grad, out, lse.unsqueeze(-1), query)]
        by_key = [_take(x, piece.keys, size, keys) for x in (key, value)]
        spans = piece.rows, piece.keys, piece.keys
        for total, span, part in zip(sums, spans, dense(*by_row, *by_key), strict=True):
            _add(total, span, part)
    return [x.flatten(1, 2)[:, :length].to(query.dtype, copy=True).contiguous() for x in sums]


def _add(total: Tensor, span: Span, part: Tensor) -> None:
    """Adds `[B G, H, tokens, D]` to the blocks `[B, blocks, size, H, D]` that it came from."""
    batch, _, size, heads, width = total.shape
    part = part.transpose(1, 2)
    if span.first is not None:
        flat = total.view(batch, -1, heads, width)
        flat[:, span.first * size : span.first * size + part.shape[1]] += part
        return
    part = F.pad(part, (0, 0, 0, 0, 0, span.blocks.shape[1] * size - part.shape[1])).float()
    total.index_add_(1, span.blocks.flatten(), part.reshape(batch, -1, size, heads, width))


def dense_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensors:
    """Runs SDPA's CPU kernel, called by name because it also returns the log-sum-exp `[B, H, S]`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)


def dense_cpu_backward(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Tensor, scale: float) -> Tensors:
    """Returns the gradients of one rectangle, given the output and log-sum-exp over all keys of its rows."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, *inputs, out, lse.squeeze(-1), 0.0, False, scale=scale)


def dense_any(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensors:
    """Runs SDPA on any device; it has no log-sum-exp, so only for plans that merge nothing."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out, out.new_zeros(out.shape[:3], dtype=torch.float32)


def dense_cuda(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensors:
    """Runs SDPA's CUDA kernels, called by name because they also return the log-sum-exp `[B, H, S]`."""
    if query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = kernel(query, key, value, None, True, scale=scale)
    return out, lse[..., : query.shape[2]]


def dense_any_backward(grad: Tensor, _out: Tensor, _lse: Tensor, *inputs: Tensor, scale: float) -> Tensors:
    """Computes SDPA once more and returns gradients through it."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = F.scaled_dot_product_attention(*inputs, scale=scale)
    return torch.autograd.grad(out, inputs, grad)
