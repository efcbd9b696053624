"""Defines BlockMask: the key blocks that each query block attends to, as a value for every backend."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .grid import TokenGrid

BLOCK_SIZES = (16, 32, 64, 128, 256)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Holds an immutable block mask; two masks are equal only if they are the same object.

    Attributes:
        grid: the token grid that the mask belongs to.
        block_size: tokens of a block; the last block of the sequence may be short.
        blocks: bool on the CPU, `[Q, K]` shared by all heads or `[H, Q, K]` per head,
            `Q == K == grid.num_blocks(block_size)`. Must not be written to. An inference tensor is copied,
            and `cached` builds normal tensors, so a mask made under inference mode serves training too.

    Raises:
        ValueError: a block size, dtype or shape that does not fit.
    """

    grid: TokenGrid
    block_size: int
    blocks: Tensor = field(repr=False)
    _memo: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")
        if self.blocks.dtype != torch.bool or self.blocks.device.type != "cpu":
            raise ValueError(
                f"blocks must be bool on the CPU, got {self.blocks.dtype} on {self.blocks.device}"
            )
        count, shape = self.grid.num_blocks(self.block_size), tuple(self.blocks.shape)
        if len(shape) not in (2, 3) or shape[-2:] != (count, count) or 0 in shape:
            raise ValueError(
                f"blocks must be [{count}, {count}] or [heads, {count}, {count}] for "
                f"{self.grid.tokens} tokens in blocks of {self.block_size}, got {list(shape)}"
            )
        if self.blocks.is_inference():
            with torch.inference_mode(False):
                object.__setattr__(self, "blocks", self.blocks.clone())

    @classmethod
    def from_blocks(cls, grid: TokenGrid, blocks: Tensor, block_size: int | None = None) -> "BlockMask":
        """Makes a mask from any boolean block matrix, `[Q, K]` or `[H, Q, K]`, which it copies.

        Without `block_size` it takes the one size of `BLOCK_SIZES` that cuts the grid into `Q` blocks.

        Raises:
            ValueError: as in the class; also if no or several block sizes fit, or a query block keeps no key.
        """
        blocks = torch.as_tensor(blocks, device="cpu").detach().clone(memory_format=torch.contiguous_format)
        size = _infer_block_size(grid, blocks) if block_size is None else block_size
        mask = cls(grid, size, blocks)
        empty = torch.nonzero(mask._row_counts() == 0)
        if len(empty):
            raise ValueError(f"every query block must keep a key block, got none at {empty[0].tolist()}")
        return mask

    @property
    def heads(self) -> int | None:
        """Counts the heads if each has a pattern of its own; None if all share one."""
        return self.blocks.shape[0] if self.blocks.ndim == 3 else None

    @property
    def block_tokens(self) -> Tensor:
        """Counts the valid tokens of each block, int64 `[Q]`."""
        return self.cached("block_tokens", lambda: self.grid.block_tokens(self.block_size))

    @property
    def kept_pairs(self) -> int:
        """Counts the kept (query, key) token pairs, mean over heads; attention FLOPs are 4 H D times this."""
        return round(self._all_pairs() / (self.heads or 1))

    @property
    def density(self) -> float:
        """Returns the kept share of all token pairs, mean over heads: blocks weigh as many as they hold."""
        return self._all_pairs() / (self.heads or 1) / self.grid.tokens**2

    @property
    def is_dense(self) -> bool:
        """Tells whether every block is kept."""
        return self.cached("is_dense", lambda: bool(self.blocks.all()))

    @property
    def indptr(self) -> Tensor:
        """Returns CSR row offsets, int32 `[Q + 1]` or `[H, Q + 1]`, into one list `indices` for all heads."""
        return self.csr("cpu")[0]

    @property
    def indices(self) -> Tensor:
        """Returns CSR key block numbers, int32 `[kept blocks]`, ascending within a row."""
        return self.csr("cpu")[1]

    def csr(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Returns `(indptr, indices)` on a device, copied there once."""
        host = self.cached("csr", lambda: csr_of(self.blocks, self._row_counts()))
        device = torch.device(device)
        if device.type == "cpu":
            return host
        return self.cached(("csr", device), lambda: (host[0].to(device), host[1].to(device)))

    def token_counts(self, text_lengths: Tensor | None, device: torch.device) -> Tensor | None:
        """Returns the tokens of each sample that count, int32 `[B]` on a device; None if all do.

        Without gradients lengths recur at every step, so each distinct list is copied once.
        """
        if text_lengths is None:
            return None
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return (text_lengths + self.grid.video_tokens).to(device, torch.int32)
        counts = tuple((text_lengths + self.grid.video_tokens).tolist())
        return self.cached(
            ("token counts", counts, device),
            lambda: torch.tensor(counts, dtype=torch.int32, device=device),
        )

    def token_mask(self) -> Tensor:
        """Expands the mask to tokens, bool `[S, S]` or `[H, S, S]`: for tests, memory quadratic in S."""
        rows = self.blocks.repeat_interleave(self.block_tokens, dim=-2)
        return rows.repeat_interleave(self.block_tokens, dim=-1)

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """Returns the value of `build()`, computed once for each hashable key and kept with the mask."""
        if key not in self._memo:
            with torch.inference_mode(False):
                self._memo[key] = build()
        return self._memo[key]

    def _row_counts(self) -> Tensor:
        """Counts kept key blocks of each query block, int64; NumPy is ten times faster here than torch."""
        return self.cached(
            "row_counts", lambda: torch.from_numpy(np.count_nonzero(self.blocks.numpy(), axis=-1))
        )

    def _all_pairs(self) -> int:
        """Counts the kept token pairs of all heads together."""

        def count() -> int:
            missing = self.block_size - self.block_tokens[-1]
            keys = self._row_counts() * self.block_size - self.blocks[..., -1] * missing
            return int((keys * self.block_tokens).sum())

        return self.cached("pairs", count)


def csr_of(blocks: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns `BlockMask.indptr` and `indices` of `blocks`; `counts`: kept blocks of each row, if known."""
    counts = torch.from_numpy(np.count_nonzero(blocks.numpy(), axis=-1)) if counts is None else counts
    ends = counts.flatten().cumsum(0).view(counts.shape)
    starts = ends[..., :1] - counts[..., :1]
    indptr = torch.cat([starts, ends], dim=-1).to(torch.int32)
    numbers = np.arange(blocks.shape[-1], dtype=np.int32)
    kept = np.broadcast_to(numbers, blocks.shape)[blocks.numpy()]
    return indptr, torch.from_numpy(kept)


def _infer_block_size(grid: TokenGrid, blocks: Tensor) -> int:
    count = blocks.shape[-1] if blocks.ndim else 0
    fitting = [size for size in BLOCK_SIZES if grid.num_blocks(size) == count]
    if len(fitting) != 1:
        raise ValueError(
            f"block_size must be given: {len(fitting)} of {BLOCK_SIZES} cut "
            f"{grid.tokens} tokens into {count} blocks"
        )
    return fitting[0]


@dataclass(frozen=True, eq=False)
class Part:
    """Holds a rectangle of a block mask: some query blocks and some key blocks, each side of its own length.

    Attributes:
        blocks: bool on the CPU, `[Q, K]` shared by all heads or `[H, Q, K]` per head; a row may keep nothing.
            Must not be written to: backends keep what they make of it on this tensor.
        block_size: tokens of a block; the last one of either side may be short.
        row_text, key_text: text tokens at the end of the query and of the keys; equal, unless one is 0.

    Raises:
        ValueError: a block size, dtype, shape or number of text tokens that does not fit.
    """

    blocks: Tensor = field(repr=False)
    block_size: int
    row_text: int = 0
    key_text: int = 0

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size!r}")
        blocks = self.blocks
        if blocks.dtype != torch.bool or blocks.device.type != "cpu" or blocks.ndim not in (2, 3):
            raise ValueError(
                "blocks must be bool [Q, K] or [H, Q, K] on the CPU, got "
                f"{blocks.dtype} {list(blocks.shape)} on {blocks.device}"
            )
        if 0 not in (self.row_text, self.key_text) and self.row_text != self.key_text:
            raise ValueError(f"row_text and key_text must agree, got {self.row_text} and {self.key_text}")

    @property
    def text(self) -> int:
        """Counts the text tokens of the side that has any."""
        return max(self.row_text, self.key_text)
