"""Runs FlashInfer's block-sparse attention (fa3 on Hopper, else fa2), planned once for a mask; no gradients.

`BlockSparseAttentionWrapper` needs whole column blocks of keys, `N % C == 0`. If the sequence, or the text of
a sample, ends inside a block, the columns are cut finer: `C` is the greatest common divisor of block size and
tokens, and a mask block becomes several columns of the plan. Its kernels gather keys token by token, so finer
columns cost a longer index list, and there are no parts to merge.
Masks with a pattern for each head go to `VariableBlockSparseAttentionWrapper`, whose blocks have any size.
Arguments are as in flashinfer/sparse.py of flashinfer-python 0.7.2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .contract import HALF, Needs

NEEDS = Needs(
    devices=("cuda",),
    dtypes=HALF,
    widths=(64, 128),
    backward=(),
    modules=("flashinfer",),
    install="pip install flashinfer-python",
    capability=(8, 0),
)
WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
MOST_PLANS = 8  # for one mask: each holds 8 MiB on the device and as much pinned on the host


@dataclass(frozen=True)
class Shape:
    """Holds what a plan is made for; `tokens` counts the valid ones, padded text is cut off."""

    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    scale: float


@dataclass(frozen=True)
class Plan:
    """Holds a planned wrapper.

    Attributes:
        run: maps query, key and value `[tokens, H, D]` to the output.
        empty: rows without keys, bool on the device, `[tokens, H or 1, 1]`; None if there are none.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    empty: Tensor | None


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Computes attention over the kept blocks of `mask`, sample by sample; all tensors `[B, S, H, D]`.

    Rows of padded text and rows without any key are zeros. Calls on one device share a workspace, so they
    must use one stream.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"backend 'flashinfer' takes a positive scale, got {scale}")
    run = torch.compiler.disable(_attention)
    return run(query, key, value, mask, text_lengths=text_lengths, scale=scale)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    batch, tokens, heads, width = query.shape
    counts = [tokens] * batch
    if text_lengths is not None:
        counts = (text_lengths + mask.grid.video_tokens).tolist()
    plans = mask.cached("flashinfer plans", lambda: lru_cache(MOST_PLANS)(partial(make_plan, mask)))
    out = query.new_empty(query.shape)
    with torch.cuda.device_of(query):
        for sample, count in enumerate(counts):
            plan = plans(Shape(count, heads, width, query.dtype, query.device, scale))
            result = plan.run(*(x[sample, :count].contiguous() for x in (query, key, value)))
            out[sample, :count] = result if plan.empty is None else result.masked_fill(plan.empty, 0)
            out[sample, count:] = 0
    return out


def make_plan(mask: BlockMask, shape: Shape) -> Plan:
    """Plans the first `shape.tokens` rows and columns of a mask."""
    count = -(-shape.tokens // mask.block_size)
    blocks = mask.blocks[..., :count, :count]
    with torch.inference_mode(False):
        make_run = _shared_pattern if mask.heads is None else _pattern_per_head
        run, empty = make_run(mask.block_size, blocks, shape), ~blocks.any(dim=-1)
        if not empty.any():
            return Plan(run, None)
        rows = empty.view(-1, count).repeat_interleave(mask.block_size, dim=-1)[:, : shape.tokens]
        return Plan(run, rows.T.unsqueeze(-1).to(shape.device))


def _shared_pattern(size: int, blocks: Tensor, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Plans a `BlockSparseAttentionWrapper` and returns its run, for `blocks`, bool `[Q, K]`."""
    from flashinfer import BlockSparseAttentionWrapper

    columns = math.gcd(size, shape.tokens)
    wrapper = BlockSparseAttentionWrapper(workspace(shape.device), backend="auto")
    wrapper.plan(
        *column_lists(blocks, size // columns, shape.tokens // columns, shape.device),
        M=shape.tokens,
        N=shape.tokens,
        R=size,
        C=columns,
        o_data_type=shape.dtype,
        **_common(shape),
    )
    return wrapper.run


def column_lists(
    blocks: Tensor, parts: int, columns: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Returns the CSR of `blocks`, bool `[Q, K]`, each cut into `parts` columns, of which `columns` exist.

    Returns:
        Row offsets int32 `[Q + 1]` and column numbers int32, ascending within a row, on the device.
    """
    kept = blocks.nonzero()[:, 1].to(device, torch.int32).unsqueeze(1)
    numbers = (kept * parts + torch.arange(parts, dtype=torch.int32, device=device)).flatten()
    missing = blocks.shape[1] * parts - columns  # columns of the last block
    counts = blocks.sum(dim=1) * parts - blocks[:, -1] * missing
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets.to(device, torch.int32), numbers[numbers < columns]


def _pattern_per_head(size: int, blocks: Tensor, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Plans a `VariableBlockSparseAttentionWrapper` and returns its run, for `blocks`, bool `[H, Q, K]`."""
    from flashinfer import VariableBlockSparseAttentionWrapper

    count = blocks.shape[-1]
    sizes = torch.full((shape.heads, count), size, dtype=torch.int32, device=shape.device)
    sizes[:, -1] = shape.tokens - (count - 1) * size
    wrapper = VariableBlockSparseAttentionWrapper(workspace(shape.device), backend="auto")
    wrapper.plan(
        block_mask_map=blocks.to(shape.device),
        block_row_sz=sizes,
        block_col_sz=sizes,
        **_common(shape),
    )

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return wrapper.run(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1)

    return run


def _common(shape: Shape) -> dict[str, Any]:
    """Returns the arguments with which both wrappers plan."""
    return {
        "num_qo_heads": shape.heads,
        "num_kv_heads": shape.heads,
        "head_dim": shape.width,
        "sm_scale": shape.scale,
        "q_data_type": shape.dtype,
        "kv_data_type": shape.dtype,
    }


@lru_cache
def workspace(device: torch.device) -> Tensor:
    """Allocates the scratch memory of all plans on a device, once."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
