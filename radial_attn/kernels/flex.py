"""Compiled FlexAttention over a BlockMask built from the CSR. The CUDA default; on the CPU without gradients.

The mask_mod always reads the block table: where FlexAttention runs uncompiled it ignores the block
indices, and this keeps even that exact.
"""

import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..block_mask import BlockMask

KERNEL_BLOCK = 128  # a multiple of every tile that FlexAttention chooses from
LEAST_WIDTH = 16  # the smallest side of a tensor-core product
MOST_SHAPES = 256  # compiled variants before torch.compile gives up


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """FlexAttention over the kept blocks of `mask`; all tensors `[B, S, H, D]`.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ValueError: gradients asked for on the CPU.
        ImportError: no C++ compiler for the CPU kernel.
    """
    inputs = [query, key, value]
    if query.device.type == "cpu":
        inputs = _cpu_inputs(inputs, mask)
    width = query.shape[-1]
    if width < LEAST_WIDTH:
        inputs = [F.pad(x, (0, LEAST_WIDTH - width)) for x in inputs]
    valid = None
    if text_lengths is not None:
        valid = (text_lengths + mask.grid.video_tokens).to(query.device)
    block_mask = _block_mask(mask, query.device, valid)
    out = _compiled(mask)(*(x.transpose(1, 2) for x in inputs), block_mask=block_mask, scale=scale)
    out = out.transpose(1, 2)[..., :width]
    if valid is None:
        return out
    padded = torch.arange(mask.grid.tokens, device=query.device) >= valid.unsqueeze(1)
    return out.masked_fill(padded[:, :, None, None], 0)


def _cpu_inputs(inputs: list[Tensor], mask: BlockMask) -> list[Tensor]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(
            "backend 'flex' has no gradients on the CPU: use backend='blocks', or torch.no_grad()"
        )
    if not torch.compiler.is_compiling():
        mask.cached("flex C++ compiler", _find_compiler)
    return [x.detach() for x in inputs]


def _find_compiler() -> str:
    names = (os.environ.get("CXX"), "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise ImportError(
            "backend 'flex' compiles C++ on the CPU and found no compiler: "
            "apt install g++, or use backend='blocks'"
        )
    return found


def _compiled(mask: BlockMask) -> Callable[..., Tensor]:
    """FlexAttention, compiled for exact shapes; an error instead of a silent uncompiled run."""
    if torch.compiler.is_compiling():
        return flex.flex_attention
    compiled = mask.cached(
        "flex compiled", lambda: torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    )

    def call(*args: Tensor, **options: object) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            return compiled(*args, **options)

    return call


def _block_mask(mask: BlockMask, device: torch.device, valid: Tensor | None) -> flex.BlockMask:
    """The mask in FlexAttention's form; blocks that are valid to the last token skip the mask_mod."""
    last = mask.grid.tokens // max(mask.block_size, KERNEL_BLOCK)
    first_partial = last if valid is None else mask.grid.video_tokens // max(mask.block_size, KERNEL_BLOCK)

    def build() -> tuple[Tensor, tuple[Tensor, ...]]:
        tables = _kernel_tables(mask, first_partial)
        return mask.blocks.to(device), tuple(x.to(device) for x in tables)

    table, (counts, indices, full_counts, full_indices) = mask.cached(
        ("flex tables", device, first_partial), build
    )
    length = mask.grid.tokens
    return flex.BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=max(mask.block_size, KERNEL_BLOCK),
        mask_mod=_mask_mod(table, mask.block_size, valid),
        seq_lengths=(length, length),
    )


def _mask_mod(table: Tensor, size: int, valid: Tensor | None) -> Callable[..., Tensor]:
    """`(sample, head, query token, key token) -> kept`, read from the block table."""
    table = table if table.ndim == 3 else table.unsqueeze(0)
    shared = len(table) == 1

    def kept(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return table[0 if shared else head, row // size, column // size]

    def kept_and_valid(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return kept(sample, head, row, column) & (column < valid[sample])

    return kept if valid is None else kept_and_valid


def _kernel_tables(mask: BlockMask, first_partial: int) -> tuple[Tensor, ...]:
    """Counts `[1, H, Q]` and indices `[1, H, Q, K]` of partial, then of full blocks of the kernel's size.

    A kernel block that holds several blocks of the mask is full only if all of them are kept.
    """
    blocks = mask.blocks if mask.blocks.ndim == 3 else mask.blocks.unsqueeze(0)
    ratio = max(1, KERNEL_BLOCK // mask.block_size)
    pad = -blocks.shape[-1] % ratio
    cells = F.pad(blocks, (0, pad, 0, pad)).unflatten(2, (-1, ratio)).unflatten(1, (-1, ratio))
    some, every = cells.amax(dim=(2, 4)), cells.amin(dim=(2, 4))
    every[..., first_partial:] = False
    return *_ordered(some & ~every), *_ordered(every)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Kept blocks of each row, first and ascending, int32: counts `[1, H, Q]`, indices `[1, H, Q, K]`."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts.unsqueeze(0), indices.unsqueeze(0)
