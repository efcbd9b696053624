"""Computes block-sparse attention in plain PyTorch: dense attention on the rectangles of a plan.

All of it is one operator for autograd and torch.compile, `radial_attn::block_attention`. It splits heads
by pattern and samples by text length, and leaves the rest to plan.py and rectangles.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...block_mask import BlockMask, Part
from ..contract import Needs
from ..operator import register
from .plan import Group, Layout, plan_attention, to_device
from .rectangles import (
    Tensors,
    backward_plan,
    dense_any,
    dense_any_backward,
    dense_cpu,
    dense_cpu_backward,
    dense_cuda,
    forward_plan,
)

NEEDS = Needs(partial=True, far_backward=("cpu",))


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Computes attention over the kept blocks of `mask`; all tensors `[B, S, H, D]`, on any device.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    if text_lengths is None and not torch.compiler.is_compiling() and mask.is_dense:
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)
    video = mask.grid.video_tokens
    valid = None if text_lengths is None else text_lengths + video
    return block_attention(query, key, value, mask.blocks, mask.block_size, video, valid, scale)[0]


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, part: Part, *, text_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, Q, H, D]` and log-sum-exp, float32 `[B, Q, H]`, over keys `[B, K, H, D]`.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    rows, keys, size = query.shape[1], key.shape[1], part.block_size
    on_cpu = query.device.type == "cpu"
    layout = Layout(
        size,
        tail=_tail(rows, rows - part.row_text, size),
        key_bytes=2 * query.shape[3] * query.element_size(),
        merge=on_cpu,
        key_tail=_tail(keys, keys - part.key_text, size),
    )
    dense = partial(dense_cpu if on_cpu else dense_cuda, scale=scale)

    def run(tensors: Tensors, plan: tuple[Group, ...], padding: int) -> Tensors:
        limits = rows - min(padding, part.row_text), keys - min(padding, part.key_text)
        return forward_plan(tensors, plan, size, limits[0], dense, key_limit=limits[1])

    padding = None if text_lengths is None else part.text - text_lengths
    plans, samples = _plans(part.blocks, layout, query.device), _sample_groups(padding, 0, query.device)
    return tuple(_over_both(run, (query, key, value), plans, samples))


def backward(  # noqa: PLR0917
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients through the kept blocks; output and log-sum-exp `[B, S, H]` may cover more keys."""
    video = mask.grid.video_tokens
    valid = None if text_lengths is None else text_lengths + video
    shape = mask.blocks, mask.block_size, video, valid
    return block_attention_backward(grad, query, key, value, out, lse, *shape, scale)


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
    """Returns output `[B, S, H, D]` and log-sum-exp, float32 `[B, S, H]`, of attention under a block mask.

    Args:
        blocks: bool `[Q, K]` or `[H, Q, K]` on the CPU; its plan is cached on this tensor.
        video_tokens: position at which the text begins.
        valid: tokens of each sample that count, int64 `[B]`, or None for all.
    """
    dense = partial(dense_cpu if query.device.type == "cpu" else dense_any, scale=scale)

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
    """Returns gradients of query, key and value, `[B, S, H, D]`; arguments are as in `block_attention`."""
    dense = partial(dense_cpu_backward if query.device.type == "cpu" else dense_any_backward, scale=scale)

    def run(tensors: Tensors, plan: tuple[Group, ...], limit: int) -> Tensors:
        return backward_plan(tensors, plan, block_size, limit, dense)

    shape = {"blocks": blocks, "block_size": block_size, "video_tokens": video_tokens, "valid": valid}
    return tuple(_split(run, (grad, query, key, value, out, lse), **shape))


register(block_attention, block_attention_backward)


Plans = tuple[tuple[Tensor | None, tuple[Group, ...]], ...]
Groups = tuple[tuple[Tensor | None, int], ...]


def _plans(blocks: Tensor, layout: Layout, device: torch.device) -> Plans:
    """Calls `_make_plans` once per mask; caches the plans on its tensor, all that an operator is given."""
    kept = blocks.__dict__.setdefault("plans", {})
    if (layout, device) not in kept:
        kept[layout, device] = _make_plans(blocks, layout, device)
    return kept[layout, device]


def _make_plans(blocks: Tensor, layout: Layout, device: torch.device) -> Plans:
    """Makes `(heads, plan)` for each distinct pattern of a mask; `heads` is None if all share one."""
    if blocks.ndim == 2:
        return ((None, to_device(plan_attention(blocks, layout), device)),)
    patterns, owner = blocks.unique(dim=0, return_inverse=True)
    plans = []
    for index, pattern in enumerate(patterns):
        heads = (owner == index).nonzero().flatten()
        plans.append((heads.to(device), to_device(plan_attention(pattern, layout), device)))
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
    """Calls `run` for every group of samples with equally much text and heads with one pattern."""
    length, device = tensors[0].shape[1], tensors[0].device
    layout = Layout(
        block_size,
        tail=_tail(length, video_tokens, block_size),
        key_bytes=2 * tensors[0].shape[3] * tensors[0].element_size(),
        merge=device.type == "cpu",
    )
    return _over_both(run, tensors, _plans(blocks, layout, device), _sample_groups(valid, length, device))


def _tail(length: int, video_tokens: int, block_size: int) -> int:
    """Returns the first block that text or the end of `length` tokens may leave with fewer valid ones."""
    return min(video_tokens, length - length % block_size) // block_size


def _over_both(
    run: Callable[[Tensors, tuple[Group, ...], int], Tensors], tensors: Tensors, plans: Plans, samples: Groups
) -> Tensors:
    """Calls `run` for every group of samples, and in it for every group of heads."""

    def over_heads(tensors: Tensors, limit: int) -> Tensors:
        return _over(2, lambda part, plan: run(part, plan, limit), tensors, plans)

    return _over(0, over_heads, tensors, samples)


def _sample_groups(valid: Tensor | None, length: int, device: torch.device) -> Groups:
    """Groups samples by tokens that count: `(samples, tokens)`; `samples` is None if all have one number."""
    limits = [length] if valid is None else valid.tolist()
    if len(set(limits)) == 1:
        return ((None, limits[0]),)
    groups = {limit: [i for i, other in enumerate(limits) if other == limit] for limit in limits}
    return tuple((torch.tensor(samples, device=device), limit) for limit, samples in groups.items())


def _over(dim: int, run: Callable[[Tensors, object], Tensors], tensors: Tensors, groups: Sequence) -> Tensors:
    """Joins the results of `run(tensors, argument)` for each `(index, argument)` along a dimension."""
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
