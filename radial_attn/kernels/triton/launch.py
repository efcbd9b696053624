"""Launches the Triton forward kernel, over all keys or a part of them, with a far field or without."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .configs import FAR_TILE, LOG2E, Launch, padded


def run_forward(
    inputs: Sequence[Tensor],
    found: tuple[Launch, list[Tensor], dict],
    counts: Sequence,
    scale: float,
    far: Any = None,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: output `[B, S, H, D]` and log-sum-exp, float32 `[B, H, S]`.

    `found`: the result of `tables`; `counts`: keys and rows of each sample that count, or None for all;
    `far`: a `Far` of far_field.py, or None.
    """
    from .forward import forward_kernel

    query, (chosen, lists, constants) = inputs[0], found
    batch, tokens, heads, _ = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    if chosen.descriptors:
        inputs = [aligned(x) for x in inputs]
    means, rest = far_operands(query, far, scale)
    pointers = operands([*inputs, *means], chosen)
    with torch.cuda.device_of(query):
        forward_kernel[lists[0].shape[1], batch * heads](
            *pointers[:3],
            out,
            lse,
            *lists,
            *(lse if count is None else count for count in counts),
            *(stride for x in (*inputs, out) for stride in x.stride()[:3]),
            tokens,
            inputs[1].shape[1],
            heads,
            scale * LOG2E,
            *(pointers[3:] or (None, None)),
            *rest,
            **constants,
            DESCRIPTOR=chosen.descriptors,
            SPECIALIZE=chosen.specialize,
        )
    return out, lse


def far_operands(query: Tensor, far: Any, scale: float) -> tuple[list[Tensor], list]:
    """Returns mean keys and values in the dtype of the query, and the kernel's last five arguments."""
    if far is None:
        return [], [None] * 5
    batch, _, heads, _ = query.shape
    bias = far.bias.contiguous().expand(batch, heads, -1, -1)
    slope = None if far.slope is None else (scale * far.slope).to(query.dtype)
    means = [x.to(query.dtype).contiguous() for x in (far.keys, far.values)]
    return means, [bias, slope, far.keys.shape[1], *bias.stride()[:2]]


def aligned(tensor: Tensor) -> Tensor:
    """Copies the tensor unless all its rows begin at a multiple of 16 bytes, as descriptors need."""
    steps = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1])]
    return tensor.clone(memory_format=torch.contiguous_format) if any(s % 16 for s in steps) else tensor


def operands(tensors: Sequence[Tensor], chosen: Launch) -> list:
    """Returns query, keys and values as the forward kernel takes them: all but the query may be descriptors.

    If the kernel makes descriptors itself, `scratch` becomes this thread's Triton allocator.
    """
    query, *others = tensors
    if chosen.descriptors == "head":
        import triton

        triton.set_allocator(scratch)
    if chosen.descriptors != "whole":
        return [query, *others]
    from triton.tools.tensor_descriptor import TensorDescriptor

    columns = [chosen.columns, chosen.columns, FAR_TILE, FAR_TILE]
    blocks = [[1, count, 1, padded(query.shape[-1])] for count in columns]
    return [query, *(TensorDescriptor.from_tensor(*pair) for pair in zip(others, blocks, strict=False))]


def scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Allocates memory of a launch, on the current device, for the descriptors that its programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
