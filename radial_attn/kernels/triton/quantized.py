"""Runs quantised block-sparse attention in Triton, forward only: the operator around its kernels."""

import torch
from torch import Tensor

from .configs import LOG2E, Launch, padded
from .tables import tables

ROOM = 128  # sequences are padded to a multiple of this many tokens, which every tile divides
INT8_TOP, FP8_TOP = 127.0, 448.0
FP8 = torch.float8_e4m3fn
BITS = {"int8": (torch.int8, INT8_TOP), "fp8": (FP8, FP8_TOP)}


@torch.library.custom_op("radial_attn::triton_attention_quantized", mutates_args=())
def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    counts: Tensor | None,
    scale: float,
    bits: str,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and log-sum-exp, float32 `[B, H, S]`, with quantised scores.

    `bits`: "int8" or "fp8". Further arguments are as in `triton_attention`. Besides the results a call
    allocates the 8-bit copies of its inputs and their scales.
    """
    from .quantized_forward import quantized_forward_kernel

    with torch.cuda.device_of(query):
        batch, tokens, heads, _ = query.shape
        chosen, lists, constants = tables(bits, query, blocks, block_size, video_tokens, counts)
        mean = key.mean(dim=1, dtype=torch.float32)
        room = -(-tokens // ROOM) * ROOM
        queries, query_scales, shifts = quantize_queries(query, mean, room, scale * LOG2E, bits)
        keys, key_scales = quantize_keys(key, mean, room, chosen.columns, bits)
        values, tops = quantize_values(value, room) if chosen.fp8_values else (value, mean)
        out = query.new_empty(query.shape)
        lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        quantized_forward_kernel[lists[0].shape[1], batch * heads](
            queries,
            *described(keys, values, chosen),
            query_scales,
            shifts,
            key_scales,
            tops,
            out,
            lse,
            *lists,
            lse if counts is None else counts,
            *value.stride()[:3],
            *out.stride()[:3],
            tokens,
            room,
            heads,
            **constants,
            FP8_VALUES=chosen.fp8_values,
            TOP=FP8_TOP,
            DESCRIPTOR=bool(chosen.descriptors),
        )
    return out, lse


@quantized_attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _width = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


def quantize_queries(query: Tensor, mean: Tensor, room: int, scale: float, bits: str) -> tuple[Tensor, ...]:
    """Returns bits `[B, H, room, P]` of query times `scale`, scales and shifts, float32 `[B, H, room]`."""
    from .quantize import quantize_queries_kernel

    batch, tokens, heads, width = query.shape
    dtype, top = BITS[bits]
    out = query.new_empty((batch, heads, room, padded(width)), dtype=dtype)
    scales, shifts = (query.new_empty((batch, heads, room), dtype=torch.float32) for _ in range(2))
    quantize_queries_kernel[room // ROOM, batch * heads](
        query,
        mean,
        out,
        scales,
        shifts,
        *query.stride()[:3],
        tokens,
        room,
        heads,
        scale,
        **shape(width, ROOM, top),
    )
    return out, scales, shifts


def quantize_keys(key: Tensor, mean: Tensor, room: int, columns: int, bits: str) -> tuple[Tensor, Tensor]:
    """Returns bits `[B, H, room, P]` of key minus mean key, and one scale for each `columns` tokens."""
    from .quantize import quantize_keys_kernel

    batch, tokens, heads, width = key.shape
    dtype, top = BITS[bits]
    out = key.new_empty((batch, heads, room, padded(width)), dtype=dtype)
    scales = key.new_empty((batch, heads, room // columns), dtype=torch.float32)
    quantize_keys_kernel[room // columns, batch * heads](
        key, mean, out, scales, *key.stride()[:3], tokens, room, heads, **shape(width, columns, top)
    )
    return out, scales


def quantize_values(value: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Returns value in fp8 `[B, H, P, room]`, and the largest magnitude of each channel, `[B, H, D]`."""
    from .quantize import quantize_values_kernel

    batch, tokens, heads, width = value.shape
    out = value.new_empty((batch, heads, padded(width), room), dtype=FP8)
    tops = torch.linalg.vector_norm(value, float("inf"), dim=1)
    quantize_values_kernel[room // ROOM, batch * heads](
        value, tops, out, *value.stride()[:3], tokens, room, heads, **shape(width, ROOM, FP8_TOP)
    )
    return out, tops


def shape(width: int, rows: int, top: float) -> dict:
    """Returns the constants for which a quantising kernel is compiled."""
    return {"TOP": top, "ROWS": rows, "WIDTH": width, "PADDED": padded(width), "num_warps": 8}


def described(keys: Tensor, values: Tensor, chosen: Launch) -> tuple:
    """Returns keys and values as the kernel takes them: pointers, or descriptors of their rows."""
    if not chosen.descriptors:
        return keys, values
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, channels = keys.flatten(0, 2), values.flatten(0, 2)
    return (
        TensorDescriptor.from_tensor(rows, [chosen.columns, rows.shape[1]]),
        TensorDescriptor.from_tensor(channels, [values.shape[2], chosen.columns]),
    )
