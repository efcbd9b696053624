"""Block-sparse attention in plain PyTorch: dense attention on the rectangles of a plan. The CPU default.

The keys of a rectangle are gathered, or viewed where they are consecutive; rows that several rectangles
share are merged through their log-sum-exp; the backward gathers again instead of keeping copies. All of
it is one operator for autograd and torch.compile, `radial_attn::block_attention`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from ..plan import Group, Piece, Span, plan_attention, to_device

Tensors = Sequence[Tensor]


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Attention over the kept blocks of `mask`; all tensors `[B, S, H, D]`, on any device.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    if text_lengths is None and not torch.compiler.is_compiling() and mask.is_dense:
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)
    video = mask.grid.video_tokens
    valid = None if text_lengths is None else text_lengths + video
    return block_attention(query, key, value, mask.blocks, mask.block_size, video, valid, scale)[0]


@torch.library.custom_op("radial_attn::block_attention", mutates_args=())
def block_attention(  # noqa: PLR0917 (an operator's schema is positional)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, S, H, D]` and log-sum-exp, float32 `[B, S, H]`, of attention under a block mask.

    Args:
        blocks: bool `[Q, K]` or `[H, Q, K]` on the CPU; its plan is kept under this very tensor.
        video_tokens: position where the text begins.
        valid: tokens of each sample that count, int64 `[B]`, or None for all.
    """

    dense = partial(_dense_cpu if query.device.type == "cpu" else _dense_any, scale=scale)

    def run(tensors: Tensors, plan: tuple[Group, ...], limit: int) -> Tensors:
        return forward_plan(tensors, plan, block_size, limit, dense)

    shape = {"blocks": blocks, "block_size": block_size, "video_tokens": video_tokens, "valid": valid}
    return tuple(_split(run, (query, key, value), **shape))


@torch.library.custom_op("radial_attn::block_attention_backward", mutates_args=())
def block_attention_backward(  # noqa: PLR0917
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, `[B, S, H, D]`; arguments as in `block_attention`."""

    dense = partial(_dense_cpu_backward if query.device.type == "cpu" else _dense_any_backward, scale=scale)

    def run(tensors: Tensors, plan: tuple[Group, ...], limit: int) -> Tensors:
        return backward_plan(tensors, plan, block_size, limit, dense)

    shape = {"blocks": blocks, "block_size": block_size, "video_tokens": video_tokens, "valid": valid}
    return tuple(_split(run, (grad, query, key, value, out, lse), **shape))


@block_attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@block_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, blocks, block_size, video_tokens, valid, scale = inputs
    ctx.save_for_backward(*tensors, *output, blocks, valid)
    ctx.numbers = block_size, video_tokens, scale


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
    *tensors, blocks, valid = ctx.saved_tensors
    block_size, video_tokens, scale = ctx.numbers
    grads = block_attention_backward(grad, *tensors, blocks, block_size, video_tokens, valid, scale)
    return *grads, None, None, None, None, None


block_attention.register_autograd(_gradients, setup_context=_setup_context)


@lru_cache(maxsize=64)
def _plans(
    blocks: Tensor, block_size: int, tail: int, features: int, device: torch.device
) -> tuple[tuple[Tensor | None, tuple[Group, ...]], ...]:
    """`(heads, plan)` of each distinct pattern of a mask; `heads` is None where all share one."""
    merge = device.type == "cpu"
    if blocks.ndim == 2:
        return ((None, to_device(plan_attention(blocks, block_size, tail, features, merge), device)),)
    patterns, owner = blocks.unique(dim=0, return_inverse=True)
    plans = []
    for index, pattern in enumerate(patterns):
        heads = (owner == index).nonzero().flatten()
        share = features * len(heads) // len(blocks)
        plan = plan_attention(pattern, block_size, tail, share, merge)
        plans.append((heads.to(device), to_device(plan, device)))
    return tuple(plans)


def _split(
    run: Callable[[Tensors, tuple[Group, ...], int], Tensors],
    tensors: Tensors,
    *,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    valid: Tensor | None,
) -> Tensors:
    """Calls `run` for every group of samples with equally much text and of heads with one pattern."""
    batch, length, heads, width = tensors[0].shape
    tail = min(video_tokens, length - length % block_size) // block_size
    plans = _plans(blocks, block_size, tail, batch * heads * width, tensors[0].device)

    def over_heads(tensors: Tensors, limit: int) -> Tensors:
        return _over(2, lambda part, plan: run(part, plan, limit), tensors, plans)

    return _over(0, over_heads, tensors, _sample_groups(valid, length, tensors[0].device))


def _sample_groups(
    valid: Tensor | None, length: int, device: torch.device
) -> tuple[tuple[Tensor | None, int], ...]:
    """`(samples, tokens that count)` of each distinct number; `samples` is None where it is one for all."""
    limits = [length] if valid is None else valid.tolist()
    if len(set(limits)) == 1:
        return ((None, limits[0]),)
    where = {limit: [i for i, other in enumerate(limits) if other == limit] for limit in limits}
    return tuple((torch.tensor(samples, device=device), limit) for limit, samples in where.items())


def _over(dim: int, run: Callable[[Tensors, object], Tensors], tensors: Tensors, groups: Sequence) -> Tensors:
    """Applies `run(tensors, argument)` to each `(index, argument)` along a dimension, joins the results."""
    if groups[0][0] is None:
        return run(tensors, groups[0][1])
    joined = None
    for index, argument in groups:
        parts = run([x.index_select(dim, index) for x in tensors], argument)
        if joined is None:
            size = tensors[0].shape[dim]
            joined = [x.new_empty(*x.shape[:dim], size, *x.shape[dim + 1 :]) for x in parts]
        for whole, part in zip(joined, parts, strict=True):
            whole.index_copy_(dim, index, part)
    return joined


def forward_plan(
    tensors: Tensors, plan: tuple[Group, ...], size: int, limit: int, dense: Callable
) -> Tensors:
    """Output `[B, S, H, D]` and log-sum-exp `[B, S, H]`: zeros and -inf from position `limit` on."""
    query = tensors[0]
    batch, length, heads, width = query.shape
    count = -(-length // size)
    out = query.new_zeros(batch, count, size, heads, width)
    lse = query.new_full((batch, count, size, heads), -torch.inf, dtype=torch.float32)
    for group in plan:
        if not group.merge:
            for piece in group.pieces:
                parts = _attend(piece, tensors, size, limit, dense)
                _store((out, lse), piece.rows, parts)
            continue
        rows = group.rows.blocks.shape[1]
        partial = (
            query.new_zeros(batch, rows, size, heads, width, dtype=torch.float32),
            query.new_full((batch, rows, size, heads), -torch.inf, dtype=torch.float32),
        )
        for piece in group.pieces:
            _merge(partial, piece.slots, _attend(piece, tensors, size, limit, dense))
        _store((out, lse), group.rows, partial)
    flat = out.flatten(1, 2)[:, :length], lse.flatten(1, 2)[:, :length]
    return [x.contiguous() for x in flat]


def _attend(piece: Piece, tensors: Tensors, size: int, limit: int, dense: Callable) -> Tensors | None:
    """Attention of a piece in whole blocks, `[B, G r, size, H, D]`, and its log-sum-exp, without `D`."""
    query, key, value = tensors
    rows, keys = piece.rows.tokens(size, limit), piece.keys.tokens(size, limit)
    if not rows or not keys:
        return None
    by_key = (_take(x, piece.keys, size, keys) for x in (key, value))
    out, lse = (x.transpose(1, 2) for x in dense(_take(query, piece.rows, size, rows), *by_key))
    shape = len(query), piece.rows.blocks.numel(), size
    missing = piece.rows.blocks.shape[1] * size - rows
    if missing:
        out = F.pad(out, (0, 0, 0, 0, 0, missing))
        lse = F.pad(lse, (0, 0, 0, missing), value=-torch.inf)
    return out.reshape(*shape, *out.shape[2:]), lse.reshape(*shape, lse.shape[2])


def _take(x: Tensor, span: Span, size: int, tokens: int) -> Tensor:
    """The first `tokens` of each rectangle's blocks, `[B G, H, tokens, D]`: a view where they are a run."""
    if span.first is not None:
        return x[:, span.first * size : span.first * size + tokens].transpose(1, 2)
    index = (span.blocks.unsqueeze(-1) * size + torch.arange(size, device=x.device)).flatten(1)
    if len(index) > 1:
        taken = x.index_select(1, index[:, :tokens].flatten())
        return taken.view(-1, tokens, *x.shape[2:]).transpose(1, 2)
    return x.transpose(1, 2).index_select(2, index[0, :tokens])


def _store(targets: Tensors, span: Span, parts: Tensors | None) -> None:
    """Writes whole blocks, `[B, G r, size, ...]`, to their places in `[B, blocks, size, ...]`."""
    for target, part in zip(targets, parts or (), strict=False):
        if span.first is not None:
            target[:, span.first : span.first + part.shape[1]] = part
        else:
            target.index_copy_(1, span.blocks.flatten(), part.to(target.dtype))


def _merge(partial: Tensors, slots: Span, parts: Tensors | None) -> None:
    """Adds attention over further keys to that over earlier ones, weighted by their log-sum-exp."""
    if parts is None:
        return
    run = slots.first is not None
    index = slice(slots.first, slots.first + slots.blocks.numel()) if run else slots.blocks.flatten()
    out, lse = (x[:, index] for x in partial)
    # exp(new) / (exp(old) + exp(new)); where neither row has keys both are -inf
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
    """Gradients of query, key and value, `[B, S, H, D]`, summed in float32 over the rectangles."""
    grad, query, key, value, out, lse = tensors
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


def _dense_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensors:
    """SDPA's CPU kernel, called by name because it also returns the log-sum-exp `[B, H, S]`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, scale=scale)


def _dense_cpu_backward(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Tensor, scale: float) -> Tensors:
    """Gradients of one rectangle, given the output and log-sum-exp over all keys of its rows."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, *inputs, out, lse.squeeze(-1), 0.0, False, scale=scale)


def _dense_any(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensors:
    """SDPA on any device; without a log-sum-exp, so only for plans that merge nothing."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out, out.new_zeros(out.shape[:3], dtype=torch.float32)


def _dense_any_backward(grad: Tensor, _out: Tensor, _lse: Tensor, *inputs: Tensor, scale: float) -> Tensors:
    """Gradients through SDPA, computed once more."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = F.scaled_dot_product_attention(*inputs, scale=scale)
    return torch.autograd.grad(out, inputs, grad)
