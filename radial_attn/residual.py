"""Keeps what a sparse attention output lacked at a dense step, in few bytes, to add it at later steps."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

RESIDUALS = ("none", "mean", "int8", "int4", "output")
MEMORIES = ("device", "host")
SCALE_BYTES = 2  # a float16 scale for each token and head
LARGEST = {"int8": 127, "int4": 7}


def residual_bytes(
    kind: str, tokens: int, heads: int, width: int, *, block_size: int, itemsize: int, pinned: bool = False
) -> int:
    """Returns the bytes that the residual of a layer takes, for one sample and one call of a step.

    `pinned`: in host memory beside a GPU, where torch rounds each tensor up to a power of two.
    """
    match kind:
        case "none":
            tensors = []
        case "mean":
            tensors = [-(-tokens // block_size) * heads * width * itemsize]
        case "output":
            tensors = [tokens * heads * width * itemsize]
        case _:
            values = width if kind == "int8" else -(-width // 2)
            tensors = [tokens * heads * values, tokens * heads * SCALE_BYTES]
    return sum(1 << (size - 1).bit_length() if pinned else size for size in tensors)


@dataclass(frozen=True)
class Residual:
    """Holds the dense output minus the sparse one of a layer.

    Attributes:
        kind: "mean" of the tokens of a block, integers of each token, "int8" or "int4", or "output" for the
            whole dense output.
        values: `[B, Q, H, D]` or `[B, S, H, D]` in the dtype of the output, or int8 `[B, S, H, D]`, or uint8
            `[B, S, H, D / 2]` with two numbers in a byte.
        scales: float16 `[B, S, H, 1]`, or None for means.
        block_size: tokens of a block.
        width: head width `D`.
    """

    kind: str
    values: Tensor
    scales: Tensor | None
    block_size: int
    width: int

    @classmethod
    def of(cls, kind: str, dense: Tensor, sparse: Tensor, block_size: int) -> "Residual":
        """Makes the residual of two outputs `[B, S, H, D]`; `kind` is one of `RESIDUALS` but "none"."""
        width = dense.shape[-1]
        if kind == "output":
            return cls(kind, dense, None, block_size, width)
        left = dense.float() - sparse.float()
        if kind == "mean":
            return cls(kind, _block_means(left, block_size).to(dense.dtype), None, block_size, width)
        most = LARGEST[kind]
        # a scale of 0 would divide by 0; float16 ends at 6e-8
        scales = (left.abs().amax(-1, keepdim=True) / most).clamp(min=2.0**-24, max=65504).half()
        values = (left / scales.float()).round().clamp(-most, most).to(torch.int8)
        if kind == "int4":
            low, high = F.pad(values, (0, width % 2)).unflatten(-1, (-1, 2)).unbind(-1)
            values = ((low & 15) | (high << 4)).view(torch.uint8)
        return cls(kind, values, scales, block_size, width)

    @property
    def bytes(self) -> int:
        """Counts the bytes of its tensors."""
        return sum(x.numel() * x.element_size() for x in (self.values, self.scales) if x is not None)

    def to_host(self) -> "Residual":
        """Moves it to host memory, pinned if there is a GPU.

        The copy does not wait for the GPU, so only work on the same stream, such as `add_to`, may read it.
        """
        pin = torch.cuda.is_available()

        def copy(x: Tensor) -> Tensor:
            return torch.empty(x.shape, dtype=x.dtype, pin_memory=pin).copy_(x, non_blocking=pin)

        scales = None if self.scales is None else copy(self.scales)
        return replace(self, values=copy(self.values), scales=scales)

    def add_to(self, output: Tensor) -> Tensor:
        """Returns the output `[B, S, H, D]` with the residual added, in its dtype; copies do not wait."""
        values = self.values.to(output.device, non_blocking=True)
        if self.kind == "mean":
            spread = values.repeat_interleave(self.block_size, dim=1)[:, : output.shape[1]]
            return output + spread.to(output.dtype)
        if self.kind == "int4":
            packed = values.view(torch.int8)
            low, high = (packed << 4) >> 4, packed >> 4
            values = torch.stack([low, high], dim=-1).flatten(-2)[..., : self.width]
        scales = self.scales.to(output.device, non_blocking=True)
        return output + (values.float() * scales.float()).to(output.dtype)


def _block_means(x: Tensor, block_size: int) -> Tensor:
    """Averages the tokens of each block, `[B, Q, H, D]` of `[B, S, H, D]`; the last block may be short."""
    tokens = x.shape[1]
    blocks = F.pad(x, (0, 0, 0, 0, 0, -tokens % block_size)).unflatten(1, (-1, block_size))
    counts = torch.full((blocks.shape[1],), block_size, device=x.device)
    counts[-1] -= -tokens % block_size
    return blocks.sum(2) / counts[:, None, None]
