"""What a Triton kernel reads of a mask, and what it is compiled for."""

from torch import Tensor

from ..tiles import Extent, key_tiles, query_tiles
from .triton_configs import Launch, launch, padded


def tables(
    kind: str, query: Tensor, blocks: Tensor, block_size: int, video_tokens: int, counts: Tensor | None
) -> tuple[Launch, list[Tensor], dict]:
    """The launch of a kernel of `KINDS`, its lists (offsets, starts, patterns) and its constants.

    Where mixed tiles hold no block that is left out, `starts` stands in for the patterns.

    Args:
        query: `[B, S, H, D]`.
        blocks: of the mask, bool `[Q, K]` or `[H, Q, K]` on the CPU.
        video_tokens: position where the text begins; `counts`: None where no text is padded.
    """
    chosen, (tokens, width) = launch(kind, query.device, query.shape[-1]), query.shape[1::2]
    extent = Extent(tokens, block_size, tokens if counts is None else video_tokens)
    cut = key_tiles if kind == "key gradients" else query_tiles
    tiles = cut(blocks, extent, chosen.rows, chosen.columns, query.device)
    lists = [tiles.offsets, tiles.starts, tiles.starts if tiles.patterns is None else tiles.patterns]
    constants = {
        "ROWS": chosen.rows,
        "COLUMNS": chosen.columns,
        "WIDTH": width,
        "PADDED": padded(width),
        "SIZE": block_size,
        "PER_HEAD": blocks.ndim == 3,
        "MIXED": tiles.mixed,
        "BLOCKS": tiles.patterns is not None,
        "LENGTHS": counts is not None,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    return chosen, lists, constants
