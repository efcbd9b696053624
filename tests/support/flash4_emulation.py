"""Emulates flash-attn-4 4.0.0b36 in plain torch on the CPU: its restrictions and its walk of the lists.

Functions have the names and arguments of flash_attn/cute/interface.py and compute in float32 what its kernels
do. Of each list only the last tile is masked at the end of the keys, and keys behind it are zeros that count.
Rows that a kernel leaves unwritten are NaN. For compute capability 8.x lists are silently ignored.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.kernel_emulations import HALF, module, require


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


class Walk:
    """Yields the tiles of a call in the order of the kernels, and checks the lists as the library does."""

    def __init__(
        self, tensors: BlockSparseTensorsTorch, shape: tuple[int, int, int, int], tile: tuple[int, int]
    ) -> None:
        self.tensors, (batch, heads, rows, columns) = tensors, shape
        for counts, indices in (tensors[:2], tensors[2:4]):
            require(counts.dtype == indices.dtype == torch.int32, "int32")
            require(counts.ndim == 3 and indices.ndim == 4, "shapes (B, H, M) and (B, H, M, N)")
            for size, wanted in ((0, batch), (1, heads)):
                require(counts.shape[size] in (1, wanted) and indices.shape[size] in (1, wanted), "broadcast")
            require(counts.shape[2] == indices.shape[2] == -(-rows // tile[0]), "a list for each tile")
            require(indices.shape[3] <= -(-columns // tile[1]), "width")
            require(indices.stride(-1) == 1 or indices.shape[-1] == 1, "contiguous numbers")
            require(bool((counts <= indices.shape[3]).all()), "counts within the width")

    def tiles(self, sample: int, head: int, row: int) -> Iterator[tuple[int, bool, bool]]:
        """Yields each tile's number, whether it is mixed, and whether it is the last of its list."""
        for mixed, (counts, indices) in ((True, self.tensors[:2]), (False, self.tensors[2:4])):
            at = min(sample, len(counts) - 1), min(head, counts.shape[1] - 1), row
            numbers = indices[at][: counts[at]].tolist()
            require(numbers == sorted(set(numbers)), "ascending tiles, each once")
            for position, number in enumerate(reversed(numbers)):
                yield number, mixed, position == 0


def asked(
    mask_mod: Callable, tables: list[Tensor], at: tuple[int, int], rows: Tensor, keys: Tensor
) -> Tensor:
    """Returns what a mask_mod says of token pairs, bool `[rows, keys]`."""
    sample, head = ([torch.tensor(x)] for x in at)
    return mask_mod(sample, head, [rows[:, None]], [keys], None, tables).bool()


def taken(x: Tensor, tokens: Tensor) -> Tensor:
    """Reads rows of `[S, D]` in float32; those behind the end are zeros."""
    inside = tokens < len(x)
    return x.float()[tokens.clamp(max=len(x) - 1)] * inside[:, None]


def _flash_attn_fwd(
    q, k, v, *, softmax_scale, _arch, block_sparse_tensors=None, mask_mod=None, aux_tensors=None,
    num_splits=1, pack_gqa=None, return_lse=False, out=None, lse=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, rows, heads, width = q.shape
    keys = k.shape[1]
    require(q.dtype == k.dtype == v.dtype and q.dtype in HALF and width in (64, 128), "data types, widths")
    require(k.shape == v.shape == (batch, keys, heads, width), "shapes of key and value")
    require(
        out.shape == q.shape and lse.shape == (batch, heads, rows) and lse.dtype == torch.float32, "outputs"
    )
    require(all(x.stride(-1) == 1 for x in (q, k, v, out, lse)) and rows > 0 < keys, "strides")
    require(num_splits == 1 and pack_gqa is False and return_lse, "options")
    tensors = block_sparse_tensors
    if tensors is None or _arch // 10 == 8:
        tile, walk = (128, keys), None
    else:
        tile = tensors.block_size
        allowed = {9: ((64, 64), (128, 128)), 10: ((256, 128),)}[_arch // 10]
        require(tile in allowed, "tiles of this architecture")
        walk = Walk(tensors, (batch, heads, rows, keys), tile)
    out.fill_(torch.nan)
    for sample in range(batch):
        for head in range(heads):
            query, key, value = (x[sample, :, head] for x in (q, k, v))
            for row in range(-(-rows // tile[0])):
                at = torch.arange(row * tile[0], min((row + 1) * tile[0], rows))
                scores, values = [query.new_empty(len(at), 0).float()], [value.new_empty(0, width).float()]
                tiles = [(0, False, True)] if walk is None else walk.tiles(sample, head, row)
                for number, mixed, last in tiles:
                    tokens = torch.arange(number * tile[1], (number + 1) * tile[1])
                    part = taken(query, at) @ taken(key, tokens).T * softmax_scale
                    if mixed and mask_mod is not None:
                        kept = asked(mask_mod, aux_tensors, (sample, head), at, tokens)
                        part = part.masked_fill(~kept, -torch.inf)
                    scores.append(part.masked_fill((tokens >= keys) & last, -torch.inf))
                    values.append(taken(value, tokens))
                scores = torch.cat(scores, 1)
                sums = scores.logsumexp(1)
                weights = (scores - sums[:, None]).exp().nan_to_num(0)
                lse[sample, head, at] = sums
                out[sample, at, head] = (weights @ torch.cat(values)).to(out.dtype)
    return out, lse


def _flash_attn_bwd(  # noqa: PLR0917
    q, k, v, out, dout, lse, *, softmax_scale, deterministic=False, dq=None, dk=None, dv=None,
    mask_mod=None, aux_tensors=None, block_sparse_tensors=None, dlse=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, rows, heads, width = q.shape
    keys = k.shape[1]
    require(q.dtype == k.dtype == v.dtype == out.dtype == dout.dtype and q.dtype in HALF, "data types")
    require(out.shape == dout.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape, "shapes")
    require(lse.shape == (batch, heads, rows) and not deterministic, "log-sum-exp")
    walk, tile = None, (128, 128)
    if block_sparse_tensors is not None:
        require(block_sparse_tensors.block_size == tile, "tiles of the backward")
        walk = Walk(block_sparse_tensors, (batch, heads, keys, rows), tile)
    every = [(number, False, True) for number in range(-(-rows // tile[0]))]
    products = (out.float() * dout.float()).sum(-1).transpose(1, 2)
    products = products if dlse is None else products - dlse
    logs = lse.masked_fill(lse == -torch.inf, 0)
    for sample in range(batch):
        for head in range(heads):
            query, key, value, grad = (x[sample, :, head] for x in (q, k, v, dout))
            sums = torch.zeros(rows, width)
            for column in range(-(-keys // tile[1])):
                tokens = torch.arange(column * tile[1], min((column + 1) * tile[1], keys))
                to_key, to_value = torch.zeros(2, len(tokens), width)
                for number, mixed, _ in every if walk is None else walk.tiles(sample, head, column):
                    at = torch.arange(number * tile[0], min((number + 1) * tile[0], rows))
                    scores = taken(query, at) @ taken(key, tokens).T * softmax_scale
                    if mixed and mask_mod is not None:
                        kept = asked(mask_mod, aux_tensors, (sample, head), at, tokens)
                        scores = scores.masked_fill(~kept, -torch.inf)
                    weights = (scores - logs[sample, head, at, None]).exp()
                    to_value += weights.T @ taken(grad, at)
                    toward = taken(grad, at) @ taken(value, tokens).T
                    slopes = weights * (toward - products[sample, head, at, None]) * softmax_scale
                    to_key += slopes.T @ taken(query, at)
                    sums[at] += slopes @ taken(key, tokens)
                dk[sample, tokens, head], dv[sample, tokens, head] = (
                    to_key.to(dk.dtype),
                    to_value.to(dv.dtype),
                )
            dq[sample, :, head] = sums.to(dq.dtype)
    return dq, dk, dv


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes the emulation importable under the library's names; returns its interface."""
    interface = module(
        "flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd
    )
    sparsity = module("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    utils = module("flash_attn.cute.utils", scalar_to_ssa=lambda value, kind: value)
    jit = module("cutlass.cute", jit=lambda function: function)
    compiler = module("cutlass", cute=jit, Int32=lambda value: value)
    packages = [module("flash_attn"), module("flash_attn.cute")]
    for made in (*packages, interface, sparsity, utils, jit, compiler):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return interface
