"""Applies the radial rule to blocks, in closed form."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from ..block_mask import BLOCK_SIZES, BlockMask
from ..grid import TokenGrid, require_int

NEIGHBOURS = ("full", "half")
PATTERNS = (
    "radial",
    "dense",
    "spatial",
    "temporal",
    "sliding_tile",
    "strided",
    "harmonic",
    "power",
    "random",
)
DEFAULTS = {"decay_factor": 1.0, "sink": True, "neighbour": "full", "decimation_width": 128}
FIXED = ("sink", "neighbour", "decimation_width", "density")  # options that a program fixes


class Program(NamedTuple):
    """Says what a published program fixes; compat.py has the rest of its rule.

    Attributes:
        video: its options that differ from `DEFAULTS`, for a sequence without text.
        text: the same for a sequence with text; None if it serves none.
        decay_factor: its default; None if that depends on the model.
        block_sizes: the sizes that it takes.
        fixes_decay_factor: whether it takes no other decay factor.
    """

    video: dict[str, Any]
    text: dict[str, Any] | None = None
    decay_factor: float | None = None
    block_sizes: tuple[int, ...] = (64, 128)
    fixes_decay_factor: bool = False


COMPAT = {
    "none": None,
    "authors-2025-06": Program({"neighbour": "half"}, {}),
    "authors-2025-11": Program({}, {"sink": False}),
    "kijai": Program({"neighbour": "half", "decimation_width": "block"}, decay_factor=0.2),
    "woct0rdho": Program({"neighbour": "half"}, decay_factor=0.2),
    "lightx2v": Program({"neighbour": "half"}, decay_factor=0.2, block_sizes=(128,), fixes_decay_factor=True),
}


@dataclass(frozen=True)
class RadialConfig:
    """Holds the options of the radial rule; the defaults are from the authors' code for longer video.

    Attributes:
        decay_factor: scales the half-width of the band at frame distances of 2 and more; by default 1.0.
        block_size: tokens of a block, 16, 32, 64, 128 or 256.
        sink: every query keeps the tokens of frame 0 as keys, by default; a number means so many first
            frames, as for the reference images in front of a video.
        neighbour: half-width at frame distance 1, as a share of a frame in (0, 1]; "full", the default, is 1,
            "half" 0.5.
        decimation_width: bands narrower than this many tokens, by default 128, keep only every so many frame
            distances; "block" ties it to `block_size`.
        pattern: "radial", "dense" to keep everything, or one of patterns.py for comparison, made as dense as
            the radial mask of these options.
        density: kept share of all token pairs, text included, in (0, 1]. `radial_mask` then solves for
            decay_factor, neighbour, decimation_width and sink on each grid (density.py), starting from the
            values given here. With None, or with the dense pattern, it takes them as they are.
        compat: whose mask to make, block by block: "none" is this repository's, the others are those of
            published programs (compat.py). A program fixes the options of `FIXED`, which must be left out
            and stay None; its `decay_factor` is the default, if it has one.

    Raises:
        ValueError: a value outside the ones named above.
    """

    decay_factor: float | None = None
    block_size: int = 128
    sink: bool | int | None = None
    neighbour: float | str | None = None
    decimation_width: int | str | None = None
    pattern: str = "radial"
    density: float | None = None
    compat: str = "none"

    def __post_init__(self) -> None:
        choices = {"block_size": BLOCK_SIZES, "pattern": PATTERNS, "compat": tuple(COMPAT)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if COMPAT[self.compat] is not None:
            self._check_compat(COMPAT[self.compat])
        for name, default in DEFAULTS.items():
            if getattr(self, name) is None and (self.compat == "none" or name not in FIXED):
                object.__setattr__(self, name, default)
        factor = self.decay_factor
        if not isinstance(factor, int | float) or not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"decay_factor must be a finite number above 0, got {factor!r}")
        if self.compat != "none":
            return
        if self.neighbour not in NEIGHBOURS and not is_share(self.neighbour):
            raise ValueError(
                f"neighbour must be one of {NEIGHBOURS} or a number in (0, 1], got {self.neighbour!r}"
            )
        if self.density is not None and not is_share(self.density):
            raise ValueError(f"density must be None or a number in (0, 1], got {self.density!r}")
        if isinstance(self.decimation_width, str) and self.decimation_width != "block":
            raise ValueError(
                f"decimation_width must be an integer >= 1 or 'block', got {self.decimation_width!r}"
            )
        if self.decimation_width != "block":
            require_int("decimation_width", self.decimation_width, 1)
        if not isinstance(self.sink, bool):
            require_int("sink", self.sink, 0)

    def _check_compat(self, program: Program) -> None:
        """Sets the program's decay factor; ValueError for an option or value that it does not take."""
        with_it = f"with compat={self.compat!r}"
        for name in FIXED:
            if (given := getattr(self, name)) is not None:
                raise ValueError(f"{name} must be left out {with_it}, which fixes it, got {given!r}")
        if self.pattern not in ("radial", "dense"):
            raise ValueError(f"pattern must be 'radial' or 'dense' {with_it}, got {self.pattern!r}")
        if self.block_size not in program.block_sizes:
            raise ValueError(
                f"block_size must be one of {program.block_sizes} {with_it}, got {self.block_size!r}"
            )
        if self.decay_factor is None:
            object.__setattr__(self, "decay_factor", program.decay_factor)
        elif program.fixes_decay_factor and self.decay_factor != program.decay_factor:
            raise ValueError(
                f"decay_factor must be {program.decay_factor} {with_it}, got {self.decay_factor!r}"
            )

    @property
    def neighbour_share(self) -> float:
        """Returns `neighbour` as a number in (0, 1]."""
        return {"full": 1.0, "half": 0.5}.get(self.neighbour, self.neighbour)


def is_share(value: object) -> bool:
    """Tells whether a value is a number in (0, 1]; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def half_width(distance: int, tokens_per_frame: int, config: RadialConfig) -> int | None:
    """Returns the half-width of the band between two frames, in tokens; None if decimation drops the pair.

    Token `k` of one frame keeps token `l` of the other if `|k - l|` is at most this number (authors' code;
    eq. 4 of the paper has `s / 2^g - 1`). With `P2 = 2^floor(log2 s)` and `g = floor(log2 d)` it is
    `decay_factor P2 / 2^g`, at least a block. If `D = P2 / 2^g` is below the decimation width, only distances
    that `floor(width / D)` divides are kept.
    """
    if distance == 0:
        return tokens_per_frame
    power, level = 1 << (tokens_per_frame.bit_length() - 1), distance.bit_length() - 1
    width = config.block_size if config.decimation_width == "block" else config.decimation_width
    if distance % max(1, (width << level) // power):
        return None
    if distance == 1:
        return int(config.neighbour_share * tokens_per_frame)
    reach = max(config.decay_factor * power / (1 << level), config.block_size)
    # float32, the precision in which torch compares an integer tensor with a float
    return int(np.float32(min(reach, tokens_per_frame)))


def radial_rule_mask(grid: TokenGrid, config: RadialConfig) -> BlockMask:
    """Applies eq. 4 of the paper to blocks as the authors' code does; `config` has no density.

    Every pair of frames has a band of tokens around its diagonal (`half_width`); the sink adds all of
    frame 0, or of more first frames, as keys. In each block that the band meets, a column counts as filled
    if more than a third of the block's query tokens keep it. The block is kept if more than 60 % of the
    columns that the band touches are filled. A block that several frame pairs share is kept if one of them
    alone asks for it. Blocks with any text token are kept whole.

    The band is defined on the places of tokens in the sequence of their frame, in the grid's order. The paper
    and the authors have raster order. In another order the rule stays as it is, and with it every block of
    the mask and its density, but a block holds other tokens: those near each other in that order.

    No token is dropped. If the grid is not a multiple of the block, this goes beyond the authors' code:
    the last block is short, and "a third of its query tokens" counts only the ones it has; a frame that
    starts inside a block is followed to its end; every query block keeps its own block. If frames are
    whole blocks, the result equals theirs bit for bit. With frames under a third of a block no pair of
    frames can fill a column, and little more than the diagonal remains: take a smaller block.

    Returns:
        `BlockMask` with `blocks` bool `[Q, Q]`, shared by all heads.
    """
    width = partial(half_width, tokens_per_frame=grid.tokens_per_frame, config=config)
    return BlockMask(grid, config.block_size, torch.from_numpy(band_blocks(grid, config, width)))


def band_blocks(grid: TokenGrid, config: RadialConfig, half_width: Callable[[int], int | None]) -> np.ndarray:
    """Applies the block rule to bands of any width, bool `[Q, Q]`, in time linear in the frame pairs.

    `half_width` maps a frame distance to tokens, or to None to keep none of its pairs. Sink, text and
    diagonal are kept as in `radial_rule_mask`.
    """
    frame, frames = grid.tokens_per_frame, grid.frames
    count = grid.num_blocks(config.block_size)
    blocks = np.zeros((count, count), dtype=bool)
    pattern = lru_cache(maxsize=4096)(partial(pair_blocks, frame, config.block_size))
    for distance in range(frames):
        width = half_width(distance)
        if width is not None:
            stamp = partial(_stamp, blocks, grid, config.block_size, partial(pattern, width=width))
            stamp(queries=range(frames - distance), key=distance, step=1)
            stamp(queries=range(distance, frames), key=0, step=1)
    for seen in range(min(config.sink, frames)):
        stamp = partial(_stamp, blocks, grid, config.block_size, partial(pattern, width=frame))
        stamp(queries=range(frames), key=seen, step=0)
    np.fill_diagonal(blocks, True)
    if grid.text:
        blocks[grid.video_tokens // config.block_size :] = True
        blocks[:, grid.video_tokens // config.block_size :] = True
    return blocks


def _stamp(
    blocks: np.ndarray, grid: TokenGrid, block: int, pattern: Callable, *, queries: range, key: int, step: int
) -> None:
    """Keeps the blocks `pattern(row, column, last_rows)` of the frame pairs `(queries[t], key + step t)`.

    Frames that begin equally far into a block come every `period` frames and share one pattern.
    """
    frame, count = grid.tokens_per_frame, len(blocks)
    period = block // math.gcd(frame, block)
    stride = period * frame // block * (count + step)
    for start, repeats, last_rows in _runs(grid, block, period, queries):
        row, column = start * frame, (key + step * (start - queries.start)) * frame
        kept = pattern(row % block, column % block, last_rows)
        corner = blocks[row // block :, column // block :]
        target = as_strided(corner, (repeats, *kept.shape), (stride, count, 1))
        target |= kept


def _runs(grid: TokenGrid, block: int, period: int, queries: range) -> Iterator[tuple[int, int, int]]:
    """Splits query frames into runs `(first, how many, tokens of the last block)`, a `period` apart.

    Frames that reach into a short last block stand alone, because its tokens count differently. With text
    that block is kept whole anyway.
    """
    short = 0 if grid.text else grid.tokens % block
    border = (grid.tokens - short) // grid.tokens_per_frame
    whole = range(queries.start, min(queries.stop, border))
    for first in whole[:period]:
        yield first, len(whole[first - whole.start :: period]), block
    for first in range(max(queries.start, border), queries.stop):
        yield first, 1, short


def _frame_edges(offset: int, frame: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns start and end, counted from the frame's first token, of its part of each block that it touches.

    The frame of `frame` tokens begins `offset` tokens into its first block.
    """
    edges = np.arange(-(-(offset + frame) // block) + 1) * block - offset
    return np.maximum(edges[:-1], 0), np.minimum(edges[1:], frame)


def pair_blocks(frame: int, block: int, row: int, column: int, last_rows: int, *, width: int) -> np.ndarray:
    """Returns blocks kept between frames that begin `row` and `column` tokens into a block, bool `[Q', K']`.

    `last_rows` is the number of tokens in the last of the query blocks.
    """
    rows = tuple(edge[:, None] for edge in _frame_edges(row, frame, block))
    columns = _frame_edges(column, frame, block)
    tokens = np.full_like(rows[0], block)
    tokens[-1] = last_rows
    filled = _columns_with(tokens // 3 + 1, rows, columns, width)
    touched = _columns_with(1, rows, columns, width)
    return 5 * filled > 3 * touched


def _columns_with(least: np.ndarray | int, rows: tuple, columns: tuple, width: int) -> np.ndarray:
    """Counts the columns of each block that keep at least `least` rows; `|row - column| <= width` is kept.

    Column `l` keeps `min(r1, l + width + 1) - max(r0, l - width)` of the rows `r0 <= k < r1`. Solved for
    `l`, this is an interval.
    """
    first = np.maximum(columns[0], rows[0] + least - 1 - width)
    end = np.minimum(columns[1], rows[1] - least + width + 1)
    enough = (rows[1] - rows[0] >= least) & (2 * width + 1 >= least)
    return np.where(enough, np.maximum(end - first, 0), 0)
