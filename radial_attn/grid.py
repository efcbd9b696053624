"""Defines the token grid of a video: the only place that rounds or counts tokens of a block."""

from dataclasses import dataclass

import torch
from torch import Tensor


def require_int(name: str, value: object, least: int) -> None:
    """Raises ValueError unless `value` is an int (not a bool) and at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class TokenGrid:
    """Describes a sequence of video tokens, in raster order frame by frame, then `text` text tokens.

    Frames, height and width count tokens of the transformer, after patching: token `(i, y, x)` has index
    `(i * height + y) * width + x`. The sequence is contiguous, so a block may hold the end of the video
    and the start of the text.

    Raises:
        ValueError: a size that is not a positive integer, or negative text.
    """

    frames: int
    height: int
    width: int
    text: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text", 0)):
            require_int(name, getattr(self, name), least)

    @property
    def tokens_per_frame(self) -> int:
        """Counts the tokens of a frame, `s` in the paper."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """Counts the tokens of the video, `n = f s` in the paper."""
        return self.frames * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """Counts the tokens of the sequence, text included."""
        return self.video_tokens + self.text

    def num_blocks(self, block_size: int) -> int:
        """Counts the blocks that the sequence fills; the last one may be short."""
        require_int("block_size", block_size, 1)
        return -(-self.tokens // block_size)

    def block_tokens(self, block_size: int) -> Tensor:
        """Counts the valid tokens of each block, int64 `[num_blocks]`: `block_size`, or less in the last."""
        counts = torch.full((self.num_blocks(block_size),), block_size, dtype=torch.int64, device="cpu")
        counts[-1] = self.tokens - (len(counts) - 1) * block_size
        return counts
