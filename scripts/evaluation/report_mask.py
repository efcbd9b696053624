"""A block mask as the report's page draws it: kinds of blocks in runs, and the kept share of frame pairs."""

from dataclasses import fields
from typing import Any

import numpy as np

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.masks.draw import SINK_COLOUR, TEXT_COLOUR, layers
from scripts.run.errors import UsageError, one_line

MOST_BLOCKS = 4096  # a side: as many pixels as the smallest canvas of a browser has
KINDS = {SINK_COLOUR: "sink", TEXT_COLOUR: "text"}
KNOWN = {field.name for field in fields(RadialConfig)}


def mask_of(sizes: list[int], options: dict[str, Any], where: str) -> tuple[TokenGrid, RadialConfig]:
    """Grid and options as a run's JSON has them: `[frames, height, width]` or with text, and the fields.

    Raises:
        UsageError: what is no grid or no option of a mask.
    """
    try:
        grid = TokenGrid(*sizes)
        config = RadialConfig(**{key: value for key, value in options.items() if key in KNOWN})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: is no mask of a grid: {one_line(error)}") from error
    return grid, config


def packed_mask(grid: TokenGrid, config: RadialConfig) -> dict[str, Any]:
    """What the page needs to draw a mask and to name its parts, as JSON.

    `runs` goes through the blocks row by row: kind, length, kind, length, ...; kind 0 is dropped, kind n
    is `legend[n - 1]`. `shares` is the kept share of the token pairs of each pair of frames, `[F][F]`, with
    text as one more frame.

    Raises:
        ValueError: no such mask, or more blocks than a canvas has pixels.
    """
    count = grid.num_blocks(config.block_size)
    if count > MOST_BLOCKS:
        raise ValueError(f"{count} blocks a side, of which a page can show {MOST_BLOCKS}")
    mask = radial_mask(grid, config)
    kept = mask.blocks.numpy()
    kinds, legend = np.zeros((count, count), dtype=np.uint8), []
    for number, layer in enumerate(layers(grid, config), 1):
        of_layer = layer.member & kept
        kinds[of_layer] = number
        share = float(of_layer.sum() / kept.sum())
        kind = KINDS.get(layer.colour, "band") if isinstance(layer.colour, str) else "band"
        legend.append({"label": layer.label, "kind": kind, "share": round(share, 4)})
    return {
        "grid": [grid.frames, grid.height, grid.width, grid.text],
        "block_size": config.block_size,
        "count": count,
        "density": mask.density,
        "legend": legend,
        "runs": runs(kinds.ravel()),
        "shares": np.round(pair_shares(mask), 4).tolist(),
    }


def runs(values: np.ndarray) -> list[int]:
    """Value and length of each stretch of equal values, in turn."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0] + 1))
    lengths = np.diff(starts, append=len(values))
    return np.stack([values[starts], lengths], axis=1).ravel().tolist()


def pair_shares(mask: BlockMask) -> np.ndarray:
    """Kept share of the token pairs of query and key frame, float64 `[F, F]`; text is the last one."""
    grid, size = mask.grid, mask.block_size
    edges = np.append(np.arange(grid.frames + 1) * grid.tokens_per_frame, [grid.tokens] * (grid.text > 0))
    starts = np.arange(grid.num_blocks(size)) * size
    ends = np.minimum(starts + size, grid.tokens)
    inside = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], starts)
    tokens = np.maximum(inside, 0).astype(np.float64)  # of frame i in block b
    lengths = np.diff(edges)
    return tokens @ mask.blocks.numpy().astype(np.float64) @ tokens.T / np.outer(lengths, lengths)
