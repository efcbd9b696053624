"""Lets dropped key blocks take part in the softmax through their mean key and mean value.

A block of n video tokens that a query drops stands for one key, their mean, with n times its weight. This is
the zeroth order in the keys' distance from their mean, as in Sol-Attn and PISA. "linear" adds the first order
in the values: one matrix for each head, the mean of `(k - mean k) (v - mean v)^T`, times the query. A `bias`
corrects the weights; a dense step measures it (`far_correction` of selection.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_mask import BlockMask, Part
from .grid import TokenGrid
from .partial import merge

CHUNK = 1 << 24  # scores held at a time


@dataclass(frozen=True)
class Far:
    """Holds the far field of a call, in float32.

    Attributes:
        keys, values: means of the video tokens of each block that has any, `[B, K, H, D]`.
        bias: added to the scores, `[B or 1, H or 1, Q, K]`: log of the tokens of a block, or -inf if the
            query block keeps it.
        slope: first-order matrix of each head, `[B, H, D, D]`, or None.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    slope: Tensor | None

    @classmethod
    def of(
        cls, key: Tensor, value: Tensor, mask: BlockMask, far_field: str, bias: Tensor | None = None
    ) -> "Far":
        """Pools keys and values `[B, S, H, D]`; `bias` is added to the weights' logarithms."""
        grid, size = mask.grid, mask.block_size
        counts = video_counts(grid, size).to(key.device)
        keys, values = (block_means(x, grid, size) for x in (key, value))
        kept = mask.cached(("on", key.device), lambda: mask.blocks.to(key.device))
        kept = kept.view(1, -1, *kept.shape[-2:])[..., : len(counts)]
        logs = counts.float().log() if bias is None else counts.float().log() + bias
        bias = logs.masked_fill(kept, -math.inf)
        slope = None
        if far_field == "linear":
            video = slice(grid.video_tokens)
            whole = torch.einsum("bshd,bshe->bhde", key[:, video].float(), value[:, video].float())
            means = torch.einsum("bkhd,bkhe->bhde", keys * counts[:, None, None], values)
            slope = (whole - means) / grid.video_tokens
        return cls(keys, values, bias, slope)


def video_counts(grid: TokenGrid, block_size: int) -> Tensor:
    """Counts the video tokens of each block that has any, int64 `[K]`."""
    return TokenGrid(grid.frames, grid.height, grid.width).block_tokens(block_size)


def block_means(x: Tensor, grid: TokenGrid, block_size: int) -> Tensor:
    """Averages the video tokens of each block in float32, `[B, K, H, D]` of `[B, S, H, D]`."""
    video, missing = x[:, : grid.video_tokens].float(), -grid.video_tokens % block_size
    if missing:
        video = F.pad(video, (0, 0, 0, 0, 0, missing))
    counts = video_counts(grid, block_size).to(x.device)
    return video.unflatten(1, (-1, block_size)).sum(2) / counts[:, None, None]


@torch.compiler.disable
def far_attention(
    kernel: ModuleType,
    tensors: Sequence[Tensor],
    mask: BlockMask,
    far: tuple[str, Tensor | None],
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Computes attention over the kept blocks by a kernel and over the far field, in one softmax.

    Args:
        kernel: its module; `kernel.with_far_field` computes both at once if there is one, else the
            log-sum-exp of `kernel.partial_attention` merges them.
        tensors: query, key and value, `[B, S, H, D]`.
        far: "mean" or "linear", and the bias.
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    return _FarAttention.apply(*tensors, kernel, mask, far, text_lengths, scale)[0]


class _FarAttention(torch.autograd.Function):
    """Gives the gradients: the kernel's own for the kept blocks, with output and log-sum-exp of all."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        kernel, mask, (far_field, bias), text_lengths, scale = rest
        far = Far.of(key, value, mask, far_field, bias)
        options = {"text_lengths": text_lengths, "scale": scale}
        together = getattr(kernel, "with_far_field", partial(_merged, kernel))
        out, lse = together(query, key, value, mask, far, **options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = rest
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        kernel, mask, (far_field, bias), text_lengths, scale = ctx.rest
        options = {"text_lengths": text_lengths, "scale": scale}
        grads = kernel.backward(grad, query, key, value, out, lse, mask, **options)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (key, value)]
            far = Far.of(*leaves, mask, far_field, bias)
        to_query, *to_means = _far_backward(
            grad, query, (out, lse), block_size=mask.block_size, far=far, scale=scale
        )
        means = [x for x in (far.keys, far.values, far.slope) if x is not None]
        added = to_query, *torch.autograd.grad(means, leaves, to_means[: len(means)])
        total = [x + y.to(x.dtype) for x, y in zip(grads, added, strict=True)]
        return *total, None, None, None, None, None


def _merged(  # noqa: PLR0917 (as the kernels' own)
    kernel: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    far: Far,
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and float32 log-sum-exp `[B, S, H]` of both parts."""
    text = mask.grid.text
    part = mask.cached("whole", lambda: Part(mask.blocks, mask.block_size, text, text))
    options = {"text_lengths": text_lengths, "scale": scale}
    near, lse = kernel.partial_attention(query, key, value, part, **options)
    added, more = far_partial(query, mask.block_size, far, scale)
    if text_lengths is not None:
        valid = text_lengths.to(query.device)[:, None] + mask.grid.video_tokens
        padded = torch.arange(query.shape[1], device=query.device) >= valid
        more = more.masked_fill(padded[..., None], -math.inf)
    out, lse = merge((near.float(), lse), (added, more))
    return out.to(query.dtype), lse


def far_partial(query: Tensor, block_size: int, far: Far, scale: float) -> tuple[Tensor, Tensor]:
    """Returns float32 output `[B, S, H, D]` and log-sum-exp `[B, S, H]` of the far field alone."""
    batch, tokens, heads, width = query.shape
    out = torch.zeros(batch, tokens, heads, width, device=query.device)
    lse = torch.full((batch, tokens, heads), -math.inf, device=query.device)
    for first, rows, bias in _row_blocks(query, block_size, far):
        scores = torch.einsum("bqrhd,bkhd->bhqrk", rows.float(), far.keys).mul_(scale) + bias[:, :, :, None]
        sums = scores.logsumexp(-1)
        weights = (scores - sums.masked_fill(sums == -math.inf, 0)[..., None]).exp_()
        part = torch.einsum("bhqrk,bkhd->bqrhd", weights, far.values).flatten(1, 2)
        place = slice(first, min(first + part.shape[1], tokens))
        out[:, place] = part[:, : place.stop - first]
        lse[:, place] = sums.flatten(2).transpose(1, 2)[:, : place.stop - first]
    if far.slope is not None:
        out += scale * torch.einsum("bshd,bhde->bshe", query.float(), far.slope)
    return out, lse


def _far_backward(
    grad: Tensor, query: Tensor, total: tuple[Tensor, Tensor], *, block_size: int, far: Far, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns float32 gradients of the query `[B, S, H, D]`, and of the far field's keys, values and slope.

    `total`: output `[B, S, H, D]` and log-sum-exp `[B, S, H]` over kept blocks and far field.
    """
    out, lse = total
    tokens = query.shape[1]
    delta = (grad.float() * out.float()).sum(-1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    first = None
    if far.slope is not None:
        first = scale * torch.einsum("bshd,bhde->bshe", query.float(), far.slope)
    to_query = torch.zeros(query.shape, device=query.device)
    to_keys, to_values = torch.zeros_like(far.keys), torch.zeros_like(far.values)
    shares = torch.zeros(lse.shape, device=query.device)
    for start, rows, bias in _row_blocks(query, block_size, far):
        place = slice(start, min(start + rows.shape[1] * block_size, tokens))

        def cut(x: Tensor, fill: float = 0.0, place: slice = place, rows: Tensor = rows) -> Tensor:
            part = x[:, place].float()
            missing = rows.shape[1] * block_size - part.shape[1]
            part = F.pad(part, [0, 0] * (part.ndim - 2) + [0, missing], value=fill)
            return part.unflatten(1, (-1, block_size))

        scores = torch.einsum("bqrhd,bkhd->bhqrk", rows.float(), far.keys).mul_(scale) + bias[:, :, :, None]
        weights = (scores - cut(lse, math.inf).permute(0, 3, 1, 2)[..., None]).exp_()
        toward = torch.einsum("bqrhd,bkhd->bhqrk", cut(grad), far.values)
        against = cut(delta) if first is None else cut(delta) - (cut(grad) * cut(first)).sum(-1)
        slopes = weights * (toward - against.permute(0, 3, 1, 2)[..., None])
        to_values += torch.einsum("bhqrk,bqrhd->bkhd", weights, cut(grad))
        to_keys += scale * torch.einsum("bhqrk,bqrhd->bkhd", slopes, rows.float())
        part = scale * torch.einsum("bhqrk,bkhd->bqrhd", slopes, far.keys).flatten(1, 2)
        to_query[:, place] = part[:, : place.stop - start]
        shares[:, place] = weights.sum(-1).permute(0, 2, 3, 1).flatten(1, 2)[:, : place.stop - start]
    if far.slope is None:
        return to_query, to_keys, to_values, shares
    pushed = scale * shares[..., None] * grad.float()
    to_query += torch.einsum("bshe,bhde->bshd", pushed, far.slope)
    return to_query, to_keys, to_values, torch.einsum("bshd,bshe->bhde", query.float(), pushed)


def _row_blocks(query: Tensor, block_size: int, far: Far) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields first token, queries `[B, q, R, H, D]` and bias `[B, H, q, K]` of a few query blocks in turn."""
    batch, _, heads, _ = query.shape
    step = max(1, CHUNK // (batch * heads * block_size * far.bias.shape[-1]))
    for block in range(0, far.bias.shape[-2], step):
        rows = query[:, block * block_size : (block + step) * block_size]
        rows = F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % block_size)).unflatten(1, (-1, block_size))
        yield block * block_size, rows, far.bias[:, :, block : block + step]
