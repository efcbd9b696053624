"""Defines the token grid of a video: the only place that rounds or counts tokens of a block."""

from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("raster", "tiles", "hilbert")
TILE = 8  # tokens of a tile in height and width


def require_int(name: str, value: object, least: int) -> None:
    """Raises ValueError unless `value` is an int (not a bool) and at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class TokenGrid:
    """Describes a sequence of video tokens, frame by frame, then `text` text tokens.

    Frames, height and width count tokens of the transformer, after patching. The sequence is contiguous, so a
    block may hold the end of the video and the start of the text. `order` says how the tokens of each frame
    follow each other:

    - "raster": row by row, token `(i, y, x)` has index `(i * height + y) * width + x`;
    - "tiles": squares of 8 x 8 tokens in raster order, each of them row by row, as in `fractal_flatten` of
      Kandinsky 5. Tiles at the far borders may be short;
    - "hilbert": along a Hilbert curve through the smallest square with a power of two that holds the frame.

    Masks are made of blocks of the sequence. So the distance of two tokens in the radial rule is that of
    their places in the sequence, whatever the order.

    Raises:
        ValueError: a size that is not a positive integer, negative text, or an unknown order.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    order: str = "raster"

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text", 0)):
            require_int(name, getattr(self, name), least)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")

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

    @property
    def raster_index(self) -> Tensor:
        """Returns the index in raster order of each token of the sequence, int64 `[S]`; text has its own."""
        places = torch.arange(self.tokens_per_frame, device="cpu")
        y, x = places // self.width, places % self.width
        if self.order == "tiles":
            tile = y // TILE * -(-self.width // TILE) + x // TILE
            places = ((tile * TILE + y % TILE) * TILE + x % TILE).argsort()
        elif self.order == "hilbert":
            places = _along_curve(y, x, 1 << (max(self.height, self.width) - 1).bit_length()).argsort()
        starts = torch.arange(self.frames, device="cpu")[:, None] * self.tokens_per_frame
        text = torch.arange(self.video_tokens, self.tokens, device="cpu")
        return torch.cat([(starts + places).flatten(), text])

    def num_blocks(self, block_size: int) -> int:
        """Counts the blocks that the sequence fills; the last one may be short."""
        require_int("block_size", block_size, 1)
        return -(-self.tokens // block_size)

    def block_tokens(self, block_size: int) -> Tensor:
        """Counts the valid tokens of each block, int64 `[num_blocks]`: `block_size`, or less in the last."""
        counts = torch.full((self.num_blocks(block_size),), block_size, dtype=torch.int64, device="cpu")
        counts[-1] = self.tokens - (len(counts) - 1) * block_size
        return counts


def _along_curve(y: Tensor, x: Tensor, side: int) -> Tensor:
    """Returns how far along the Hilbert curve of a square of `side` tokens each place is, int64."""
    along, half = torch.zeros_like(x), side // 2
    while half:
        down, right = y // half % 2, x // half % 2
        along += half**2 * ((3 * right) ^ down)
        turned = (down == 0) & (right == 1)  # the curve of this quarter runs the other way around
        y, x = (torch.where(turned, side - 1 - axis, axis) for axis in (y, x))
        y, x = torch.where(down == 0, x, y), torch.where(down == 0, y, x)
        half //= 2
    return along
