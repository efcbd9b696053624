"""Runs block-sparse flash attention in Triton, forward and backward, in float16 and bfloat16 on a GPU.

The mask becomes lists of tiles (tiles.py) once, inside the operators, so a compiled graph holds only the
operators. After that a call allocates its outputs, launches one kernel forward and three backward, and does
nothing else on the host.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...block_mask import BlockMask, Part
from ..contract import DTYPES, HALF, QUANTIZE, Call, Needs
from ..operator import register
from .configs import LAUNCHES, LOG2E, WIDTHS, architecture, padded
from .launch import run_forward
from .tables import partial_tables, tables

ROWS = 64  # for each program that multiplies outputs and their gradients


def no_tensor_cores(call: Call) -> str | None:
    """Says why the GPU of a call cannot multiply in the bits of its `quantize`; None if it can."""
    if call.quantize is None or call.device.type != "cuda" or not torch.cuda.is_available():
        return None
    arch = architecture(call.device)
    return None if (call.quantize, 64) in LAUNCHES[arch] else f"has no quantize={call.quantize!r} on {arch}"


ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # runs in Triton's interpreter
DEVICES = ("cpu",) if ON_CPU else ("cuda",)
NEEDS = Needs(
    devices=DEVICES,
    dtypes=DTYPES if ON_CPU else HALF,
    widths=WIDTHS,
    modules=("triton",),
    capability=(8, 0),
    quantize=QUANTIZE,
    partial=True,
    far_field=True,
    far_backward=DEVICES,
    also=no_tensor_cores,
    install="pip install triton",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    text_lengths: Tensor | None,
    scale: float,
    quantize: str | None = None,
) -> Tensor:
    """Computes attention over the kept blocks of `mask`; all tensors `[B, S, H, D]` on one GPU.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
        quantize: "int8" or "fp8" for scores from 8-bit operands (quantized.py), forward only.

    Raises:
        ValueError: a scale that is not positive.
    """
    inputs = checked((query, key, value), scale)
    counts = mask.token_counts(text_lengths, query.device)
    shape = mask.blocks, mask.block_size, mask.grid.video_tokens
    if quantize is not None:
        from .quantized import quantized_attention

        return quantized_attention(*inputs, *shape, counts, scale, quantize)[0]
    return triton_attention(*inputs, *shape, counts, scale)[0]


def checked(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Returns the tensors with steps of 1 along the width; raises ValueError for a scale up to 0."""
    if scale <= 0:
        raise ValueError(f"backend 'triton' takes a positive scale, got {scale}")
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, part: Part, *, text_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, Q, H, D]` and float32 log-sum-exp `[B, Q, H]`, over keys `[B, K, H, D]` on one GPU.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ValueError: a scale that is not positive.
    """
    inputs = checked((query, key, value), scale)
    counts = None, None
    if text_lengths is not None:
        padding = part.text - text_lengths
        texts = (key.shape[1], part.key_text), (query.shape[1], part.row_text)
        counts = [(n - padding.clamp(max=text)).to(query.device, torch.int32) for n, text in texts]
    launch_tables = partial_tables(query, key, part, text_lengths is not None)
    out, lse = run_forward(inputs, launch_tables, counts, scale)
    return out, lse.transpose(1, 2)


def with_far_field(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    far: Any,
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and float32 log-sum-exp `[B, S, H]`; `far`: a `Far` of far_field.py.

    Raises:
        ValueError: a scale that is not positive.
    """
    inputs = checked((query, key, value), scale)
    counts = mask.token_counts(text_lengths, query.device)
    shape = mask.blocks, mask.block_size, mask.grid.video_tokens
    launch_tables = tables("far field", query, *shape, counts)
    out, lse = run_forward(inputs, launch_tables, (counts, counts), scale, far)
    return out, lse.transpose(1, 2)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Returns gradients through the kept blocks; output and log-sum-exp `[B, S, H]` may cover more keys."""
    inputs = *checked((query, key, value), scale), out, lse.transpose(1, 2).contiguous()
    counts = mask.token_counts(text_lengths, query.device)
    shape = mask.blocks, mask.block_size, mask.grid.video_tokens
    return triton_attention_backward(grad, None, *inputs, *shape, counts, scale)


@torch.library.custom_op("radial_attn::triton_attention", mutates_args=())
def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    counts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and log-sum-exp, float32 `[B, H, S]`.

    Args:
        blocks: bool `[Q, K]` or `[H, Q, K]` on the CPU; its tile lists are cached on this tensor.
        video_tokens: position at which the text begins.
        counts: tokens of each sample that count, int32 `[B]` on the device, or None for all.
    """
    launch_tables = tables("forward", query, blocks, block_size, video_tokens, counts)
    return run_forward((query, key, value), launch_tables, (counts, counts), scale)


@torch.library.custom_op("radial_attn::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad: Tensor,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    counts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of query, key and value, `[B, S, H, D]`, from gradients of output and log-sum-exp.

    `lse_grad` may be None. Further arguments are as in `triton_attention`.
    """
    from .backward import key_gradients_kernel, query_gradient_kernel

    batch, tokens, heads, _ = query.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    results = [query.new_empty(query.shape) for _ in range(3)]
    products = row_products(out, grad, lse)
    if lse_grad is not None:
        products -= lse_grad
    strides = [s for x in (query, key, value, grad, results[0]) for s in x.stride()[:3]]
    for kernel, kind, targets in (
        (query_gradient_kernel, "query gradient", results[:1]),
        (key_gradients_kernel, "key gradients", results[1:]),
    ):
        _, lists, constants = tables(kind, query, blocks, block_size, video_tokens, counts)
        with torch.cuda.device_of(query):
            kernel[lists[0].shape[1], batch * heads](
                query,
                key,
                value,
                grad,
                *targets,
                lse,
                products,
                *lists,
                lse if counts is None else counts,
                *strides,
                tokens,
                heads,
                scale * LOG2E,
                scale,
                **constants,
            )
    return tuple(results)


def row_products(out: Tensor, grad: Tensor, lse: Tensor) -> Tensor:
    """Sums output times its gradient over the width: float32 `[B, H, S]` as `lse`."""
    from .backward import row_products_kernel

    batch, tokens, heads, width = out.shape
    products = torch.empty_like(lse)
    with torch.cuda.device_of(out):
        row_products_kernel[-(-tokens // ROWS), batch * heads](
            out,
            grad,
            products,
            tokens,
            heads,
            *out.stride()[:3],
            *grad.stride()[:3],
            ROWS=ROWS,
            WIDTH=width,
            PADDED=padded(width),
            num_warps=8,
        )
    return products


register(triton_attention, triton_attention_backward, heads_first=True)
