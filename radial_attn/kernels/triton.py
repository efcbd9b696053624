"""Block-sparse flash attention in Triton, forward and backward, in float16 and bfloat16 on a GPU.

The mask becomes lists of tiles (radial_attn/tiles.py) once; from then on a call allocates its outputs,
launches one kernel forward and three backward, and does nothing else on the host.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import DTYPES, HALF, Needs
from ..block_mask import BlockMask
from ..tiles import Tiles, key_tiles, query_tiles
from .triton_configs import WIDTHS, Launch, launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own interpreter, on the CPU
NEEDS = Needs(
    devices=("cpu",) if INTERPRETED else ("cuda",),
    dtypes=DTYPES if INTERPRETED else HALF,
    widths=WIDTHS,
    modules=("triton",),
    install="pip install triton",
)
LOG2E = 1 / math.log(2)
ROWS = 64  # of a program that multiplies outputs and their gradients


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Attention over the kept blocks of `mask`; all tensors `[B, S, H, D]` on one GPU.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"backend 'triton' takes a positive scale, got {scale}")
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    tables, numbers = make_tables(mask, query, gradients)
    return triton_attention(*inputs, tables, lengths(text_lengths, mask, query.device), numbers, scale)[0]


def lengths(text_lengths: Tensor | None, mask: BlockMask, device: torch.device) -> Tensor | None:
    """Tokens of each sample that count, int32 `[B]` on the device; copied once for each distinct list."""
    if text_lengths is None:
        return None
    counts = tuple((text_lengths + mask.grid.video_tokens).tolist())
    return mask.cached(
        ("lengths", counts, device), lambda: torch.tensor(counts, dtype=torch.int32, device=device)
    )


def make_tables(mask: BlockMask, query: Tensor, gradients: bool) -> tuple[list[Tensor], list[int]]:
    """What the kernels read of a mask: `(offsets, starts)` of each kernel, the block table; and its numbers.

    The numbers are block size, whether each head has a pattern of its own, and for each kernel whether its
    mixed tiles read the block table.
    """
    device, width = query.device, query.shape[-1]
    kinds = {"forward": query_tiles}
    if gradients:
        kinds |= {"query gradient": query_tiles, "key gradients": key_tiles}
    lists: list[Tiles] = []
    for kind, cut in kinds.items():
        chosen = launch(kind, device, width)
        lists.append(cut(mask, chosen.rows, chosen.columns, device))
    table = mask.cached(("table", device), lambda: mask.blocks.to(device, torch.int8))
    numbers = [mask.block_size, int(mask.heads is not None), *(int(tiles.blocks_matter) for tiles in lists)]
    return [table, *(x for tiles in lists for x in (tiles.offsets, tiles.starts))], numbers


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
    table, offsets, starts = tables[:3]
    chosen = launch("forward", query.device, width)
    forward_kernel[offsets.shape[1], batch * heads](
        *operands((query, key, value), chosen),
        out,
        lse,
        offsets,
        starts,
        table,
        lse if lengths is None else lengths,
        *(stride for x in (query, key, value, out) for stride in x.stride()[:3]),
        tokens,
        heads,
        table.shape[-1],
        scale * LOG2E,
        TABLE=bool(numbers[2]),
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
    pairs, table = batch * heads, tables[0]
    row_products_kernel[-(-tokens // ROWS), pairs](
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
    )
    strides = [s for x in (query, key, value, grad, results[0]) for s in x.stride()[:3]]
    counts = [tokens, heads, table.shape[-1], scale * LOG2E, scale]
    where = lse if lengths is None else lengths
    for kernel, kind, targets, number, at in (
        (query_gradient_kernel, "query gradient", results[:1], numbers[3], 3),
        (key_gradients_kernel, "key gradients", results[1:], numbers[4], 5),
    ):
        chosen, (offsets, starts) = launch(kind, query.device, width), tables[at : at + 2]
        kernel[offsets.shape[1], pairs](
            query,
            key,
            value,
            grad,
            *targets,
            lse,
            products,
            offsets,
            starts,
            table,
            where,
            *strides,
            *counts,
            TABLE=bool(number),
            **constants(chosen, query, lengths, numbers),
        )
    return tuple(results)


def constants(chosen: Launch, query: Tensor, lengths: Tensor | None, numbers: Sequence[int]) -> dict:
    """What a kernel is compiled for."""
    return {
        "ROWS": chosen.rows,
        "COLUMNS": chosen.columns,
        "WIDTH": query.shape[-1],
        "PADDED": padded(query.shape[-1]),
        "SIZE": numbers[0],
        "PER_HEAD": bool(numbers[1]),
        "LENGTHS": lengths is not None,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


def padded(width: int) -> int:
    """The power of two that holds a head's width."""
    return 1 << (width - 1).bit_length()


def operands(tensors: Sequence[Tensor], chosen: Launch) -> list:
    """Query, key and value as the forward kernel takes them: pointers, or descriptors of keys and values."""
    query, *others = tensors
    if not chosen.descriptors:
        return [query, *others]
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = [1, chosen.columns, 1, padded(query.shape[-1])]
    return [query, *(TensorDescriptor.from_tensor(x, block) for x in others)]


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
