"""Block-sparse flash attention in Triton, forward and backward, in float16 and bfloat16 on a GPU.

The mask becomes lists of tiles (radial_attn/tiles.py) once; from then on a call allocates its outputs,
launches one kernel forward and three backward, and does nothing else on the host.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import DTYPES, HALF, QUANTIZE, Call, Needs
from ..block_mask import BlockMask
from ..tiles import key_tiles, query_tiles
from .triton_configs import BACKWARD, LAUNCHES, WIDTHS, Launch, architecture, constants, launch
from .triton_configs import padded as padded_width

LOG2E = 1 / math.log(2)
ROWS = 64  # of a program that multiplies outputs and their gradients


def no_tensor_cores(call: Call) -> str | None:
    """Why the GPU of a call cannot multiply what its `quantize` asks for."""
    if call.quantize is None or call.device.type != "cuda" or not torch.cuda.is_available():
        return None
    arch = architecture(call.device)
    return None if (call.quantize, 64) in LAUNCHES[arch] else f"has no quantize={call.quantize!r} on {arch}"


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own interpreter, on the CPU
NEEDS = Needs(
    devices=("cpu",) if INTERPRETED else ("cuda",),
    dtypes=DTYPES if INTERPRETED else HALF,
    widths=WIDTHS,
    modules=("triton",),
    capability=(8, 0),
    quantize=QUANTIZE,
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
    """Attention over the kept blocks of `mask`; all tensors `[B, S, H, D]` on one GPU.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
        quantize: "int8" or "fp8" for scores from 8-bit operands (triton_quantized.py), forward only.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"backend 'triton' takes a positive scale, got {scale}")
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    counts = lengths(text_lengths, mask, query.device)
    if quantize is not None:
        from .triton_quantized import quantized_attention

        tables, numbers = make_tables(mask, query, [quantize], padded=counts is not None)
        return quantized_attention(*inputs, tables, counts, numbers, scale, quantize)[0]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    kinds = ["forward", *(BACKWARD if gradients else ())]
    tables, numbers = make_tables(mask, query, kinds, padded=counts is not None)
    return triton_attention(*inputs, tables, counts, numbers, scale)[0]


def lengths(text_lengths: Tensor | None, mask: BlockMask, device: torch.device) -> Tensor | None:
    """Tokens of each sample that count, int32 `[B]` on the device; copied once for each distinct list."""
    if text_lengths is None:
        return None
    if torch.compiler.is_compiling():
        return (text_lengths + mask.grid.video_tokens).to(device, torch.int32)
    counts = tuple((text_lengths + mask.grid.video_tokens).tolist())
    return mask.cached(
        ("lengths", counts, device), lambda: torch.tensor(counts, dtype=torch.int32, device=device)
    )


def make_tables(
    mask: BlockMask, query: Tensor, kinds: Sequence[str], *, padded: bool
) -> tuple[list[Tensor], list[int]]:
    """What the kernels of `kinds` read of a mask: for each `(offsets, starts, patterns)`; and its numbers.

    `padded`: whether text lengths are given.

    The numbers are block size, whether each head has a pattern of its own, and for each kernel whether it has
    mixed tiles and whether these hold blocks that are left out; else `starts` stands in for the patterns.
    """
    tables, numbers = [], [mask.block_size, int(mask.heads is not None)]
    for kind in kinds:
        chosen = launch(kind, query.device, query.shape[-1])
        cut = key_tiles if kind == "key gradients" else query_tiles
        tiles = cut(mask, chosen.rows, chosen.columns, query.device, padded=padded)
        tables += [tiles.offsets, tiles.starts, tiles.starts if tiles.patterns is None else tiles.patterns]
        numbers += [int(tiles.mixed), int(tiles.patterns is not None)]
    return tables, numbers


@torch.library.custom_op("radial_attn::triton_attention", mutates_args=())
def triton_attention(  # noqa: PLR0917 (an operator's schema is positional)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Sequence[Tensor],
    lengths: Tensor | None,
    numbers: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, S, H, D]` and log-sum-exp, float32 `[B, H, S]`; `tables` and `numbers` of `make_tables`."""
    from .triton_forward import forward_kernel

    batch, tokens, heads, width = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    chosen = launch("forward", query.device, width)
    forward_kernel[tables[0].shape[1], batch * heads](
        *operands((query, key, value), chosen),
        out,
        lse,
        *tables[:3],
        lse if lengths is None else lengths,
        *(stride for x in (query, key, value, out) for stride in x.stride()[:3]),
        tokens,
        heads,
        scale * LOG2E,
        **constants(chosen, query, lengths, numbers),
        DESCRIPTOR=chosen.descriptors,
        SPECIALIZE=chosen.specialize,
    )
    return out, lse


@torch.library.custom_op("radial_attn::triton_attention_backward", mutates_args=())
def triton_attention_backward(  # noqa: PLR0917
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    lengths: Tensor | None,
    numbers: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, `[B, S, H, D]`; arguments as in `triton_attention`."""
    from .triton_backward import key_gradients_kernel, query_gradient_kernel, row_products_kernel

    batch, tokens, heads, width = query.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    results = [query.new_empty(query.shape) for _ in range(3)]
    products = torch.empty_like(lse)
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
        PADDED=padded_width(width),
        num_warps=8,
    )
    strides = [s for x in (query, key, value, grad, results[0]) for s in x.stride()[:3]]
    counts = [tokens, heads, scale * LOG2E, scale]
    where = lse if lengths is None else lengths
    for kernel, kind, targets, index in (
        (query_gradient_kernel, "query gradient", results[:1], 1),
        (key_gradients_kernel, "key gradients", results[1:], 2),
    ):
        chosen, lists = launch(kind, query.device, width), tables[3 * index : 3 * index + 3]
        kernel[lists[0].shape[1], batch * heads](
            query,
            key,
            value,
            grad,
            *targets,
            lse,
            products,
            *lists,
            where,
            *strides,
            *counts,
            **constants(chosen, query, lengths, numbers, index),
        )
    return tuple(results)


def operands(tensors: Sequence[Tensor], chosen: Launch) -> list:
    """Query, key and value as the forward kernel takes them: pointers, or descriptors of keys and values."""
    query, *others = tensors
    if chosen.descriptors == "head":
        import triton

        triton.set_allocator(scratch)
    if chosen.descriptors != "whole":
        return [query, *others]
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, chosen.columns, 1, padded_width(query.shape[-1])]
    return [query, *(TensorDescriptor.from_tensor(x, block) for x in others)]


def scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Memory of a launch for the descriptors that its programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton_attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _width = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@triton_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    query, key, value, tables, lengths, numbers, scale = inputs
    ctx.save_for_backward(query, key, value, *output, lengths, *tables)
    ctx.numbers = numbers, scale


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
    query, key, value, out, lse, lengths, *tables = ctx.saved_tensors
    numbers, scale = ctx.numbers
    grads = triton_attention_backward(grad, query, key, value, out, lse, tables, lengths, numbers, scale)
    return *grads, [None] * len(tables), None, None, None


triton_attention.register_autograd(_gradients, setup_context=_setup_context)
