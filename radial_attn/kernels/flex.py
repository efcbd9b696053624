"""Runs compiled FlexAttention on a block mask: the CUDA default; on the CPU without gradients.

The mask_mod always reads the block table. FlexAttention ignores the block indices if it runs uncompiled, and
the mask_mod keeps even that exact.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..block_mask import BlockMask
from .compiler import compiler_problem
from .contract import Needs

NEEDS = Needs(backward=("cuda",), compiles=True)
KERNEL_BLOCK = 128  # a multiple of every tile that FlexAttention chooses from
LEAST_WIDTH = 16  # the smallest side of a tensor-core product
MOST_SHAPES = 256  # compiled variants before torch.compile gives up


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Runs FlexAttention over the kept blocks of `mask`; all tensors `[B, S, H, D]`.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ImportError: torch.compile cannot make the kernel on this machine.
    """
    inputs = [query, key, value]
    if not torch.compiler.is_compiling():
        mask.cached(("flex compiler", query.device.type), partial(_check_compiler, query.device.type))
    if query.device.type == "cpu":
        inputs = [x.detach() for x in inputs]
    width = query.shape[-1]
    if width < LEAST_WIDTH:
        inputs = [F.pad(x, (0, LEAST_WIDTH - width)) for x in inputs]
    valid = mask.token_counts(text_lengths, query.device)
    block_mask = _block_mask(mask, query.device, valid)
    out = _compiled(mask)(*(x.transpose(1, 2) for x in inputs), block_mask=block_mask, scale=scale)
    out = out.transpose(1, 2)[..., :width]
    if valid is None:
        return out
    padded = torch.arange(mask.grid.tokens, device=query.device) >= valid.unsqueeze(1)
    return out.masked_fill(padded[:, :, None, None], 0)


def _check_compiler(device_type: str) -> None:
    """Raises ImportError if FlexAttention cannot compile here."""
    problem = compiler_problem(device_type)
    if problem:
        raise ImportError(f"backend 'flex' needs {problem}, or use backend='blocks'")


def _compiled(mask: BlockMask) -> Callable[..., Tensor]:
    """Returns FlexAttention compiled for exact shapes; it raises instead of running uncompiled."""
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
    """Makes the mask in FlexAttention's form, once for each mask; padded text only changes the mask_mod."""
    size = max(mask.block_size, KERNEL_BLOCK)
    first_partial = (mask.grid.tokens if valid is None else mask.grid.video_tokens) // size

    def build() -> flex.BlockMask:
        return _build_block_mask(mask, device, first_partial)

    if torch.compiler.is_compiling():
        block_mask = build()
    else:
        block_mask = copy.copy(mask.cached(("flex", device, first_partial), build))
    if valid is not None:
        block_mask.mask_mod = _and_valid(block_mask.mask_mod, valid)
    return block_mask


def _build_block_mask(mask: BlockMask, device: torch.device, first_partial: int) -> flex.BlockMask:
    """Builds the mask; kernel blocks from `first_partial` on may hold padding, so they read the mask_mod."""

    def build() -> tuple[Tensor, dict[str, Tensor]]:
        table = mask.blocks.to(device)
        return table, _kernel_tables(table, mask.block_size, first_partial)

    table, tables = mask.cached(("flex tables", device, first_partial), build)
    size = max(mask.block_size, KERNEL_BLOCK)
    return flex.BlockMask(
        seq_lengths=(mask.grid.tokens, mask.grid.tokens),
        **tables,
        BLOCK_SIZE=(size, size),
        mask_mod=_mask_mod(table, mask.block_size),
    )


def _mask_mod(table: Tensor, size: int) -> Callable[..., Tensor]:
    """Returns `(sample, head, query token, key token) -> kept`, read from the block table."""
    shared = table.ndim == 2 or len(table) == 1
    # torch 2.8 cannot trace an index that mixes numbers and tensors
    table = table.flatten(0, -2) if shared else table

    def kept(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        tokens = row // size, column // size
        return table[tokens] if shared else table[head, *tokens]

    return kept


def _and_valid(kept: Callable[..., Tensor], valid: Tensor) -> Callable[..., Tensor]:
    """Returns a mask_mod that also drops the keys of padded text; `valid`: tokens of each sample, `[B]`."""

    def kept_and_valid(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return kept(sample, head, row, column) & (column < valid[sample])

    return kept_and_valid


def _kernel_tables(blocks: Tensor, block_size: int, first_partial: int) -> dict[str, Tensor]:
    """Returns the tables of partial and full kernel blocks, by query and by key, as FlexAttention names them.

    A kernel block that holds several blocks of the mask is full only if all of them are kept. Makes the
    tables on the device of `blocks` and sorts nothing; FlexAttention itself would sort, which takes seconds
    at 460,800 tokens.
    """
    cells = blocks if blocks.ndim == 3 else blocks.unsqueeze(0)
    ratio = max(1, KERNEL_BLOCK // block_size)
    pad = -cells.shape[-1] % ratio
    cells = F.pad(cells, (0, pad, 0, pad)).unflatten(2, (-1, ratio)).unflatten(1, (-1, ratio))
    some, every = cells.amax(dim=(2, 4)), cells.amin(dim=(2, 4))
    every[..., first_partial:] = False
    tables = {}
    for name, kept in (("", some & ~every), ("full_", every)):
        tables[f"{name}kv_num_blocks"], tables[f"{name}kv_indices"] = _listed(kept)
        tables[f"{name}q_num_blocks"], tables[f"{name}q_indices"] = _listed(kept.mT)
    return tables


def _listed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Lists the kept columns of each row, ascending: int32 counts `[1, H, Q]`, indices `[1, H, Q, K]`.

    Zeros, which nothing reads, fill the rest of a row.
    """
    rank = kept.cumsum(-1)
    columns = torch.arange(kept.shape[-1], dtype=torch.int32, device=kept.device)
    indices = columns.new_zeros((*kept.shape[:-1], kept.shape[-1] + 1))
    slots = torch.where(kept, rank, 0)  # slot 0 takes the dropped columns
    indices.scatter_(-1, slots, columns.expand(kept.shape))
    return rank[..., -1].to(torch.int32).unsqueeze(0), indices[..., 1:].contiguous().unsqueeze(0)
