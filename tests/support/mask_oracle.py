"""The radial rule written out on tokens, slow and plain: the oracle of the mask's tests."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radial_attn import RadialConfig, TokenGrid

PROGRAMS = {  # options of each published program without and with text, as its source has them
    "authors-2025-06": ({"neighbour": "half"}, {}),
    "authors-2025-11": ({}, {"sink": False}),
    "kijai": ({"neighbour": "half", "decimation_width": "block"}, None),
    "woct0rdho": ({"neighbour": "half"}, None),
    "lightx2v": ({"neighbour": "half"}, None),
}


def stored_masks(name: str) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The masks of a file of `tests/data`, which other programs made: options and blocks, bool `[Q, Q]`."""
    with np.load(Path(__file__).parents[1] / "data" / name) as data:
        for number, meta in enumerate(json.loads(str(data["meta"]))):
            rows, columns = meta["blocks"]
            bits = np.unpackbits(data[f"mask{number}"])[: rows * columns]
            yield meta, torch.from_numpy(bits.reshape(rows, columns).astype(bool))


def equation_four(frames: int, tokens_per_frame: int, sink: bool = True) -> Tensor:
    """Eq. 4 of the paper as it stands, bool `[n, n]`; a frame keeps itself, as `g = 0` at `d = 0`."""
    s = tokens_per_frame
    index = torch.arange(frames * s)
    i, k = index[:, None] // s, index[:, None] % s
    j, l = index[None, :] // s, index[None, :] % s  # noqa: E741
    d = (i - j).abs()
    g = torch.floor(torch.log2(d.clamp(min=1).double()))
    window = (2**g <= s) & ((k - l).abs() + 1 <= s / 2**g)
    diagonal = (d % torch.ceil(2**g / s) == 0) & (k == l)
    return window | diagonal | (sink & (j == 0))


def pair_rule(query_frame: int, key_frame: int, tokens_per_frame: int, config: RadialConfig) -> Tensor:
    """The tokens that the authors' code keeps between two frames, bool `[s, s]`."""
    s, d = tokens_per_frame, abs(query_frame - key_frame)
    k, l = torch.arange(s)[:, None], torch.arange(s)[None, :]  # noqa: E741
    if d == 0 or key_frame < config.sink:
        return torch.ones(s, s, dtype=torch.bool)
    reach = 2 ** math.floor(math.log2(s)) / 2 ** math.floor(math.log2(d))
    threshold = config.block_size if config.decimation_width == "block" else config.decimation_width
    if reach < threshold and d % int(threshold / reach) != 0:
        return torch.zeros(s, s, dtype=torch.bool)
    width = max(config.decay_factor * reach, config.block_size)
    if d == 1:
        width = {"full": s, "half": s // 2}.get(config.neighbour)
        width = math.floor(config.neighbour * s) if width is None else width
    return (k - l).abs() <= width


def places(grid: TokenGrid) -> Tensor:
    """The raster index of each token of the sequence, int64 `[S]`, from lists of rows and columns."""
    frame = [(y, x) for y in range(grid.height) for x in range(grid.width)]
    if grid.order == "tiles":
        frame.sort(key=lambda place: (place[0] // 8, place[1] // 8, place[0] % 8, place[1] % 8))
    if grid.order == "hilbert":
        side = 1
        while side < max(grid.height, grid.width):
            side *= 2
        frame = [(y, x) for y, x in _curve(side) if y < grid.height and x < grid.width]
    starts = range(0, grid.video_tokens, grid.tokens_per_frame)
    video = [start + y * grid.width + x for start in starts for y, x in frame]
    return torch.tensor([*video, *range(grid.video_tokens, grid.tokens)])


def _curve(side: int) -> list[tuple[int, int]]:
    """The Hilbert curve from the first row and column to the first row and last column."""
    if side == 1:
        return [(0, 0)]
    half, quarter = side // 2, _curve(side // 2)
    across = [(x, y) for y, x in quarter]
    below = [(y + half, x) for y, x in quarter]
    above = [(half - 1 - y, side - 1 - x) for y, x in across]
    return [*across, *below, *((y, x + half) for y, x in below), *above]


def pool(tokens: Tensor, block_size: int) -> Tensor:
    """Blocks in which over 60 % of the touched columns hold over a third of the rows, bool `[Q, Q]`."""
    pieces = [row.split(block_size, dim=1) for row in tokens.split(block_size, dim=0)]
    return torch.tensor([[_keeps(piece) for piece in row] for row in pieces])


def _keeps(piece: Tensor) -> bool:
    columns = piece.sum(dim=0)
    touched, filled = int((columns > 0).sum()), int((columns * 3 > len(piece)).sum())
    return touched > 0 and filled / touched > 0.6


def token_rule(grid: TokenGrid, config: RadialConfig) -> Tensor:
    """The code's rule on all tokens of a grid, text included, bool `[S, S]`."""
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            mask[_frame(grid, i), _frame(grid, j)] = pair_rule(i, j, grid.tokens_per_frame, config)
    return mask


def block_rule(grid: TokenGrid, config: RadialConfig) -> Tensor:
    """The block mask by brute force, bool `[Q, Q]`: every frame pair expanded, pooled and OR-ed."""
    size = config.block_size
    blocks = torch.eye(grid.num_blocks(size), dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            tokens = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
            tokens[_frame(grid, i), _frame(grid, j)] = pair_rule(i, j, grid.tokens_per_frame, config)
            rows, columns = _touched(grid, i, size), _touched(grid, j, size)
            window = tokens[rows.start * size : rows.stop * size, columns.start * size : columns.stop * size]
            blocks[rows, columns] |= pool(window, size)
    is_text = torch.arange(grid.tokens) >= grid.video_tokens
    text = torch.tensor([bool(part.any()) for part in is_text.split(size)])
    return blocks | text[:, None] | text[None, :]


def program_rule(grid: TokenGrid, name: str, block_size: int, decay_factor: float) -> Tensor | None:
    """The block mask of a published program by brute force, bool `[Q, Q]`; None if it serves no such grid."""
    options, size = PROGRAMS[name][grid.text > 0], block_size
    pads, pairs = name == "woct0rdho", size == 64 and name in ("kijai", "woct0rdho")
    count = -(-grid.tokens // size)
    whole = {"kijai": grid.tokens_per_frame, "authors-2025-11": grid.video_tokens}.get(name, 0)
    if options is None or whole % size or (pairs and count % 2):
        return None
    config = RadialConfig(decay_factor, size, **options)
    video = count * size if pads else grid.video_tokens
    length = video // grid.frames
    touched = math.ceil(length / size)
    blocks = torch.zeros(count, count, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            (row, above), (column, left) = divmod(i * length, size), divmod(j * length, size)
            tokens = torch.zeros(above + length + size, left + length + size, dtype=torch.bool)
            tokens[above : above + length, left : left + length] = pair_rule(i, j, length, config)
            kept = pool(tokens[: touched * size, : touched * size], size)
            if pads:
                kept[0, 0] = kept[-1, -1] = True
            blocks[row : row + touched, column : column + touched] |= kept
    last = torch.arange(count) >= video // size
    blocks |= last[:, None] | last
    if pairs:
        blocks = blocks.unflatten(0, (-1, 2)).any(1).repeat_interleave(2, 0)
    return blocks if blocks.any(1).all() else None


def _frame(grid: TokenGrid, frame: int) -> slice:
    return slice(frame * grid.tokens_per_frame, (frame + 1) * grid.tokens_per_frame)


def _touched(grid: TokenGrid, frame: int, block_size: int) -> slice:
    """The blocks that hold a token of the frame."""
    tokens = _frame(grid, frame)
    return slice(tokens.start // block_size, (tokens.stop - 1) // block_size + 1)
