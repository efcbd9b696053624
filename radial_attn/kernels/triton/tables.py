"""Makes the lists that a Triton kernel reads of a mask, and the constants for which it is compiled."""

from torch import Tensor

from ...block_mask import Part
from .configs import Launch, launch, padded
from .tiles import Extent, key_tiles, query_tiles


def tables(
    kind: str, query: Tensor, blocks: Tensor, block_size: int, video_tokens: int, counts: Tensor | None
) -> tuple[Launch, list[Tensor], dict]:
    """Returns the launch of a kernel of `KINDS`, its lists (offsets, starts, patterns) and its constants.

    If no mixed tile holds a block that is left out, `starts` stands in for the patterns.

    Args:
        query: `[B, S, H, D]`.
        blocks: the mask's, bool `[Q, K]` or `[H, Q, K]` on the CPU.
        video_tokens: position at which the text begins.
        counts: None if no text is padded.
    """
    tokens = query.shape[1]
    extent = Extent(tokens, block_size, tokens if counts is None else video_tokens)
    return _tables(kind, query, blocks, extent, counts is not None)


def partial_tables(
    query: Tensor, key: Tensor, part: Part, padded_text: bool
) -> tuple[Launch, list[Tensor], dict]:
    """Returns the same for the forward kernel over part of the keys; `padded_text`: some text is padding."""
    rows, keys = query.shape[1], key.shape[1]
    extent = Extent(keys, part.block_size, keys - part.key_text if padded_text else keys, rows)
    return _tables("forward", query, part.blocks, extent, padded_text)


def _tables(
    kind: str, query: Tensor, blocks: Tensor, extent: Extent, lengths: bool
) -> tuple[Launch, list[Tensor], dict]:
    chosen, width = launch(kind, query.device, query.shape[-1]), query.shape[-1]
    cut = key_tiles if kind == "key gradients" else query_tiles
    tiles = cut(blocks, extent, chosen.rows, chosen.columns, query.device)
    lists = [tiles.offsets, tiles.starts, tiles.starts if tiles.patterns is None else tiles.patterns]
    constants = {
        "ROWS": chosen.rows,
        "COLUMNS": chosen.columns,
        "WIDTH": width,
        "PADDED": padded(width),
        "SIZE": extent.block_size,
        "PER_HEAD": blocks.ndim == 3,
        "MIXED": tiles.mixed,
        "BLOCKS": tiles.patterns is not None,
        "LENGTHS": lengths,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    return chosen, lists, constants
