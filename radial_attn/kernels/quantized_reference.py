"""Defines attention on 8-bit operands in plain PyTorch, to test the quantised kernels.

The kernels differ only in the order of sums and in rounding: they round weights against the largest score so
far, this file against the largest of the row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TOPS = {"int8": 127.0, "fp8": 448.0}
FP8 = torch.float8_e4m3fn
BOOST = 256.0  # weights are rounded to fp8 in [0, 256]
LEAST = 1e-12  # a scale is never zero


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    scale: float,
    bits: str,
    columns: int = 64,
    fp8_values: bool = True,
) -> Tensor:
    """Computes attention with scores from `bits` ("int8" or "fp8"): float32 `[B, H, S, D]` in and out.

    Args:
        keep: bool, the (query, key) pairs that count, broadcast to `[B, H, S, S]`; every row keeps one.
        columns: tokens of a group of keys that shares a scale.
        fp8_values: weights x values in fp8 too.
    """
    queries, query_scales = quantize(query * scale, bits, (-1,))
    smooth = key - key.mean(dim=2, keepdim=True)
    groups = F.pad(smooth, (0, 0, 0, -key.shape[2] % columns)).unflatten(2, (-1, columns))
    keys, key_scales = quantize(groups, bits, (-1, -2))
    keys = (keys * key_scales).flatten(2, 3)[:, :, : key.shape[2]]
    scores = ((queries * query_scales) @ keys.mT).masked_fill(~keep, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if not fp8_values:
        return weights @ value / total
    values, value_scales = quantize(value, "fp8", (-2,))
    return (to_fp8(weights * BOOST) @ values) * (value_scales / BOOST) / total


def quantize(tensor: Tensor, bits: str, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns rounded numbers up to `TOPS[bits]` and their scale, which the dimensions `dims` share."""
    scales = tensor.abs().amax(dim=dims, keepdim=True).clamp(min=LEAST) / TOPS[bits]
    numbers = tensor / scales
    return (numbers.round() if bits == "int8" else to_fp8(numbers)), scales


def to_fp8(numbers: Tensor) -> Tensor:
    """Rounds float32 numbers to the values of fp8 e4m3, in float32."""
    return numbers.to(FP8).float()
